"""Run folders, tapes and caches written by version 0.1.0 can still be evaluated, resumed, extended and replayed."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models.resnet import ResNet

import funmatch
from funmatch import cli
from funmatch.training.evaluation import scoring

FIXTURES = Path(__file__).parent / "fixtures"
OPTIONS = {
    "data": "fashion-mini", "teacher": "fashion-mini-teacher", "student": "resnet10t",
    "student_kwargs": {"channels": (4, 4, 4, 4), "stem_width": 4}, "side": 32, "batch": 32, "device": "cpu",
    "precision": "fp32", "teacher_precision": "fp32", "compile": "off", "decoder": "pillow", "threads": 1,
    "log_every": 2, "eval_every": 4, "save_every": 4,
}  # fmt: skip
"""Options that wrote all fixtures; `fixtures/README.md` lists the commands."""
RUN = OPTIONS | {"schedule": "wsd", "cooldown_steps": 2, "ema": 0.9}
STEPS = 8
TEACHER_FEATURES = 48
"""Features before the embedded teacher's head, which distinguish its forward passes from the student's."""


@pytest.fixture(scope="module")
def same_libraries(tmp_path_factory) -> None:
    """Skip where another torch or timm changes the teacher's fingerprint: such runs are rightly refused.

    With the versions that wrote the fixtures nothing is skipped, so a change of the fingerprint by us is noticed.
    """
    facts = json.loads((FIXTURES / "old_run" / "config.json").read_text())["facts"]
    ours = {"torch": torch.__version__, "timm": timm.__version__}
    if all(facts["versions"][name].partition("+")[0] == ours[name].partition("+")[0] for name in ours):
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUNMATCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        run = funmatch.distill(**OPTIONS, steps=1, out=tmp_path_factory.mktemp("runs") / "run")
    current = json.loads((run.folder / "config.json").read_text())["facts"]["teacher_function"]
    if current != facts["teacher_function"]:
        pytest.skip(f"the teacher's modules have other settings in {ours}")


@pytest.fixture
def old_run(tmp_path) -> Path:
    return Path(shutil.copytree(FIXTURES / "old_run", tmp_path / "old_run"))


@pytest.fixture
def old_tape(tmp_path) -> Path:
    return Path(shutil.copytree(FIXTURES / "old_tape", tmp_path / "old_tape"))


@pytest.fixture
def old_cache(tmp_path, monkeypatch) -> Path:
    """A copy of the old cache and its images, in another folder than it was written in."""
    folder = Path(shutil.copytree(FIXTURES / "old_cache", tmp_path / "old_cache"))
    monkeypatch.setenv("FUNMATCH_CACHE", str(folder / "cache"))
    return folder


@pytest.fixture
def few_evaluated(monkeypatch) -> None:
    """Evaluates 50 images of the embedded set: on all 2,500, these tests would do little else."""
    for name in ("validation_split", "test_split"):
        whole = getattr(scoring, name)

        def some(*arguments, whole=whole, **options):
            split = whole(*arguments, **options)
            return split.subset(scoring.evenly_spread(len(split), 50))

        monkeypatch.setattr(scoring, name, some)


@contextmanager
def teacher_batches() -> Iterator[list[int]]:
    """Collect the batch sizes of the teacher's forward passes over full batches while the block runs.

    Evaluations are included, so only the difference between two runs shows who computed the training steps.
    """
    sizes: list[int] = []

    def record_sizes(module, inputs, _) -> None:
        if isinstance(module, ResNet) and module.num_features == TEACHER_FEATURES:
            sizes.extend(len(each) for each in inputs if len(each) == OPTIONS["batch"])

    hook = torch.nn.modules.module.register_module_forward_hook(record_sizes)
    try:
        yield sizes
    finally:
        hook.remove()


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Modification time and content of each file below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".html", ".lock"))
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def lines_until(folder: Path, step: int) -> list[dict]:
    """The records of a run up to a step."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["step"] <= step]


def assert_near(one: Path, other: Path, share: float) -> None:
    """Two students are equal up to a share of their weights' norm: another machine rounds differently."""
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        error = (second[name].double() - tensor.double()).norm()
        assert error <= share * tensor.double().norm().clamp(min=1e-2), name


@pytest.mark.usefixtures("same_libraries")
def test_finished_run_is_not_trained_again(old_run):
    before = contents(old_run)
    resumed = funmatch.distill(**RUN, steps=STEPS, out=old_run)
    assert resumed.figures == json.loads((FIXTURES / "old_run" / "result.json").read_text())
    assert contents(old_run) == before


@pytest.mark.usefixtures("same_libraries")
def test_other_options_are_still_refused(old_run):
    with pytest.raises(funmatch.InputError, match=r"lr: 0\.003 .*0\.01 "):
        funmatch.distill(**RUN, steps=STEPS, lr=0.01, out=old_run)


def test_old_run_can_be_evaluated(old_run):
    recorded = json.loads((old_run / "result.json").read_text())
    metrics = funmatch.evaluate(old_run)
    assert (metrics["split"], metrics["pictures"]) == ("test", 2000)
    assert metrics["top1"] == pytest.approx(recorded["top1"], abs=2e-3)
    assert metrics["agreement"] == pytest.approx(recorded["agreement"], abs=2e-3)
    assert metrics["kl"] == pytest.approx(recorded["kl"], rel=1e-4)
    assert funmatch.load(old_run).num_classes == 10


def test_old_run_can_be_reported(old_run, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["report", str(old_run), "--json"])
    assert end.value.code == 0
    assert json.loads(capsys.readouterr().out)["report"] == str(old_run / "report.html")
    assert "old_run" in (old_run / "report.html").read_text()


@pytest.mark.usefixtures("same_libraries", "few_evaluated")
@pytest.mark.parametrize("lost_steps", [0, 2], ids=["only the result", "two steps"])
def test_old_run_resumes_from_its_checkpoint(old_run, lost_steps):
    """From step 8 only the student is exported, bitwise equal; from step 6 two steps are trained again."""
    for name in ("student", "student-ema", *(["checkpoints/step-000000008"] if lost_steps else [])):
        shutil.rmtree(old_run / name)
    (old_run / "result.json").unlink()
    resumed = funmatch.distill(**RUN, steps=STEPS, out=old_run)
    assert resumed.figures["step"] == STEPS
    for name in ("student", "student-ema"):
        assert_near(FIXTURES / "old_run" / name, old_run / name, 1e-2 if lost_steps else 0)
    assert lines_until(old_run, STEPS - lost_steps) == lines_until(FIXTURES / "old_run", STEPS - lost_steps)
    assert [line["step"] for line in lines_until(old_run, STEPS) if line["event"] == "step"] == [2, 4, 6, 8]


@pytest.mark.usefixtures("same_libraries", "few_evaluated")
def test_old_run_can_be_extended(old_run):
    longer = funmatch.distill(**RUN, steps=12, out=old_run)
    assert longer.figures["step"] == 12
    # It continues from before the cool-down; the first end is kept unchanged.
    assert lines_until(old_run, 6) == lines_until(FIXTURES / "old_run", 6)
    for name in ("student", "student-ema"):
        assert_near(FIXTURES / "old_run" / name, old_run / "ends" / "step-000000008" / name, 0)
    assert [line["step"] for line in lines_until(old_run, 12) if line["event"] == "step"] == [2, 4, 6, 8, 10, 12]


def test_old_tape_can_be_inspected(old_tape, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["tape", str(old_tape), "--json"])
    assert end.value.code == 0
    metrics = json.loads(capsys.readouterr().out)
    assert (metrics["steps"], metrics["rows"], metrics["damaged"]) == (STEPS, STEPS * OPTIONS["batch"], 0)


@pytest.mark.usefixtures("same_libraries", "few_evaluated")
def test_old_tape_is_replayed_and_extended(tmp_path, old_tape):
    logits, longer = (old_tape / "answers.bin").read_bytes(), STEPS + 2
    options = OPTIONS | {"steps": longer, "eval_every": longer}
    with teacher_batches() as with_teacher:
        recorded = funmatch.distill(**options, tape=tmp_path / "new_tape", out=tmp_path / "recorded")
    with teacher_batches() as with_tape:
        replayed = funmatch.distill(**options, tape=old_tape, out=tmp_path / "replayed")
    assert len(with_teacher) - len(with_tape) >= STEPS, (
        "the teacher computes only the two steps that the tape does not hold"
    )
    assert_near(recorded.folder / "student", replayed.folder / "student", 1e-2)
    extended = (old_tape / "answers.bin").read_bytes()
    assert extended[: len(logits)] == logits
    assert len(extended) == len(logits) // STEPS * longer
    with pytest.raises(funmatch.InputError, match=r"resample: tf on the tape, antialias now"):
        funmatch.distill(**OPTIONS, steps=STEPS, resample="antialias", tape=old_tape, out=tmp_path / "other")
    with pytest.raises(funmatch.InputError, match=r"seed: 0 .*1 "):
        funmatch.distill(**OPTIONS, steps=STEPS, seed=1, tape=old_tape, out=tmp_path / "other")


@pytest.mark.parametrize("pixels", ["resident", "streaming"])
def test_old_cache_is_used(tmp_path, old_cache, pixels):
    (folder,) = (old_cache / "cache").glob(f"*-{pixels}")
    before = contents(folder)
    options = {"data": str(old_cache / "images"), "decoder": "pillow", "pixels": pixels}
    common = {name: OPTIONS[name] for name in ("student", "student_kwargs", "side", "batch", "device", "threads")}
    funmatch.train(**common, **options, steps=1, out=tmp_path / "run")
    assert contents(folder) == before
    funmatch.prepare(**options)  # reads every image again, and finds the checksums right
    assert contents(folder) == before
    assert len(list((old_cache / "cache").glob(f"*-{pixels}"))) == 1


@pytest.mark.usefixtures("same_libraries", "few_evaluated")
def test_old_logits_of_a_fixed_teacher_are_used(tmp_path, old_cache):
    before = contents(old_cache / "cache" / "answers")
    funmatch.distill(**OPTIONS, strategy="fix/rs", steps=2, out=tmp_path / "run")
    assert contents(old_cache / "cache" / "answers") == before


def test_a_comparison_leaves_the_pages_of_its_runs_alone(funmatch, old_run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(old_run, other)
    for folder in (old_run, other):
        (folder / "report.html").write_text("its own")
    done = funmatch("report", old_run, other)
    assert done.stdout.strip() == "comparison.html"
    assert "its own" not in (tmp_path / "comparison.html").read_text()
    assert [(folder / "report.html").read_text() for folder in (old_run, other)] == ["its own"] * 2
    assert funmatch("report", other).stdout.strip() == str(other / "report.html")
    assert (other / "report.html").read_text() != "its own"
