"""Matching features: a run is exact as one on logits is, and ends in a backbone without classes."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from make_images import FEW
from safetensors.torch import load_file
from test_processes import PLAIN, assert_near, run

import funmatch
from funmatch.commands import tape as tape_command
from funmatch.config import Distill
from funmatch.config import Tape as TapeOptions
from funmatch.data.loader import Batch
from funmatch.errors import InputError
from funmatch.models.inference.answers import Layout
from funmatch.models.inference.features import Features
from funmatch.models.load import load
from funmatch.training import distill
from funmatch.training.matching.losses import FeatureMatching
from funmatch.training.matching.memory import Memory

TINY = {
    "data": FEW, "student": "resnet10t", "student_kwargs": {"channels": (8, 8, 16, 16), "stem_width": 8}, "side": 32,
    "batch": 16, "threads": 1, "lr": 0.01, "save_every": 3, "log_every": 1, "eval_every": 6,
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
    assert [record["step"] for record in evaluated] == [6]
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"match": ("logits", "featurs")}, "did you mean 'features'"),
        ({"match": ("features", "features")}, "match lists features twice"),
        ({"match": "tokens"}, "--match features tokens"),
        ({"match": ("logits", "features"), "match_weights": (1.0, 0.0)}, "match_weights must be above 0"),
        ({"match": ("logits", "features"), "match_weights": (1.0,)}, "match_weights has 1 values for the 2"),
        ({"match": "features", "temperature": 2.0}, "temperature belongs to .*logits"),
        ({"match": "features", "standardise": True}, "standardise belongs to .*logits"),
        ({"match": "features", "tape": "tape", "tape_top": 3}, "tape_top keeps some classes"),
        ({"match": "features", "strategy": "fix/rs"}, "teacher of this strategy is fixed"),
        ({"match": "features", "feature_queue": 100}, "feature_queue belongs to .*queue-kl"),
        ({"match": "features", "feature_temperature": 1.0}, "feature_temperature belongs to"),
        ({"match": "features", "feature_loss": "batch-kl", "micro_batch": 4}, "micro_batch would change it"),
        ({"match": ("features", "tokens"), "feature_loss": "queue-kl"}, "cosine or l2"),
        ({"feature_loss": "l2"}, "feature_loss belongs to .*features"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Distill.checked(**TINY, teacher="fashion-mini-teacher", steps=1, out="run", **options)


def test_relations_within_a_batch_need_one_process(monkeypatch):
    config = Distill.checked(**FEATURES, steps=1, out="run", feature_loss="batch-kl")
    distill.check_processes(config)
    monkeypatch.setattr("funmatch.runtime.env.world_size", lambda: 2)
    with pytest.raises(InputError, match="batch-kl compares the images of a batch with each other"):
        distill.check_processes(config)


def test_the_queue_is_a_function_of_the_steps():
    """It holds the embeddings of the last batches, whatever pieces they came in."""
    layout, generator = Layout(0, (3, 2)), torch.Generator().manual_seed(0)
    batches = torch.randn(6, 4, 5, generator=generator)
    memory = Memory(layout, batch=4, queue=7)
    assert memory.earlier(0)[0].shape == (0, 3)
    for step, rows in enumerate(batches):
        expected = batches[max(0, step - 2) : step].flatten(0, 1)  # 7 images are two batches
        for pieces in (rows[:3], rows[3:]):
            memory.push(step, 0 if len(pieces) == 3 else 3, [*pieces.split((3, 2), 1)])
            found = memory.earlier(step)
            for own, part in zip(found, expected.split((3, 2), 1), strict=True):
                units = torch.nn.functional.normalize(part, dim=1)
                np.testing.assert_allclose(sorted(own.tolist()), sorted(units.tolist()), atol=1e-6)


def test_pieces_of_a_batch_add_up_to_its_loss():
    layout = Layout(4, (3,), (2,), (1, 2))
    config = Distill.checked(
        **FEATURES | {"match": ("logits", "features", "tokens")}, match_weights=(1.0, 0.5, 2.0), steps=1, out="run",
        feature_loss=("cosine", "l2", "queue-kl"), feature_loss_weights=(1.0, 0.2, 0.3),
    )  # fmt: skip
    student, teacher = torch.randn(2, 3, 6, layout.width, generator=torch.Generator().manual_seed(1))

    def losses(pieces: list[slice]) -> dict[str, float]:
        matching = FeatureMatching(config, layout, (1.0,), Memory(layout, 6, 12), standardised=False)
        for step in range(3):
            found: dict[str, float] = {}
            for rows in pieces:
                count = rows.stop - rows.start
                batch = Batch(torch.empty(0), torch.empty(count + 1), 1.0, step=step, first_row=rows.start)
                each = matching.losses(
                    student[step, rows], teacher[step, rows], batch,
                    lambda own, target: {"loss": (own - target).square().sum(-1).mean()},
                )  # fmt: skip
                for name, value in each.items():
                    found[name] = found.get(name, 0.0) + value.item() * count / 6
        return found

    whole = losses([slice(0, 6)])
    assert losses([slice(0, 2), slice(2, 4), slice(4, 6)]) == pytest.approx(whole)
    logits = (student[2, :, :4] - teacher[2, :, :4]).square().sum(-1).mean().item()
    assert whole["loss"] == pytest.approx(logits + 0.5 * whole["features"] + 2 * whole["tokens"])


def test_statistics_standardise_each_dimension():
    layout = Layout(2, (3, 1), (2, 1), (1, 2))
    memory, rows = Memory(layout, 4, 0), 3 + 2 * torch.randn(50, layout.width)
    rows[:, 3] = 7.0  # a constant dimension stays finite
    memory.fit(rows)
    parts = memory.standardize(layout.split(rows))
    assert torch.equal(parts.logits, rows[:, :2])
    for features in (*parts.pooled, *(each.flatten(0, 1) for each in parts.tokens)):
        np.testing.assert_allclose(features.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(parts.pooled[0].std(0, correction=0), [1, 0, 1], atol=1e-5)
    np.testing.assert_allclose(parts.tokens[1].flatten(0, 1).std(0, correction=0), [1], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        {"match": ("logits", "features", "tokens"), "match_weights": (1.0, 0.5, 0.2), "side": 64},
        {"teacher": ("fashion-mini-teacher", "fashion-mini-teacher"), "feature_loss": ("l2", "batch-kl")},
        {"feature_loss": "queue-kl", "micro_batch": 5, "teacher_ahead": True, "tape": "tape"},
    ],
)
def test_every_way_resumes_to_the_bit(tmp_path, monkeypatch, more):
    monkeypatch.chdir(tmp_path)
    options = FEATURES | {"ema": 0.9} | more
    whole = funmatch.distill(out="whole", steps=6, **options)
    if "tape" in more:
        tape = funmatch.distill(out="replayed", steps=6, **options)
        assert_same_runs(whole.folder, tape.folder)
    assert_resumes_to_the_bit(tmp_path / "run", whole.folder, options)


@pytest.mark.slow
def test_a_tape_of_features_says_how_it_rounds_and_replays(tmp_path):
    options = FEATURES | {"match": ("logits", "features", "tokens"), "tape": tmp_path / "tape"}
    recorded = funmatch.distill(out=tmp_path / "one", steps=4, **options)
    replayed = funmatch.distill(out=tmp_path / "two", steps=4, **options)
    assert weights(recorded.folder).keys() == weights(replayed.folder).keys()
    assert all(torch.equal(each, weights(replayed.folder)[name]) for name, each in weights(recorded.folder).items())
    found = tape_command.run(TapeOptions(folder=tmp_path / "tape", recompute=2)).metrics
    assert 0 < found["rounding"]["mean"] <= found["rounding"]["max"] < 2**-11
    assert found["equal"] == 1
    assert found["error"] == 0
    with pytest.raises(InputError, match="answers"):
        funmatch.distill(out=tmp_path / "three", steps=4, **options | {"match": "logits"})


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    words = [
        "distill", "--data", FEW, "--teacher", "fashion-mini-teacher", "--teacher-precision", "fp32", "--batch", "16",
        "--steps", "6", "--save-every", "6", "--log-every", "1", "--eval-every", "6", "--lr", "0.001", "--device",
        "cpu", *PLAIN, "--match", "features", "--feature-loss", "l2", "queue-kl", "--feature-queue", "32",
        "--standardise-features", "on", "--optimizer", "sgd",  # Adam magnifies rounding in gradients that are nearly 0
    ]  # fmt: skip
    one, two = (run(tmp_path / f"{world}", *words, world=world) for world in (1, 2))
    assert_near(one, two)
    newest = [sorted((out / "checkpoints").glob("step-*"))[-1] for out in (one, two)]
    queues = [load_file(folder / "matching.safetensors") for folder in newest]
    torch.testing.assert_close(queues[0], queues[1])


@pytest.mark.slow
def test_students_together_equal_students_alone(tmp_path):
    students = ["resnet10t", "resnet14t"]
    options = QUEUED | {"steps": 5}
    del options["student"]
    both = funmatch.distill_several(students=students, out=tmp_path / "both", **options)
    for student, together in zip(students, both, strict=True):
        alone = funmatch.distill(student=student, out=tmp_path / student, **options)
        assert_same_runs(alone.folder, together.folder)


@pytest.mark.slow
def test_a_backbone_goes_on_to_be_a_classifier(finished, tmp_path):
    """A headless teacher as a folder makes a backbone, and fine-tuning puts a head on it."""
    options = FEATURES | {"teacher": str(finished), "student_kwargs": ()}
    # A module comes with a head, which a backbone has not.
    student = timm.create_model("resnet10t", num_classes=7, channels=(8, 8, 16, 16), stem_width=8)
    again = funmatch.distill(out=tmp_path / "again", steps=2, **options | {"student": student})
    assert again.metrics["knn"] is not None
    tuned = funmatch.finetune(
        data=FEW, student=str(again.folder), side=32, batch=16, steps=4, lr=0.01, threads=1, out=tmp_path / "tuned"
    )
    assert tuned.top1 is not None
    assert timm.create_model(f"local-dir:{tuned.student}", pretrained=True).num_classes == 10
    evaluated = funmatch.evaluate(model=str(finished), data=FEW)
    assert evaluated["embedding"]["dimensions"] == 16


@pytest.mark.slow
def test_images_without_labels_are_matched_by_their_cosine(images, tmp_path):
    options = FEATURES | {"data": str(images), "unlabelled": True, "batch": 4, "keep": "best"}
    found = funmatch.distill(out=tmp_path / "run", steps=4, **options)
    evaluated = records(found.folder, "eval")
    assert all(record["knn"] is None for record in evaluated)
    assert found.metrics["best_score"] == max(record["cosine"] for record in evaluated)
