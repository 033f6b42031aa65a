"""Runs that learn nothing, collapse or diverge, and teachers that know nothing, are told."""

import pytest
import timm
import torch
from test_distill import MINI, TEACHER

import funmatch
from funmatch.errors import InputError
from funmatch.training.evaluation.outcome import describe_failure

RUN = MINI | {"steps": 3}


def test_a_run_that_learns_nothing_says_so_at_its_end_and_on_its_page(tmp_path, capsys):
    run = funmatch.distill(teacher=TEACHER, out=tmp_path / "run", lr=1e-12, **RUN)
    said = "has not trained its student: " if run.figures["predicted_classes"] > 1 else "has collapsed: its student"
    assert f"WARNING: the run {said}" in capsys.readouterr().err
    assert f"run {said}" in run.report.read_text()


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({"kl": 5.0}, "has diverged"),  # 2 log 10 = 4.6
        ({"agreement": 0.1, "predicted_classes": 1}, "has collapsed"),
        ({"agreement": None, "top1": 0.3, "predicted_classes": 1}, "has collapsed"),
        # Two standard deviations above a tenth of 400 images: 0.1 + 2 √(0.09 / 400) = 0.13.
        ({"agreement": 0.129, "predicted_classes": 3}, "has not trained"),
        ({"agreement": 0.131, "predicted_classes": 3}, None),
        ({"agreement": 1.0, "predicted_classes": 1, "constant": 1.0}, None),
        ({"agreement": None, "top1": None, "predicted_classes": 1}, None),
        ({"agreement": 0.1, "constant": None}, None),
    ],
)
def test_failures_are_told_from_metrics(metrics, expected):
    found = describe_failure({"kl": 1.0, "top1": 0.1, "constant": 0.1, "pictures": 400} | metrics, 10)
    assert expected in found if expected else found is None


def test_results_of_earlier_versions_have_no_failure():
    assert describe_failure({"top1": 0.1, "agreement": 0.1, "kl": 2.0, "pictures": 400}, 10) is None


def test_a_teacher_that_answers_the_same_for_all_images_is_refused_without_labels(tmp_path):
    teacher = tmp_path / "teacher"
    net = timm.create_model("test_resnet", num_classes=10)
    torch.nn.init.zeros_(net.get_classifier().weight)
    net.get_classifier().bias.data = torch.arange(10.0)
    timm.models.save_for_hf(net, teacher, model_config={"num_classes": 10}, safe_serialization=True)
    options = {"teacher": f"local-dir:{teacher}", "out": tmp_path / "run", "unlabelled": True, "side": 32} | RUN
    with pytest.raises(InputError, match=r"gives all [\d,]+ images of \w+ the same probabilities"):
        funmatch.distill(**options)
    assert funmatch.distill(allow_weak_teacher=True, **options).figures["step"] == 3
