"""Candidate teachers before a run: each figure against its definition, computed from the same views by NumPy."""

import json

import numpy as np
import pytest
import timm
import torch
from make_images import FEW
from timm.models import save_for_hf

from funmatch.commands import rank_teachers
from funmatch.commands.common.ready import build
from funmatch.commands.plan import run, show
from funmatch.config.search import PlanDistill
from funmatch.errors import InputError
from funmatch.models.load import load
from funmatch.training.evaluation import scoring
from funmatch.training.teachers.ranking import spread_of_mean

RUN = {"data": (FEW,), "student": "fashion-mini-student", "steps": 20, "batch": 16, "threads": 1, "device": "cpu"}


@pytest.fixture
def other(tmp_path) -> str:
    """A teacher with random weights, in a folder of timm's."""
    torch.manual_seed(0)
    net = timm.create_model("test_resnet", num_classes=10)
    net.pretrained_cfg["input_size"] = (3, 32, 32)
    save_for_hf(net, str(tmp_path / "other"), safe_serialization=True)
    return str(tmp_path / "other")


def ranked(tmp_path, *teachers, **options):
    config = PlanDistill.checked(**RUN | {"out": tmp_path / "run", "teachers": teachers} | options)
    result = run(config)
    assert not (tmp_path / "run").exists()
    return config, result


@pytest.mark.parametrize("strategy", ["funmatch", pytest.param("ind/ic", marks=pytest.mark.slow)])
def test_figures_are_those_of_the_answers_to_the_views_of_the_run(tmp_path, other, strategy):
    names = ("fashion-mini-teacher", other)
    config, result = ranked(tmp_path, *names, teachers_views=50, strategy=strategy)
    rows = {row["teacher"]: row for row in result.metrics["teachers"]}
    assert [*rows] == [*names]  # the trained one is the more accurate
    setup, _ = build(config.model_copy(update={"allow_weak_teacher": True}))
    for name in names:
        teacher = load(name, pretrained=True, side=setup.config.side).eval()
        shown = []
        for step in range(4):  # 50 views of batches of 16
            batch = setup.loader.batch_at(step)
            crops = batch.crops if strategy == "funmatch" else batch.teacher_crops[0]
            lam = torch.as_tensor(batch.lam).view(-1, 1, 1, 1)
            shown.append(lam * crops[1:] + (1 - lam) * crops[:-1])
        with torch.inference_mode():
            p = teacher(torch.cat(shown)[:50]).double().softmax(-1).numpy()
            predicted = scoring.predict(teacher, setup.evaluation.validation, setup.evaluation.view).argmax(-1)
        labels = setup.evaluation.validation.labels(slice(None))
        assert rows[name]["top1"] == pytest.approx((predicted == labels).double().mean().item())
        assert rows[name]["entropy"] == pytest.approx(-(p * np.log(p)).sum(1).mean(), rel=1e-4)
        means = np.stack([p[5 * group : 5 * group + 5].mean(0) for group in range(10)])
        assert rows[name]["spread"] == pytest.approx(means.std(0, ddof=1).mean(), rel=1e-4)
        assert rows[name]["gflop"] > 0
        assert rows[name]["ms"] > 0
        assert rows[name]["side"] == 32


def test_spread_is_none_for_a_constant_answer_and_known_for_two():
    assert spread_of_mean(torch.full((40, 4), 0.25)) == 0
    # Groups that answer one class or the other in turn: ten means of 0 and 1, in two classes.
    answers = torch.eye(2)[torch.arange(10).repeat_interleave(3) % 2]
    assert spread_of_mean(answers) == pytest.approx(np.std([0, 1] * 5, ddof=1))


def test_the_order_is_by_spread_without_labels(tmp_path, other, capsys, monkeypatch):
    scores = scoring.score
    monkeypatch.setattr(scoring, "score", lambda *given: scores(*given) | {"top1": None, "balanced": None})
    _, result = ranked(tmp_path, "fashion-mini-teacher", other, teachers_views=20)
    spreads = [row["spread"] for row in result.metrics["teachers"]]
    assert spreads == sorted(spreads)
    show(result)
    printed = capsys.readouterr().out
    assert "no labels" in printed
    assert "ordered by spread" in printed


def test_a_table_is_printed_and_metrics_are_those_of_json(tmp_path, capsys):
    _, result = ranked(tmp_path, "fashion-mini-teacher", teachers_views=20)
    show(result)
    printed = capsys.readouterr().out
    assert "fashion-mini-teacher" in printed
    assert "ordered by accuracy" in printed
    (row,) = json.loads(json.dumps(result.metrics))["teachers"]
    assert set(row) == {"teacher", "top1", "entropy", "spread", "gflop", "ms", "parameters", "side"}


def test_candidates_that_do_not_fit_are_refused_with_one_message(tmp_path, other):
    torch.manual_seed(0)
    save_for_hf(timm.create_model("test_resnet", num_classes=3), str(tmp_path / "three"), safe_serialization=True)
    for options, message in (
        ({"teachers": ("fashion-mini-teacher", str(tmp_path / "three"))}, "disagree on the number of classes"),
        ({"teachers": ("fashion-mini-teacher",), "teacher": ("fashion-mini-teacher", other)}, "leave out --teacher"),
        ({"teachers": ("fashion-mini-teacher",), "strategy": "fix/cc"}, "--strategy fix/cc fixes"),
        ({"teachers": ("fashion-mini-teacher",), "teachers_views": 5}, "teachers_views"),
        ({"teachers": ()}, "give the network to match by --teacher"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            run(PlanDistill.checked(**RUN | {"out": tmp_path / "run"} | options))
        assert "problems" not in str(caught.value)


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_teachers.env, "world_size", lambda: 2)
    with pytest.raises(InputError, match="single process"):
        ranked(tmp_path, "fashion-mini-teacher")
