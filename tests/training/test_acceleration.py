"""Acceleration: what is compiled, in which arithmetic, and what happens when memory runs out."""

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
from funmatch.ops.native import library
from funmatch.training import oom
from funmatch.training.run import checkpoint
from funmatch.training.run import folder as run_folder
from funmatch.training.student import acceleration
from funmatch.training.teachers import loading

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
    "precision": "fp32",
}  # fmt: skip


@pytest.fixture(name="small_ones_too")
def nothing_is_small(monkeypatch, tmp_path):
    """Networks that are worth native kernels are too large for a test; what is measured so is not for other tests."""
    monkeypatch.setenv("FUNMATCH_CACHE", str(tmp_path / "cache"))
    for module in (acceleration, loading, frozen):
        monkeypatch.setattr(module, "SMALL_NETWORK", 0)


COMPILED = TINY | {"compile": "on", "save_every": 2, "log_every": 1, "precision": "fp32", "steps": 6}
compiler = pytest.mark.skipif(library.find_compiler() is None, reason="there is no C++ compiler here")


def weights(folder: Path) -> bytes:
    return (folder / "student" / "model.safetensors").read_bytes()


def losses(run: funmatch.Outcome) -> list[float]:
    return [record["loss"] for record in run_folder.Run(run.folder).metrics.read() if record["event"] == "step"]


class Greedy(nn.Module):
    """A network that has no memory for more than eight images at once during training."""

    num_classes = 10

    def __init__(self, most: int = 8) -> None:
        super().__init__()
        self.net, self.most = timm.create_model("test_resnet", num_classes=10), most

    def forward(self, views):
        if self.training and torch.is_grad_enabled() and len(views) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB")
        return self.net(views)


@pytest.mark.parametrize(("batch", "micro", "fits"), [(32, None, 8), (20, None, 5), (64, 16, 8)])
def test_a_lack_of_memory_names_what_fits(tmp_path, batch, micro, fits):
    told = TINY | {"batch": batch, "side": 32, "steps": 2, "student": Greedy()}
    with pytest.raises(InputError, match=rf"with {micro or batch} images at once; micro_batch {fits} fits \(tried"):
        funmatch.distill(**told, micro_batch=micro, out=tmp_path / "run")
    assert not list((tmp_path / "run").glob("checkpoints/step-*")), "nothing of it is saved"
    done = funmatch.distill(**told, micro_batch=fits, out=tmp_path / "other")
    assert done.figures["step"] == 2


def test_where_nothing_fits_it_says_so(tmp_path):
    with pytest.raises(InputError, match="even with one image at a time"):
        funmatch.distill(**TINY | {"side": 32, "steps": 2, "student": Greedy(0)}, out=tmp_path / "run")


def test_other_errors_are_no_lack_of_memory():
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert oom.halves(20) == [10, 5, 3, 2, 1]


def test_a_teacher_in_pieces_says_the_same(tmp_path):
    sizes = []

    class Asked(nn.Module):
        num_classes = 10

        def __init__(self) -> None:
            super().__init__()
            self.net = load("fashion-mini-teacher").net

        def forward(self, views):
            sizes.append(len(views))
            return self.net(views)

    told = TINY | {"steps": 3, "teacher": Asked(), "side": 32, "teacher_precision": "fp32"}
    whole = funmatch.distill(**told, out=tmp_path / "whole")
    sizes.clear()
    pieces = funmatch.distill(**told, teacher_batch=6, out=tmp_path / "pieces")
    assert sizes.count(5) + sizes.count(6) >= 3 * 3, "16 images are 5, 5 and 6"
    assert abs(whole.figures["kl"] - pieces.figures["kl"]) < 1e-4
    with pytest.raises(InputError, match="teacher_batch must be at least 1"):
        Distill.checked(**told | {"teacher": ("x",), "data": ("x",), "student": "x"}, teacher_batch=0, out=tmp_path)


def resolved(out: Path, student: Classifier, device: str = "cpu", **knobs) -> dict[str, str]:
    config = Distill(data=("x",), teacher=("x",), student="x", steps=knobs.get("steps", 5000), out=out, **{
        name: value for name, value in knobs.items() if name != "steps"
    })  # fmt: skip
    return acceleration.resolve_auto(config, config.steps or 0, 32, student, torch.device(device))


def test_what_auto_means(tmp_path, monkeypatch):
    monkeypatch.setattr(acceleration.devices, "teacher_precisions", lambda *_: ("bf16", "fp32"))
    monkeypatch.setattr(acceleration, "known_step_seconds", lambda *_, **_native: {"fp32": 2.0, "bf16": 1.0})
    monkeypatch.setattr(acceleration.norms, "why_unavailable", lambda: "")
    grouped = load("resnetv2_50x1_bit", classes=10)
    assert resolved(tmp_path, grouped) == {"precision": "bf16", "compile": "native"}
    assert resolved(tmp_path, grouped, steps=100) == {"precision": "fp32", "compile": "native"}, (
        "too short to be measured"
    )
    assert resolved(tmp_path, grouped, precision="fp32", compile="off") == {}, "said is said"
    small = load("fashion-mini-student")
    assert resolved(tmp_path, small)["precision"] == "fp32"
    monkeypatch.setattr(acceleration, "known_step_seconds", lambda *_, **_native: {"fp32": 1.05, "bf16": 1.0})
    assert resolved(tmp_path, grouped)["precision"] == "fp32", "not clearly faster"
    monkeypatch.setattr(acceleration.norms, "why_unavailable", lambda: "no compiler")
    assert resolved(tmp_path, grouped)["compile"] == "off"


def test_what_auto_means_on_an_accelerator(tmp_path):
    batched, small = load("resnet18", classes=10), load("fashion-mini-student")
    told = {"precision": "bf16", "device": "cuda"}
    assert resolved(tmp_path, batched, **told)["compile"] == "on"
    assert resolved(tmp_path, batched, steps=1000, **told)["compile"] == "off", "too short to be won back"
    assert resolved(tmp_path, small, **told)["compile"] == "off"


def test_a_run_resumes_as_it_began(tmp_path, monkeypatch):
    monkeypatch.setattr(acceleration, "known_step_seconds", lambda *_, **_native: {"fp32": 2.0, "bf16": 1.0})
    grouped = load("resnetv2_50x1_bit", classes=10)
    for then, now in (
        ({"precision": "bf16", "compile": "on"}, {"precision": "bf16", "compile": "on"}),
        ({"precision": "fp32", "compile": "off"}, {"precision": "fp32", "compile": "off"}),
        ({"precision": "bf16"}, {"precision": "bf16", "compile": "auto"}),  # older than that knob: not compiled
    ):
        (tmp_path / "config.json").write_text(json.dumps({"verb": "distill", "knobs": then, "facts": {}}))
        assert resolved(tmp_path, grouped) == now
    assert run_folder.options_of(tmp_path / "none") == {}


def test_who_cuts_views_stays_who_it_was(tmp_path, monkeypatch, capsys):
    class Split:
        index = np.array([(80, 80)], [("height", "<i4"), ("width", "<i4")])

    config = Distill(data=("x",), teacher=("x",), student="x", steps=1, out=tmp_path)
    monkeypatch.setattr(acceleration.resample, "why_unavailable", lambda: "")
    assert acceleration.crop_kernel(config, Split) == {"views": "native"}
    for facts, wanted in (({}, "torch"), ({"views": "torch"}, "torch"), ({"views": "native"}, "native")):
        (tmp_path / "config.json").write_text(
            json.dumps({"verb": "distill", "knobs": {}, "facts": {"data": "x"} | facts})
        )
        assert acceleration.crop_kernel(config, Split) == {"views": wanted}
    monkeypatch.setattr(acceleration.resample, "why_unavailable", lambda: "no compiler")
    assert acceleration.crop_kernel(config, Split) == {"views": "native"}
    assert "started with the native crop kernel, which is unavailable now (no compiler)" in capsys.readouterr().err
    (tmp_path / "config.json").unlink()
    assert acceleration.crop_kernel(config, Split) == {"views": "torch"}
    monkeypatch.setattr(acceleration.resample, "why_unavailable", lambda: pytest.fail("small images are cut by torch"))
    Split.index = np.array([(64, 64)], Split.index.dtype)
    assert acceleration.crop_kernel(config, Split) == {"views": "torch"}


@compiler
@pytest.mark.usefixtures("small_ones_too")
def test_a_teacher_with_native_kernels_is_recorded_and_missed(tmp_path, monkeypatch, capsys):
    told = TINY | {
        "teacher": Grouped(),
        "side": 32,
        "steps": 4,
        "allow_weak_teacher": True,
        "teacher_precision": "fp32",
    }
    whole = funmatch.distill(**told, out=tmp_path / "whole")
    (form,) = (record["form"] for record in run_folder.Run(whole.folder).metrics.read() if record["event"] == "teacher")
    assert form["native"]
    plain = funmatch.distill(**told, compile="off", out=tmp_path / "plain")
    (form,) = (record["form"] for record in run_folder.Run(plain.folder).metrics.read() if record["event"] == "teacher")
    assert not form["native"]
    (whole.folder / "result.json").unlink()
    capsys.readouterr()
    monkeypatch.setattr(acceleration.norms, "why_unavailable", lambda: "gone")
    funmatch.distill(**told, out=tmp_path / "whole")
    assert "started with native CPU kernels for teacher python:Grouped, which are unavailable now (gone)" in (
        capsys.readouterr().err
    )


def test_measuring_leaves_no_trace(monkeypatch, tmp_path):
    monkeypatch.setenv("FUNMATCH_CACHE", str(tmp_path))
    student = load("test_resnet", classes=10)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    state = torch.get_rng_state()
    seconds = acceleration.known_step_seconds(student, 32, 4)
    assert seconds == acceleration.known_step_seconds(student, 32, 4), "measured once"
    assert set(seconds) == {"fp32", "bf16"}
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())
    assert all(parameter.grad is None for parameter in student.parameters())


def test_what_cannot_be_compiled_is_computed_as_it_is(tmp_path, monkeypatch, capsys):
    def failing(*_, **__):
        def call(_views):
            raise RuntimeError("no compiler here\nand much more")

        return call

    plain = funmatch.distill(**TINY, steps=3, compile="off", out=tmp_path / "off", teacher_precision="fp32")
    monkeypatch.setattr(torch, "compile", failing)
    capsys.readouterr()
    on = funmatch.distill(**TINY, steps=3, compile="on", out=tmp_path / "on", teacher_precision="fp32")
    told = capsys.readouterr().err
    assert told.count("failed (no compiler here); training it uncompiled") == 1
    assert weights(plain.folder) == weights(on.folder)


@pytest.mark.slow
def test_compiled_networks_compute_the_same_and_twice_to_the_same_bits(tmp_path):
    told = COMPILED | {"schedule": "constant", "warmup_steps": 0}
    whole = funmatch.distill(**told, out=tmp_path / "whole")
    plain = funmatch.distill(**told | {"compile": "off"}, out=tmp_path / "x")
    assert losses(whole) == pytest.approx(losses(plain), rel=1e-4)
    again = funmatch.distill(**told, out=tmp_path / "again")
    assert weights(whole.folder) == weights(again.folder)


@pytest.mark.parametrize(
    "told", [pytest.param(COMPILED, marks=pytest.mark.slow), pytest.param(NATIVE, marks=compiler)], ids=["on", "native"]
)
@pytest.mark.usefixtures("small_ones_too")
def test_a_compiled_run_that_was_stopped_ends_with_the_same_bits(tmp_path, monkeypatch, told):
    whole = funmatch.distill(**told, out=tmp_path / "whole")
    real = checkpoint.save

    def stopping(place, tensors, state):
        real(place, tensors, state)
        if state.step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", stopping)
        with pytest.raises(KeyboardInterrupt):
            funmatch.distill(**told, out=tmp_path / "run")
    again = funmatch.distill(**told | {"compile": "auto"}, out=tmp_path / "run")
    assert weights(whole.folder) == weights(again.folder)


def test_teachers_in_pieces():
    views = {32: torch.rand(7, 3, 32, 32)}

    class Member:
        side, share = 32, 1.0
        frozen = nn.Identity()

        def logits(self, views):
            assert len(views) <= 3
            return views.mean((2, 3))

    assert torch.equal(TeacherEnsemble([Member()], chunk=3)(views), views[32].mean((2, 3)))  # pyrefly: ignore


@compiler
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.usefixtures("small_ones_too")
def test_native_kernels_train_as_torch_does_and_twice_bitwise_the_same(tmp_path, capsys, precision):
    told = NATIVE | {"precision": precision, "schedule": "constant", "warmup_steps": 0}
    own = funmatch.distill(**told, out=tmp_path / "own")
    assert "using native CPU kernels for GroupNorm" in capsys.readouterr().err
    again = funmatch.distill(**told, out=tmp_path / "again")
    assert weights(own.folder) == weights(again.folder)
    plain = funmatch.distill(**told | {"compile": "off"}, out=tmp_path / "plain")
    assert len(losses(own)) == 6
    assert losses(own) == pytest.approx(losses(plain), rel={"fp32": 1e-3, "bf16": 2e-2}[precision])
    assert weights(own.folder) != weights(plain.folder), "they round otherwise"


@pytest.mark.usefixtures("small_ones_too")
def test_without_a_compiler_a_student_is_computed_by_torch(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(acceleration.norms, "why_unavailable", lambda: "no compiler")
    funmatch.distill(**NATIVE | {"precision": "fp32", "steps": 1}, out=tmp_path / "run")
    assert (
        "native CPU kernels unavailable (no compiler); PyTorch's are slower and round differently"
        in capsys.readouterr().err
    )
