"""Acceleration: compilation, precision, native kernels, and errors when memory runs out."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from make_images import FEW
from timm.layers import GroupNormAct
from timm.layers.std_conv import StdConv2d
from torch import nn

import funmatch
from funmatch.config import Distill
from funmatch.errors import InputError, is_out_of_memory
from funmatch.models.classifier import Classifier
from funmatch.models.ensemble import TeacherEnsemble
from funmatch.models.inference import frozen
from funmatch.models.load import load
from funmatch.ops.native import build, norms
from funmatch.training import oom
from funmatch.training.run import checkpoint
from funmatch.training.run import folder as run_folder
from funmatch.training.student import acceleration, step_times
from funmatch.training.teachers import freezing

CPU = torch.device("cpu")
TINY = {
    "data": FEW, "teacher": "fashion-mini-teacher", "student": "fashion-mini-student", "threads": 1,
    "eval_every": 4, "batch": 16,
}  # fmt: skip


class Grouped(nn.Module):
    """A small network of layers that have native kernels."""

    num_classes = 10

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = (
            StdConv2d(3, 16, 3, stride=2),
            GroupNormAct(16, 4),
            StdConv2d(16, 32, 3, stride=2),
            GroupNormAct(32, 8),
        )
        self.body, self.head = nn.Sequential(*layers), nn.Linear(32, 10)

    def forward(self, views):
        return self.head(self.body(views.contiguous(memory_format=torch.channels_last)).mean((2, 3)))


NATIVE = TINY | {
    "student": Grouped(), "side": 32, "steps": 6, "compile": "native", "log_every": 1, "save_every": 2,
    "precision": "fp32", "teacher_precision": "fp32",
}  # fmt: skip


@pytest.fixture(name="any_size")
def accelerate_small_networks(monkeypatch, tmp_path):
    """Accelerate networks of any size, since those that gain are too large for a test; use a separate cache folder."""
    monkeypatch.setenv("FUNMATCH_CACHE", str(tmp_path / "cache"))
    for module in (acceleration, freezing, frozen):
        monkeypatch.setattr(module, "SMALL_NETWORK", 0)


COMPILED = TINY | {"compile": "on", "save_every": 2, "log_every": 1, "precision": "fp32", "steps": 6}
compiler = pytest.mark.skipif(build.find_compiler() is None, reason="there is no C++ compiler here")


def weights(folder: Path) -> bytes:
    return (folder / "student" / "model.safetensors").read_bytes()


def losses(run: funmatch.Outcome) -> list[float]:
    return [record["loss"] for record in run_folder.Run(run.folder).metrics.read() if record["event"] == "step"]


class LimitedMemory(nn.Module):
    """Runs out of memory with more than `limit` images in a training step."""

    num_classes = 10

    def __init__(self, limit: int = 8) -> None:
        super().__init__()
        self.net, self.most = timm.create_model("test_resnet", num_classes=10), limit

    def forward(self, views):
        if self.training and torch.is_grad_enabled() and len(views) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB")
        return self.net(views)


@pytest.mark.parametrize(
    ("batch", "micro", "fits"),
    [pytest.param(32, None, 8, marks=pytest.mark.slow), (20, None, 5), pytest.param(64, 16, 8, marks=pytest.mark.slow)],
)
def test_out_of_memory_error_names_the_micro_batch_that_fits(tmp_path, batch, micro, fits):
    options = TINY | {"batch": batch, "side": 32, "steps": 2, "student": LimitedMemory()}
    with pytest.raises(InputError, match=rf"with {micro or batch} images at once; micro_batch={fits} fits \(tried"):
        funmatch.distill(**options, micro_batch=micro, out=tmp_path / "run")
    assert not list((tmp_path / "run").glob("checkpoints/step-*")), "no checkpoint is written"
    done = funmatch.distill(**options, micro_batch=fits, out=tmp_path / "other")
    assert done.figures["step"] == 2


def test_out_of_memory_with_single_images_is_reported(tmp_path):
    with pytest.raises(InputError, match="even with one image at a time"):
        funmatch.distill(**TINY | {"side": 32, "steps": 2, "student": LimitedMemory(0)}, out=tmp_path / "run")


def test_only_memory_errors_count_as_out_of_memory():
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert oom.halves(20) == [10, 5, 3, 2, 1]


def test_teacher_batch_changes_no_result(tmp_path):
    sizes = []

    class CountingTeacher(nn.Module):
        num_classes = 10

        def __init__(self) -> None:
            super().__init__()
            self.net = load("fashion-mini-teacher").net

        def forward(self, views):
            sizes.append(len(views))
            return self.net(views)

    options = TINY | {"steps": 3, "teacher": CountingTeacher(), "side": 32, "teacher_precision": "fp32"}
    reference = funmatch.distill(**options, out=tmp_path / "whole")
    sizes.clear()
    chunked = funmatch.distill(**options, teacher_batch=6, out=tmp_path / "pieces")
    assert sizes.count(5) + sizes.count(6) >= 3 * 3, "16 images are split into 5, 5 and 6"
    assert abs(reference.figures["kl"] - chunked.figures["kl"]) < 1e-4
    with pytest.raises(InputError, match="teacher_batch must be at least 1"):
        Distill.checked(**options | {"teacher": ("x",), "data": ("x",), "student": "x"}, teacher_batch=0, out=tmp_path)


def resolve_auto(out: Path, student: Classifier, device: str = "cpu", **options) -> dict[str, str]:
    config = Distill(data=("x",), teacher=("x",), student="x", steps=options.get("steps", 5000), out=out, **{
        name: value for name, value in options.items() if name != "steps"
    })  # fmt: skip
    return acceleration.resolve_auto(config, config.steps or 0, 32, student, torch.device(device))


def seconds(fp32: float, bf16: float) -> dict[str, float]:
    """What is measured of a student that gains nothing from native kernels."""
    return {"fp32": fp32, "bf16": bf16, "fp32 native": fp32, "bf16 native": bf16}


def test_auto_precision_and_compilation_on_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(acceleration.devices, "teacher_precisions", lambda *_: ("bf16", "fp32"))
    monkeypatch.setattr(acceleration, "known_step_seconds", lambda *_: seconds(fp32=2.0, bf16=1.0))
    grouped = load("resnetv2_50x1_bit", classes=10)
    assert resolve_auto(tmp_path, grouped) == {"precision": "bf16", "compile": "native"}
    assert resolve_auto(tmp_path, grouped, steps=99) == {"precision": "fp32", "compile": "native"}, (
        "too short a run to measure"
    )
    assert resolve_auto(tmp_path, grouped, precision="fp32", compile="off") == {}, "explicit options are kept"
    small = load("fashion-mini-student")
    assert resolve_auto(tmp_path, small)["precision"] == "fp32"
    monkeypatch.setattr(acceleration, "known_step_seconds", lambda *_: seconds(fp32=1.05, bf16=1.0))
    assert resolve_auto(tmp_path, grouped)["precision"] == "fp32", "not clearly faster"
    monkeypatch.setattr(
        acceleration, "known_step_seconds", lambda *_: seconds(fp32=1.0, bf16=0.95) | {"bf16 native": 0.5}
    )
    assert resolve_auto(tmp_path, grouped)["precision"] == "bf16", "native kernels make it faster"


def test_auto_compilation_on_an_accelerator(tmp_path):
    batched, small = load("resnet18", classes=10), load("fashion-mini-student")
    options = {"precision": "bf16", "device": "cuda"}
    assert resolve_auto(tmp_path, batched, **options)["compile"] == "on"
    assert resolve_auto(tmp_path, batched, steps=1000, **options)["compile"] == "off", (
        "too short a run to regain the compile time"
    )
    assert resolve_auto(tmp_path, small, **options)["compile"] == "off"


def test_resumed_run_keeps_its_precision_and_compilation(tmp_path, monkeypatch):
    monkeypatch.setattr(acceleration, "known_step_seconds", lambda *_: seconds(fp32=2.0, bf16=1.0))
    grouped = load("resnetv2_50x1_bit", classes=10)
    for recorded, expected in (
        ({"precision": "bf16", "compile": "on"}, {"precision": "bf16", "compile": "on"}),
        ({"precision": "fp32", "compile": "off"}, {"precision": "fp32", "compile": "off"}),
        (
            {"precision": "bf16"},
            {"precision": "bf16", "compile": "auto"},
        ),  # recorded before the option existed: not compiled
    ):
        (tmp_path / "config.json").write_text(json.dumps({"verb": "distill", "knobs": recorded, "facts": {}}))
        assert resolve_auto(tmp_path, grouped) == expected
    assert run_folder.options_of(tmp_path / "none") == {}


def test_kernels_are_those_that_measured_faster_and_a_resumed_run_keeps_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FUNMATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(acceleration, "AVAILABLE", dict.fromkeys(acceleration.AVAILABLE, lambda: ""))
    student = load("vit_tiny_patch16_224", classes=10, side=32)
    config = Distill(data=("x",), teacher=("x",), student="x", steps=400, out=tmp_path, compile="native")
    config = config.model_copy(update={"precision": "bf16"})

    def kernels(config: Distill, steps: int = 400) -> list[str]:
        return acceleration.student_kernels(config, steps, 32, student, CPU)["kernels"]

    all_kinds = ["linear", "layer_norm", "attention", "softmax"]
    assert kernels(config) == all_kinds, "nothing was measured"
    place = acceleration.steps_measurement(student, 32, 16, all_kinds)
    place.write(seconds(fp32=2.0, bf16=1.0) | {"bf16 native": 1.1})
    assert kernels(config) == [], "torch is faster"
    assert kernels(config, steps=99) == all_kinds, "such runs do not measure"
    assert kernels(config.model_copy(update={"precision": "fp32"})) == all_kinds
    assert kernels(config.model_copy(update={"compile": "off"})) == []
    place.write(seconds(fp32=2.0, bf16=1.0) | {"bf16 native": 0.9})
    assert kernels(config) == all_kinds
    assert kernels(config.model_copy(update={"grad_checkpointing": True})) == ["linear", "layer_norm"]
    for facts, options, expected in (
        ({"kernels": ["linear"]}, {"compile": "native"}, ["linear"]),
        ({"kernels": []}, {"compile": "native"}, []),
        ({}, {"compile": "native"}, ["group_norm", "std_conv"]),
        ({}, {"compile": "off"}, all_kinds),
    ):
        record = {"verb": "distill", "knobs": options, "facts": {"data": "x"} | facts}
        (tmp_path / "config.json").write_text(json.dumps(record))
        assert kernels(config) == expected
    (tmp_path / "config.json").unlink()
    monkeypatch.setitem(acceleration.AVAILABLE, "linear", lambda: "no oneDNN")
    assert kernels(config) == ["layer_norm", "attention", "softmax"]
    assert "native CPU kernels unavailable (no oneDNN)" in capsys.readouterr().err


def test_resumed_run_keeps_its_crop_kernel(tmp_path, monkeypatch, capsys):
    class Split:
        index = np.array([(80, 80)], [("height", "<i4"), ("width", "<i4")])

    config = Distill(data=("x",), teacher=("x",), student="x", steps=1, out=tmp_path)
    monkeypatch.setattr(acceleration.resample, "why_unavailable", lambda: "")
    assert acceleration.crop_kernel(config, Split) == {"views": "native"}
    for facts, expected in (({}, "torch"), ({"views": "torch"}, "torch"), ({"views": "native"}, "native")):
        (tmp_path / "config.json").write_text(
            json.dumps({"verb": "distill", "knobs": {}, "facts": {"data": "x"} | facts})
        )
        assert acceleration.crop_kernel(config, Split) == {"views": expected}
    monkeypatch.setattr(acceleration.resample, "why_unavailable", lambda: "no compiler")
    assert acceleration.crop_kernel(config, Split) == {"views": "native"}
    assert "started with the native crop kernel, which is unavailable now (no compiler)" in capsys.readouterr().err
    (tmp_path / "config.json").unlink()
    assert acceleration.crop_kernel(config, Split) == {"views": "torch"}
    monkeypatch.setattr(acceleration.resample, "why_unavailable", lambda: pytest.fail("small images are cut by torch"))
    Split.index = np.array([(64, 64)], Split.index.dtype)
    assert acceleration.crop_kernel(config, Split) == {"views": "torch"}


@compiler
@pytest.mark.usefixtures("any_size")
def test_missing_native_kernels_of_a_recorded_teacher_are_reported(tmp_path, monkeypatch, capsys):
    options = TINY | {
        "teacher": Grouped(),
        "side": 32,
        "steps": 4,
        "allow_weak_teacher": True,
        "teacher_precision": "fp32",
    }
    reference = funmatch.distill(**options, out=tmp_path / "whole")
    (mode,) = (
        record["form"] for record in run_folder.Run(reference.folder).metrics.read() if record["event"] == "teacher"
    )
    assert mode["native"]
    plain = funmatch.distill(**options, compile="off", out=tmp_path / "plain")
    (mode,) = (record["form"] for record in run_folder.Run(plain.folder).metrics.read() if record["event"] == "teacher")
    assert not mode["native"]
    (reference.folder / "result.json").unlink()
    capsys.readouterr()
    monkeypatch.setattr(norms, "why_unavailable", lambda: "gone")
    funmatch.distill(**options, out=tmp_path / "whole")
    assert "started with native CPU kernels for teacher python:Grouped, which are unavailable now (gone)" in (
        capsys.readouterr().err
    )


def test_measuring_step_time_changes_neither_model_nor_rng(monkeypatch, tmp_path):
    monkeypatch.setenv("FUNMATCH_CACHE", str(tmp_path))
    student = load("test_resnet", classes=10)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    state = torch.get_rng_state()
    seconds = acceleration.known_step_seconds(student, 32, 4, ("batch_norm",))
    assert seconds == acceleration.known_step_seconds(student, 32, 4, ("batch_norm",)), "measured once"
    assert set(seconds) == {"fp32", "bf16", "fp32 native", "bf16 native"}
    plain = acceleration.known_step_seconds(student, 32, 4)
    assert plain["fp32"] == plain["fp32 native"], "there is nothing to compare"
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())
    assert all(parameter.grad is None for parameter in student.parameters())


def test_failed_compilation_falls_back_to_uncompiled(tmp_path, monkeypatch, capsys):
    def failing(*_, **__):
        def call(_views):
            raise RuntimeError("no compiler here\nand much more")

        return call

    plain = funmatch.distill(**TINY, steps=3, compile="off", out=tmp_path / "off", teacher_precision="fp32")
    monkeypatch.setattr(torch, "compile", failing)
    capsys.readouterr()
    on = funmatch.distill(**TINY, steps=3, compile="on", out=tmp_path / "on", teacher_precision="fp32")
    output = capsys.readouterr().err
    assert output.count("failed (no compiler here); training it uncompiled") == 1
    assert weights(plain.folder) == weights(on.folder)


@pytest.mark.slow
def test_compiled_runs_match_uncompiled_ones_and_are_deterministic(tmp_path):
    options = COMPILED | {"schedule": "constant", "warmup_steps": 0}
    reference = funmatch.distill(**options, out=tmp_path / "whole")
    plain = funmatch.distill(**options | {"compile": "off"}, out=tmp_path / "x")
    assert losses(reference) == pytest.approx(losses(plain), rel=1e-4)  # fused kernels round differently
    resumed = funmatch.distill(**options, out=tmp_path / "again")
    assert weights(reference.folder) == weights(resumed.folder)


@pytest.mark.parametrize(
    "options",
    [pytest.param(COMPILED, marks=pytest.mark.slow), pytest.param(NATIVE, marks=compiler)],
    ids=["on", "native"],
)
@pytest.mark.usefixtures("any_size")
def test_resumed_compiled_run_equals_uninterrupted_run(tmp_path, monkeypatch, options):
    reference = funmatch.distill(**options, out=tmp_path / "reference")
    original_save = checkpoint.save

    def save_and_stop(folder, tensors, state):
        original_save(folder, tensors, state)
        if state.step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            funmatch.distill(**options, out=tmp_path / "run")
    resumed = funmatch.distill(**options | {"compile": "auto"}, out=tmp_path / "run")
    assert weights(reference.folder) == weights(resumed.folder)


def test_ensemble_computes_in_chunks():
    views = {32: torch.rand(7, 3, 32, 32)}

    class Member:
        side, share = 32, 1.0
        frozen = nn.Identity()

        def answers(self, views):
            assert len(views) <= 3
            return views.mean((2, 3))

    assert torch.equal(TeacherEnsemble([Member()], chunk=3)(views), views[32].mean((2, 3)))  # pyrefly: ignore


@compiler
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("any_size")
def test_native_kernels_match_torch_and_are_deterministic(tmp_path, capsys, precision):
    options = NATIVE | {"precision": precision, "schedule": "constant", "warmup_steps": 0}
    native = funmatch.distill(**options, out=tmp_path / "own")
    assert "using native CPU kernels for GroupNorm" in capsys.readouterr().err
    resumed = funmatch.distill(**options, out=tmp_path / "again")
    assert weights(native.folder) == weights(resumed.folder)
    plain = funmatch.distill(**options | {"compile": "off"}, out=tmp_path / "plain")
    assert len(losses(native)) == 6
    # Rounding grows over the steps, and bf16 keeps 8 bits of each value.
    assert losses(native) == pytest.approx(losses(plain), rel={"fp32": 1e-3, "bf16": 2e-2}[precision])
    assert weights(native.folder) != weights(plain.folder), "they round differently"


@pytest.mark.usefixtures("any_size")
def test_without_a_compiler_the_student_uses_torch(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(norms, "why_unavailable", lambda: "no compiler")
    funmatch.distill(**NATIVE | {"precision": "fp32", "steps": 1}, out=tmp_path / "run")
    assert "native CPU kernels unavailable (no compiler); falling back to slower PyTorch kernels" in (
        capsys.readouterr().err
    )


def test_a_first_step_that_chooses_kernels_refuses_no_arithmetic():
    def measure(*seconds: float) -> tuple[float, int]:
        left = list(seconds)
        return step_times._fastest_step(lambda: left.pop(0), 0.1), len(left)

    assert measure(0.4, 0.2, 0.09, 1.0) == (0.09, 1)
    assert measure(0.6, 0.09) == (0.6, 1), "twice as slow and a quarter of a second: no other step is worth it"
