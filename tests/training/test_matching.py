"""Matching features: a run is exact as one on logits is, and ends in a backbone without classes."""

import json
from pathlib import Path

import pytest
import timm
import torch
from make_images import FEW
from safetensors.torch import load_file

import funmatch
from funmatch.errors import InputError
from funmatch.models.inference.features import Features
from funmatch.models.load import load

TINY = {
    "data": FEW, "student": "resnet10t", "student_kwargs": {"channels": (8, 8, 16, 16), "stem_width": 8}, "side": 32,
    "batch": 16, "threads": 1, "lr": 0.01, "save_every": 3, "log_every": 1, "eval_every": 3,
}  # fmt: skip
FEATURES = TINY | {"teacher": "fashion-mini-teacher", "match": "features"}
QUEUED = FEATURES | {"feature_loss": ("cosine", "queue-kl"), "feature_queue": 32, "ema": 0.9}


def records(folder: Path, event: str) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == event]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "student" / "model.safetensors")


def assert_same_runs(one: Path, other: Path) -> None:
    for student in ("student", "student-ema"):
        first, second = (load_file(folder / student / "model.safetensors") for folder in (one, other))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    losses = [[record["loss"] for record in records(folder, "step")] for folder in (one, other)]
    assert losses[0] == losses[1]


@pytest.fixture(name="finished", scope="module")
def features_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("features") / "run"
    funmatch.distill(out=folder, steps=6, **QUEUED)
    return folder


def test_features_alone_make_a_backbone_in_timms_layout(finished):
    net = timm.create_model(f"local-dir:{finished}/student", pretrained=True).eval()
    assert net.num_classes == 0
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 16)
    assert not [name for name in weights(finished) if "projector" in name]
    loaded = load(str(finished))
    assert loaded.num_classes == 0
    assert Features(loaded)(torch.zeros(2, 3, 32, 32)).shape == (2, 16)


def test_neighbours_are_recorded_and_choose_the_best(finished):
    evaluated = records(finished, "eval")
    assert [record["step"] for record in evaluated] == [3, 6]
    assert all(record["top1"] is None and 0 <= record["knn"] <= 1 for record in evaluated)
    (teacher,) = records(finished, "teacher")
    assert teacher["knn"] > 0.7
    result = json.loads((finished / "result.json").read_text())
    assert result["best_score"] == max(record["knn"] for record in evaluated)
    assert result["cosine"] > 0


def stop_at(last: int):
    def on_event(event: str, step: int, _values: dict) -> None:
        if (event, step) == ("step", last):
            raise RuntimeError("stopped by the test")

    return on_event


def assert_resumes_to_the_bit(folder: Path, whole: Path, options: dict) -> None:
    """Stops a run after its fifth step, resumes it, and compares it with one that was never stopped."""
    with pytest.raises(RuntimeError, match="stopped by the test"):
        funmatch.distill(out=folder, steps=6, on_event=stop_at(4), **options)
    funmatch.distill(out=folder, steps=6, **options)
    assert_same_runs(whole, folder)


def test_resumed_run_is_bitwise_the_same(finished, tmp_path):
    assert_resumes_to_the_bit(tmp_path / "run", finished, QUEUED)


def test_a_teacher_without_classes_needs_features(tmp_path):
    net = timm.create_model("resnet10t", num_classes=0, channels=(8, 8, 16, 16))
    with pytest.raises(InputError, match=r"no classes.*features.*funmatch head"):
        funmatch.distill(out=tmp_path / "run", steps=1, **TINY | {"teacher": net})
