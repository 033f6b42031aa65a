"""Whole runs: folder, metrics, repetition, refusals, precision, evaluation."""

import json
import math
import shutil
from pathlib import Path

import pytest
import timm
import torch
from make_images import FEW, paint
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms import functional

import funmatch
from funmatch.config import Distill, Train
from funmatch.data.cache.open_cache import open_cache
from funmatch.errors import InputError
from funmatch.training.run.checkpoint import KEPT
from funmatch.training.teachers.checks import chance_threshold

MINI = {"data": FEW, "student": "fashion-mini-student", "batch": 16, "eval_every": 100}
EVALUATED = MINI | {"eval_every": 4}
TINY = {"student": "resnet10t", "student_kwargs": {"channels": (8, 8, 16, 16), "stem_width": 8}, "side": 32}
TEACHER = "fashion-mini-teacher"


def records(folder: Path, event: str) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == event]


@pytest.fixture(name="finished")
def short_run(tmp_path, finished_run) -> funmatch.Outcome:
    return finished_run(tmp_path / "run", teacher=TEACHER, steps=12, log_every=4, save_every=4, **EVALUATED)


def test_run_folder_has_the_documented_files(finished):
    names = {path.name for path in finished.folder.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "checkpoints", "student", "result.json", "report.html"}
    config = json.loads((finished.folder / "config.json").read_text())
    assert config["verb"] == "distill"
    assert config["knobs"]["side"] == 32
    assert config["knobs"]["warmup_steps"] == 1
    assert config["facts"]["pictures"] == {"train": 200, "val": 30, "test": 30}
    assert [record["step"] for record in records(finished.folder, "step")] == [4, 8, 12]
    assert [record["step"] for record in records(finished.folder, "eval")] == [4, 8, 12]
    (teacher,) = records(finished.folder, "teacher")
    assert teacher["split"] == "val"
    assert teacher["top1"] == pytest.approx(0.93, abs=0.02)  # one image is 0.033


def test_newest_two_and_best_checkpoints_are_kept(finished):
    names = sorted(path.name for path in (finished.folder / "checkpoints").iterdir())
    assert [name for name in names if name.startswith("step")] == ["step-000000008", "step-000000012"]
    assert KEPT == 2
    evals = records(finished.folder, "eval")
    best = max(evals, key=lambda record: (record["top1"], -record["step"]))["step"]
    assert [name for name in names if name.startswith("best")] == [f"best-{best:09}"]
    suffixes = {path.suffix for path in finished.folder.rglob("*") if path.is_file()}
    assert suffixes == {".json", ".jsonl", ".safetensors", ".html"}


def test_metrics_equal_those_computed_with_timm_alone(finished):
    """Metrics recomputed from the saved student and teacher with timm and torch only."""
    metrics = finished.figures
    assert metrics["split"] == "test"
    assert metrics["step"] == 12
    split = open_cache(FEW).splits["test"]
    images = [Image.fromarray(split.image(i).numpy()) for i in range(len(split))]

    def probabilities(folder):
        net = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        cfg = net.pretrained_cfg
        side = cfg["input_size"][-1]
        resized = torch.stack(
            [functional.to_tensor(image.resize((side, side), Image.Resampling.BILINEAR)) for image in images]
        )
        mean, std = (torch.tensor(cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
        with torch.no_grad():
            return net((resized - mean) / std).double().softmax(-1)

    student = probabilities(finished.folder / "student")
    teacher = probabilities(Path(funmatch.__file__).parent / "embedded" / TEACHER)
    labels = split.labels(slice(None))
    assert metrics["top1"] == pytest.approx((student.argmax(-1) == labels).double().mean().item(), abs=1e-3)
    agreement = (student.argmax(-1) == teacher.argmax(-1)).double().mean().item()
    assert metrics["agreement"] == pytest.approx(agreement, abs=1e-3)
    kl = (teacher * (teacher / student).log()).sum(-1).mean().item()
    assert metrics["kl"] == pytest.approx(kl, rel=1e-3)
    assert metrics["teacher"]["top1"] == pytest.approx((teacher.argmax(-1) == labels).double().mean().item(), abs=1e-3)


def test_finished_run_is_not_repeated(finished, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in finished.folder.rglob("*") if path.name != "report.html"}
    repeated = funmatch.distill(teacher=TEACHER, out=tmp_path / "run", steps=12, log_every=4, save_every=4, **EVALUATED)
    assert repeated.figures == finished.figures
    assert before == {
        path: path.stat().st_mtime_ns for path in finished.folder.rglob("*") if path.name != "report.html"
    }


def test_other_options_in_the_same_folder_are_refused(finished, tmp_path):
    before = (finished.folder / "config.json").read_text()
    with pytest.raises(InputError) as error:
        funmatch.distill(
            teacher=TEACHER, out=tmp_path / "run", steps=12, save_every=4, lr=1e-4, temperature=5, **EVALUATED
        )
    assert "lr: 0.003 in the run, 0.0001 now" in str(error.value)
    assert "temperature: 1.0 in the run, 5.0 now" in str(error.value)
    assert "batch" not in str(error.value)
    with pytest.raises(InputError, match="run of distill, not train"):
        funmatch.train(out=tmp_path / "run", steps=12, **MINI)
    assert (finished.folder / "config.json").read_text() == before


def test_changed_images_and_a_changed_teacher_are_refused(images, tmp_path):
    common = {**TINY, "data": images, "batch": 8, "steps": 2}
    teacher = funmatch.train(out=tmp_path / "teacher", **common)
    options = {**common, "out": tmp_path / "run", "teacher": teacher.folder, "allow_weak_teacher": True}
    funmatch.distill(**options)
    paint(images / "train" / "ant" / "new.png", 77)
    with pytest.raises(InputError, match="the data's content"):
        funmatch.distill(**options)
    (images / "train" / "ant" / "new.png").unlink()
    shutil.rmtree(tmp_path / "teacher")
    funmatch.train(out=tmp_path / "teacher", **{**common, "seed": 5})
    with pytest.raises(InputError, match="the teacher's content"):
        funmatch.distill(**options)


@pytest.mark.slow
def test_training_on_labels_reduces_the_loss(tmp_path):
    trained = funmatch.train(
        out=tmp_path / "run", steps=200, mixup=0.0, **{**MINI, "data": "fashion-mini", "batch": 32}
    )
    assert trained.top1 > 0.4  # chance is 0.1; 200 steps reach clearly more
    assert trained.agreement is None
    losses = [record["loss"] for record in records(trained.folder, "step")]
    assert losses[-1] < losses[0] < 2 * math.log(10)


def test_distillation_needs_no_labels(tmp_path, images):
    flat = tmp_path / "flat"
    for i, path in enumerate(sorted((images / "train").rglob("*.*"))):
        flat.mkdir(exist_ok=True)
        shutil.copy(path, flat / f"{i}{path.suffix}")
    run = funmatch.distill(flat, TEACHER, "fashion-mini-student", tmp_path / "run", steps=4, batch=8)
    assert run.top1 is None
    assert 0 <= run.agreement <= 1
    assert (run.figures["split"], run.figures["pictures"]) == ("val", 1)
    assert run.figures["kl"] >= 0
    with pytest.raises(InputError, match="no labels"):
        funmatch.train(flat, "fashion-mini-student", tmp_path / "labels", steps=4)
    assert not (tmp_path / "labels").exists()
    student = timm.create_model(f"local-dir:{run.folder / 'student'}", pretrained=True)
    assert student.num_classes == 10


def test_run_can_be_a_teacher(tmp_path, images):
    common = {**TINY, "data": images, "batch": 8, "steps": 3}
    teacher = funmatch.train(out=tmp_path / "teacher", **common)
    run = funmatch.distill(out=tmp_path / "run", teacher=teacher.folder, allow_weak_teacher=True, **common)
    assert run.figures["teacher"]["parameters"] == run.figures["parameters"]
    assert json.loads((run.folder / "student" / "config.json").read_text())["label_names"] == ["ant", "bee", "cat"]


def test_teacher_of_other_classes_is_rejected(tmp_path, images):
    with pytest.raises(InputError, match="has 10 outputs, but images has 3 classes"):
        funmatch.distill(images, TEACHER, "fashion-mini-student", tmp_path / "run", steps=1)
    teacher = funmatch.train(images, out=tmp_path / "teacher", steps=1, **TINY)
    for split in ("train", "val", "test"):
        (images / split / "ant").rename(images / split / "dog")
    options = {**TINY, "data": images, "steps": 1, "teacher": teacher.folder, "out": tmp_path / "run"}
    with pytest.raises(InputError, match="ant ≠ bee"):
        funmatch.distill(**options)
    funmatch.distill(**options, trust_class_order=True, allow_weak_teacher=True)


def test_teacher_near_chance_is_rejected_and_nothing_is_written(tmp_path):
    untrained = funmatch.train(out=tmp_path / "blind", steps=1, **MINI)
    with pytest.raises(InputError, match="near chance"):
        funmatch.distill(teacher=untrained.folder, out=tmp_path / "run", steps=1, **MINI)
    assert not (tmp_path / "run").exists()
    funmatch.distill(teacher=untrained.folder, out=tmp_path / "run", steps=1, allow_weak_teacher=True, **MINI)


def test_chance_threshold():
    assert 0.14 < chance_threshold(10, 500) < 0.2
    assert 0.5 < chance_threshold(2, 1000) < 0.6
    assert 0.001 < chance_threshold(1000, 50_000) < 0.003
    assert chance_threshold(2, 4) == 0.75, "with four images, only a clearly guessing teacher is rejected"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_trains_and_saves_fp32(tmp_path, precision):
    run = funmatch.distill(teacher=TEACHER, out=tmp_path / "run", steps=10, log_every=1, precision=precision, **MINI)
    losses = [record["loss"] for record in records(run.folder, "step")]
    assert losses[-1] < losses[0]
    state = load_file(run.folder / "student" / "model.safetensors")
    assert {tensor.dtype for tensor in state.values() if tensor.is_floating_point()} == {torch.float32}


def test_teacher_ahead_changes_no_bit(tmp_path):
    options = {"teacher": TEACHER, "steps": 5, "threads": 1, "workers": 2, **MINI}
    plain = funmatch.distill(out=tmp_path / "plain", **options)
    ahead = funmatch.distill(out=tmp_path / "ahead", teacher_ahead=True, **options)
    first, second = (load_file(run.folder / "student" / "model.safetensors") for run in (plain, ahead))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_epochs_are_converted_to_steps(tmp_path):
    run = funmatch.train(out=tmp_path / "run", epochs=0.5, **MINI)
    assert run.figures["step"] == round(0.5 * 200 / 16)
    repeated = funmatch.train(out=tmp_path / "run", steps=6, **MINI)
    assert repeated.figures == run.figures, "the same length given in steps is the same run"


def test_batch_can_be_larger_than_the_data(tmp_path, images):
    run = funmatch.train(images, out=tmp_path / "run", steps=2, batch=40, **TINY)
    assert run.figures["step"] == 2


def test_evaluation_equals_the_runs_own_result(finished):
    metrics = funmatch.evaluate(finished.folder)
    for name in ("top1", "top5", "agreement", "kl", "ece", "step", "split"):
        assert metrics[name] == pytest.approx(finished.figures[name], rel=1e-6) if name != "split" else True
    assert metrics["run"] == str(finished.folder)
    model = funmatch.evaluate(TEACHER, data=FEW, split="val", teacher=finished.folder)
    assert model["run"] is None
    assert model["top1"] == records(finished.folder, "teacher")[0]["top1"]
    assert model["agreement"] is not None


def test_run_can_be_evaluated_from_another_folder(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher = funmatch.train(images.name, out="teacher", steps=2, **TINY)
    run = funmatch.distill(images.name, "teacher", out="run", steps=2, allow_weak_teacher=True, **TINY)
    (tmp_path / "resnet10t").mkdir()  # a folder with a network's name must not be taken for the network
    monkeypatch.chdir(tmp_path / "resnet10t")
    repeated = funmatch.evaluate("../run")
    assert repeated["agreement"] == run.agreement
    shutil.rmtree(tmp_path / teacher.folder)
    without_teacher = funmatch.evaluate("../run")
    assert without_teacher["top1"] == run.top1
    assert without_teacher["agreement"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "tset"}, "unknown split 'tset'; did you mean 'test'.; known: test, train, val"),
        ({"data": "fashion-min"}, "did you mean 'fashion-mini'"),
        ({"side": 0}, "side must be at least 1"),
    ],
)
def test_invalid_evaluations_are_rejected(finished, options, message):
    with pytest.raises(InputError, match=message):
        funmatch.evaluate(finished.folder, **options)


def test_non_finite_loss_stops_the_run_and_keeps_valid_checkpoints(tmp_path, monkeypatch):
    from funmatch.training import distill

    original_loss = distill.distillation_loss
    calls = []

    def nan_after_six_calls(*args):
        calls.append(1)
        factor = float("nan") if len(calls) > 6 else 1.0
        return {name: loss * factor for name, loss in original_loss(*args).items()}

    monkeypatch.setattr(distill, "distillation_loss", nan_after_six_calls)
    # No record of the loss before the second checkpoint.
    options = MINI | {"save_every": 4, "log_every": 20, "eval_every": 20}
    with pytest.raises(InputError, match="no longer finite at step 7"):
        funmatch.distill(teacher=TEACHER, out=tmp_path / "run", steps=20, **options)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [path.name for path in checkpoints.glob("step-*")] == ["step-000000004"]
    state = load_file(checkpoints / "step-000000004" / "student.safetensors")
    assert all(tensor.isfinite().all() for tensor in state.values())


def test_all_problems_are_reported_at_once():
    with pytest.raises(InputError) as error:
        Train.checked(data="d", student="s", out=Path("o"), batch=0, lr=-1, epochs=3, steps=3)
    for message in ("batch must be at least 1, got 0", "lr must be above 0, got -1.0", "either --steps or --epochs"):
        assert message in str(error.value)
    with pytest.raises(InputError, match="did you mean 'temperature'"):
        Distill.checked(data="d", student="s", teacher="t", out=Path("o"), temprature=2)
    with pytest.raises(InputError, match="steps"):
        Train.checked(data="d", student="s", out=Path("o"), steps="many")


def test_evaluation_uses_the_cap_of_the_run(images, tmp_path):
    run = funmatch.train(images, out=tmp_path / "run", steps=3, cap=6, **TINY)
    repeated = funmatch.evaluate(run.folder)
    assert repeated["ece"] == pytest.approx(run.figures["ece"], abs=1e-9)


def test_model_options_as_strings_equal_those_as_values():
    from_strings = Train.checked(
        data="d", student="s", out=Path("o"), steps=1, student_kwargs=("channels=8,8,16,16", "act=gelu")
    )
    values = {"channels": (8, 8, 16, 16), "act": "gelu"}
    assert from_strings == Train.checked(data="d", student="s", out=Path("o"), steps=1, student_kwargs=values)
