"""Runs from the first word to the last file."""

import json
import math
import shutil
from pathlib import Path

import pytest
import timm
import torch
from make_images import FEW, paint
from safetensors.torch import load_file

import funmatch
from funmatch.config import Distill, Train
from funmatch.data.cache.open_cache import open_cache
from funmatch.errors import InputError
from funmatch.training.run.checkpoint import KEPT
from funmatch.training.teachers.checks import chance_threshold

WHOLE = {"data": "fashion-mini", "student": "fashion-mini-student", "batch": 16}
MINI = WHOLE | {"data": FEW}
TINY = {"student": "resnet10t", "student_kwargs": {"channels": (8, 8, 16, 16), "stem_width": 8}, "side": 32}
TEACHER = "fashion-mini-teacher"


def records(folder: Path, event: str) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == event]


@pytest.fixture(name="taught")
def short_run(tmp_path, finished_run) -> funmatch.Outcome:
    return finished_run(tmp_path / "run", teacher=TEACHER, steps=12, log_every=4, eval_every=4, save_every=4, **WHOLE)


def test_a_run_is_a_folder(taught):
    names = {path.name for path in taught.folder.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "checkpoints", "student", "result.json", "report.html"}
    config = json.loads((taught.folder / "config.json").read_text())
    assert config["verb"] == "distill"
    assert config["knobs"]["side"] == 32
    assert config["knobs"]["warmup_steps"] == 1
    assert config["facts"]["pictures"] == {"train": 200, "val": 500, "test": 2000}
    assert [record["step"] for record in records(taught.folder, "step")] == [4, 8, 12]
    assert [record["step"] for record in records(taught.folder, "eval")] == [4, 8, 12]
    (teacher,) = records(taught.folder, "teacher")
    assert teacher["split"] == "val"
    assert teacher["top1"] > 0.85


def test_the_newest_two_checkpoints_and_the_best_are_kept_without_a_pickle(taught):
    names = sorted(path.name for path in (taught.folder / "checkpoints").iterdir())
    assert [name for name in names if name.startswith("step")] == ["step-000000008", "step-000000012"]
    assert KEPT == 2
    evals = records(taught.folder, "eval")
    best = max(evals, key=lambda record: (record["top1"], -record["step"]))["step"]
    assert [name for name in names if name.startswith("best")] == [f"best-{best:09}"]
    suffixes = {path.suffix for path in taught.folder.rglob("*") if path.is_file()}
    assert suffixes == {".json", ".jsonl", ".safetensors", ".html"}


def test_figures_are_of_the_test_split_and_true(taught):
    """The figures again, from the saved student and teacher, with timm alone and sums by hand."""
    figures = taught.figures
    assert figures["split"] == "test"
    assert figures["step"] == 12
    split = open_cache("fashion-mini").splits["test"]
    views = torch.stack([split.image(i) for i in range(len(split))]).permute(0, 3, 1, 2).float() / 255

    def probabilities(folder):
        net = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        cfg = net.pretrained_cfg
        side = cfg["input_size"][-1]
        shown = torch.nn.functional.interpolate(views, (side, side), mode="bilinear")
        mean, std = (torch.tensor(cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
        with torch.no_grad():
            return net((shown - mean) / std).double().softmax(-1)

    student = probabilities(taught.folder / "student")
    teacher = probabilities(Path(funmatch.__file__).parent / "embedded" / TEACHER)
    labels = split.labels(slice(None))
    assert figures["top1"] == pytest.approx((student.argmax(-1) == labels).double().mean().item(), abs=1e-3)
    agreement = (student.argmax(-1) == teacher.argmax(-1)).double().mean().item()
    assert figures["agreement"] == pytest.approx(agreement, abs=1e-3)
    kl = (teacher * (teacher / student).log()).sum(-1).mean().item()
    assert figures["kl"] == pytest.approx(kl, rel=1e-3)
    assert figures["teacher"]["top1"] == pytest.approx((teacher.argmax(-1) == labels).double().mean().item(), abs=1e-3)


def test_a_finished_run_does_nothing(taught, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in taught.folder.rglob("*") if path.name != "report.html"}
    again = funmatch.distill(
        teacher=TEACHER, out=tmp_path / "run", steps=12, log_every=4, eval_every=4, save_every=4, **WHOLE
    )
    assert again.figures == taught.figures
    assert before == {path: path.stat().st_mtime_ns for path in taught.folder.rglob("*") if path.name != "report.html"}


def test_another_configuration_in_the_same_folder_is_refused_with_what_differs(taught, tmp_path):
    before = (taught.folder / "config.json").read_text()
    with pytest.raises(InputError) as error:
        funmatch.distill(
            teacher=TEACHER, out=tmp_path / "run", steps=12, eval_every=4, save_every=4, lr=1e-4, temperature=5, **WHOLE
        )
    assert "lr: 0.003 in the run, 0.0001 now" in str(error.value)
    assert "temperature: 1.0 in the run, 5.0 now" in str(error.value)
    assert "batch" not in str(error.value)
    with pytest.raises(InputError, match="run of distill, not train"):
        funmatch.train(out=tmp_path / "run", steps=12, **WHOLE)
    assert (taught.folder / "config.json").read_text() == before


def test_changed_images_and_a_changed_teacher_are_refused(images, tmp_path):
    common = {**TINY, "data": images, "batch": 8, "steps": 2}
    teacher = funmatch.train(out=tmp_path / "teacher", **common)
    knobs = {**common, "out": tmp_path / "run", "teacher": teacher.folder, "allow_weak_teacher": True}
    funmatch.distill(**knobs)
    paint(images / "train" / "ant" / "new.png", 77)
    with pytest.raises(InputError, match="the data's content"):
        funmatch.distill(**knobs)
    (images / "train" / "ant" / "new.png").unlink()
    shutil.rmtree(tmp_path / "teacher")
    funmatch.train(out=tmp_path / "teacher", **{**common, "seed": 5})
    with pytest.raises(InputError, match="the teacher's content"):
        funmatch.distill(**knobs)


def test_training_on_labels_learns_them(tmp_path):
    trained = funmatch.train(out=tmp_path / "run", steps=200, mixup=0.0, **{**WHOLE, "batch": 32})
    assert trained.top1 > 0.4
    assert trained.agreement is None
    losses = [record["loss"] for record in records(trained.folder, "step")]
    assert losses[-1] < losses[0] < 2 * math.log(10)


def test_distillation_needs_no_label(tmp_path, images):
    flat = tmp_path / "flat"
    for i, path in enumerate(sorted((images / "train").rglob("*.*"))):
        flat.mkdir(exist_ok=True)
        shutil.copy(path, flat / f"{i}{path.suffix}")
    run = funmatch.distill(flat, TEACHER, "fashion-mini-student", tmp_path / "run", steps=4, batch=8)
    assert run.top1 is None
    assert 0 <= run.agreement <= 1
    assert run.figures["split"] == "train"
    assert run.figures["kl"] >= 0
    with pytest.raises(InputError, match="no labels"):
        funmatch.train(flat, "fashion-mini-student", tmp_path / "labels", steps=4)
    assert not (tmp_path / "labels").exists()
    student = timm.create_model(f"local-dir:{run.folder / 'student'}", pretrained=True)
    assert student.num_classes == 10


def test_a_run_is_a_teacher(tmp_path, images):
    common = {**TINY, "data": images, "batch": 8, "steps": 3}
    teacher = funmatch.train(out=tmp_path / "teacher", **common)
    run = funmatch.distill(out=tmp_path / "run", teacher=teacher.folder, allow_weak_teacher=True, **common)
    assert run.figures["teacher"]["parameters"] == run.figures["parameters"]
    assert json.loads((run.folder / "student" / "config.json").read_text())["label_names"] == ["ant", "bee", "cat"]


def test_a_teacher_of_other_classes_is_refused(tmp_path, images):
    with pytest.raises(InputError, match="has 10 outputs, but images has 3 classes"):
        funmatch.distill(images, TEACHER, "fashion-mini-student", tmp_path / "run", steps=1)
    teacher = funmatch.train(images, out=tmp_path / "teacher", steps=1, **TINY)
    for split in ("train", "val", "test"):
        (images / split / "ant").rename(images / split / "dog")
    knobs = {**TINY, "data": images, "steps": 1, "teacher": teacher.folder, "out": tmp_path / "run"}
    with pytest.raises(InputError, match="ant ≠ bee"):
        funmatch.distill(**knobs)
    funmatch.distill(**knobs, trust_class_order=True, allow_weak_teacher=True)


def test_a_teacher_near_chance_is_refused_before_anything_is_written(tmp_path):
    blind = funmatch.train(out=tmp_path / "blind", steps=1, **WHOLE)
    with pytest.raises(InputError, match="near chance"):
        funmatch.distill(teacher=blind.folder, out=tmp_path / "run", steps=1, **WHOLE)
    assert not (tmp_path / "run").exists()
    funmatch.distill(teacher=blind.folder, out=tmp_path / "run", steps=1, allow_weak_teacher=True, **WHOLE)


def test_what_counts_as_chance():
    assert 0.14 < chance_threshold(10, 500) < 0.2
    assert 0.5 < chance_threshold(2, 1000) < 0.6
    assert 0.001 < chance_threshold(1000, 50_000) < 0.003
    assert chance_threshold(2, 4) == 0.75, "four images tell little, so only a clear guesser is refused"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_learns_too(tmp_path, precision):
    run = funmatch.distill(teacher=TEACHER, out=tmp_path / "run", steps=10, log_every=1, precision=precision, **MINI)
    losses = [record["loss"] for record in records(run.folder, "step")]
    assert losses[-1] < losses[0]
    state = load_file(run.folder / "student" / "model.safetensors")
    assert {tensor.dtype for tensor in state.values() if tensor.is_floating_point()} == {torch.float32}


def test_a_teacher_that_answers_ahead_teaches_the_same(tmp_path):
    knobs = {"teacher": TEACHER, "steps": 5, "threads": 1, "workers": 2, **MINI}
    plain = funmatch.distill(out=tmp_path / "plain", **knobs)
    ahead = funmatch.distill(out=tmp_path / "ahead", teacher_ahead=True, **knobs)
    first, second = (load_file(run.folder / "student" / "model.safetensors") for run in (plain, ahead))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_epochs_become_steps(tmp_path):
    run = funmatch.train(out=tmp_path / "run", epochs=0.5, **MINI)
    assert run.figures["step"] == round(0.5 * 200 / 16)
    again = funmatch.train(out=tmp_path / "run", steps=6, **MINI)
    assert again.figures == run.figures, "the same length in other words is the same run"


def test_a_batch_may_be_larger_than_the_data(tmp_path, images):
    run = funmatch.train(images, out=tmp_path / "run", steps=2, batch=40, **TINY)
    assert run.figures["step"] == 2


def test_evaluation_says_what_the_run_said(taught):
    figures = funmatch.evaluate(taught.folder)
    for name in ("top1", "top5", "agreement", "kl", "ece", "step", "split"):
        assert figures[name] == pytest.approx(taught.figures[name], rel=1e-6) if name != "split" else True
    assert figures["run"] == str(taught.folder)
    model = funmatch.evaluate(TEACHER, data="fashion-mini", split="val", teacher=taught.folder)
    assert model["run"] is None
    assert model["top1"] == records(taught.folder, "teacher")[0]["top1"]
    assert model["agreement"] is not None


def test_a_record_can_be_used_from_anywhere(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher = funmatch.train(images.name, out="teacher", steps=2, **TINY)
    run = funmatch.distill(images.name, "teacher", out="run", steps=2, allow_weak_teacher=True, **TINY)
    (tmp_path / "resnet10t").mkdir()  # a folder of the name of a network is not what is meant
    monkeypatch.chdir(tmp_path / "resnet10t")
    again = funmatch.evaluate("../run")
    assert again["agreement"] == run.agreement
    shutil.rmtree(tmp_path / teacher.folder)
    alone = funmatch.evaluate("../run")
    assert alone["top1"] == run.top1
    assert alone["agreement"] is None


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"split": "tset"}, "unknown split 'tset'; did you mean 'test'.; known: test, train, val"),
        ({"data": "fashion-min"}, "did you mean 'fashion-mini'"),
        ({"side": 0}, "side must be at least 1"),
    ],
)
def test_evaluation_of_what_is_not_there(taught, knobs, message):
    with pytest.raises(InputError, match=message):
        funmatch.evaluate(taught.folder, **knobs)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_what_is_sound(tmp_path, monkeypatch):
    from funmatch.training import distill

    real = distill.distillation_loss
    calls = []

    def spoiled(*given):
        calls.append(1)
        spoil = float("nan") if len(calls) > 6 else 1.0
        return {name: loss * spoil for name, loss in real(*given).items()}

    monkeypatch.setattr(distill, "distillation_loss", spoiled)
    with pytest.raises(InputError, match="no longer finite at step 8"):
        funmatch.distill(teacher=TEACHER, out=tmp_path / "run", steps=20, save_every=4, **MINI)
    kept = tmp_path / "run" / "checkpoints"
    assert [path.name for path in kept.glob("step-*")] == ["step-000000004"]
    state = load_file(kept / "step-000000004" / "student.safetensors")
    assert all(tensor.isfinite().all() for tensor in state.values())


def test_all_problems_are_told_at_once():
    with pytest.raises(InputError) as error:
        Train.checked(data="d", student="s", out=Path("o"), batch=0, lr=-1, epochs=3, steps=3)
    for words in ("batch must be at least 1, got 0", "lr must be above 0, got -1.0", "either --steps or --epochs"):
        assert words in str(error.value)
    with pytest.raises(InputError, match="did you mean 'temperature'"):
        Distill.checked(data="d", student="s", teacher="t", out=Path("o"), temprature=2)
    with pytest.raises(InputError, match="steps"):
        Train.checked(data="d", student="s", out=Path("o"), steps="many")


def test_a_judged_run_sees_the_images_that_it_was_taught_with(images, tmp_path):
    run = funmatch.train(images, out=tmp_path / "run", steps=3, cap=6, **TINY)
    again = funmatch.evaluate(run.folder)
    assert again["ece"] == pytest.approx(run.figures["ece"], abs=1e-9)


def test_options_are_the_same_however_they_are_spelt():
    words = Train.checked(
        data="d", student="s", out=Path("o"), steps=1, student_kwargs=("channels=8,8,16,16", "act=gelu")
    )
    values = {"channels": (8, 8, 16, 16), "act": "gelu"}
    assert words == Train.checked(data="d", student="s", out=Path("o"), steps=1, student_kwargs=values)
