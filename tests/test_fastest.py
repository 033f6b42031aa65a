"""How networks are computed: what is compiled, in which arithmetic, and what happens where memory does not suffice."""

import json
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import funmatch
from funmatch import checkpoint, memory, runs
from funmatch.config import Distill
from funmatch.errors import InputError, lacks_memory
from funmatch.models.classifier import Classifier
from funmatch.models.load import load
from funmatch.models.teachers import Teachers
from funmatch.tasks import fastest

CPU = torch.device("cpu")
TINY = {
    "data": "fashion-mini", "teacher": "fashion-mini-teacher", "student": "fashion-mini-student", "threads": 1,
    "eval_every": 4, "batch": 16,
}  # fmt: skip


def weights(folder: Path) -> bytes:
    return (folder / "student" / "model.safetensors").read_bytes()


class Greedy(nn.Module):
    """A network that has no room for more than eight pictures at once while it is taught."""

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
    with pytest.raises(InputError, match=rf"with {micro or batch} pictures at once; --micro-batch {fits} fits \(tried"):
        funmatch.distill(**told, micro_batch=micro, out=tmp_path / "run")
    assert not list((tmp_path / "run").glob("checkpoints/step-*")), "nothing of it is saved"
    done = funmatch.distill(**told, micro_batch=fits, out=tmp_path / "other")
    assert done.figures["step"] == 2


def test_where_nothing_fits_it_says_so(tmp_path):
    with pytest.raises(InputError, match="even with one picture at a time"):
        funmatch.distill(**TINY | {"side": 32, "steps": 2, "student": Greedy(0)}, out=tmp_path / "run")


def test_other_errors_are_no_lack_of_memory():
    assert lacks_memory(torch.OutOfMemoryError("x"))
    assert lacks_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))
    assert not lacks_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert memory.halves(20) == [10, 5, 3, 2, 1]


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
    assert sizes.count(5) + sizes.count(6) >= 3 * 3, "16 pictures are 5, 5 and 6"
    assert abs(whole.figures["kl"] - pieces.figures["kl"]) < 1e-4
    with pytest.raises(InputError, match="teacher_batch must be at least 1"):
        Distill.checked(**told | {"teacher": ("x",), "data": ("x",), "student": "x"}, teacher_batch=0, out=tmp_path)


def settled(out: Path, student: Classifier, device: str = "cpu", **knobs) -> dict[str, str]:
    config = Distill(data=("x",), teacher=("x",), student="x", steps=knobs.get("steps", 5000), out=out, **{
        name: value for name, value in knobs.items() if name != "steps"
    })  # fmt: skip
    return fastest.settled(config, config.steps or 0, 32, student, torch.device(device))


def test_what_auto_means(tmp_path, monkeypatch):
    monkeypatch.setattr(fastest.devices, "teacher_precisions", lambda *_: ("bf16", "fp32"))
    monkeypatch.setattr(fastest, "known", lambda *_, **_quick: {"fp32": 2.0, "bf16": 1.0})
    monkeypatch.setattr(fastest.native, "compiler", lambda: "c++")
    grouped = load("resnetv2_50x1_bit", classes=10)
    assert settled(tmp_path, grouped) == {"precision": "bf16", "compile": "native"}
    assert settled(tmp_path, grouped, steps=100) == {"precision": "fp32", "compile": "native"}, (
        "too short to be measured"
    )
    assert settled(tmp_path, grouped, precision="fp32", compile="off") == {}, "said is said"
    small = load("fashion-mini-student")
    assert settled(tmp_path, small)["precision"] == "fp32"
    monkeypatch.setattr(fastest, "known", lambda *_, **_quick: {"fp32": 1.05, "bf16": 1.0})
    assert settled(tmp_path, grouped)["precision"] == "fp32", "not clearly faster"
    monkeypatch.setattr(fastest.native, "compiler", lambda: None)
    assert settled(tmp_path, grouped)["compile"] == "off"


def test_what_auto_means_on_an_accelerator(tmp_path):
    batched, small = load("resnet18", classes=10), load("fashion-mini-student")
    told = {"precision": "bf16", "device": "cuda"}
    assert settled(tmp_path, batched, **told)["compile"] == "on"
    assert settled(tmp_path, batched, steps=1000, **told)["compile"] == "off", "too short to be won back"
    assert settled(tmp_path, small, **told)["compile"] == "off"


def test_a_run_goes_on_as_it_began(tmp_path, monkeypatch):
    monkeypatch.setattr(fastest, "known", lambda *_, **_quick: {"fp32": 2.0, "bf16": 1.0})
    grouped = load("resnetv2_50x1_bit", classes=10)
    for then, now in (
        ({"precision": "bf16", "compile": "on"}, {"precision": "bf16", "compile": "on"}),
        ({"precision": "fp32", "compile": "off"}, {"precision": "fp32", "compile": "off"}),
        ({"precision": "bf16"}, {"precision": "bf16", "compile": "auto"}),  # older than that knob: not compiled
    ):
        (tmp_path / "config.json").write_text(json.dumps({"verb": "distill", "knobs": then, "facts": {}}))
        assert settled(tmp_path, grouped) == now
    assert runs.knobs_of(tmp_path / "none") == {}


def test_measuring_leaves_no_trace(monkeypatch, tmp_path):
    monkeypatch.setenv("FUNMATCH_CACHE", str(tmp_path))
    student = load("test_resnet", classes=10)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    state = torch.get_rng_state()
    seconds = fastest.known(student, 32, 4)
    assert seconds == fastest.known(student, 32, 4), "measured once"
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
    assert told.count("cannot be compiled here and is computed as it is: no compiler here") == 1
    assert weights(plain.folder) == weights(on.folder)


@pytest.mark.slow
def test_compiled_networks_compute_the_same_and_twice_to_the_same_bits(tmp_path):
    told = TINY | {"compile": "on", "save_every": 2, "log_every": 1, "precision": "fp32"}
    whole = funmatch.distill(**told, steps=6, schedule="constant", warmup_steps=0, out=tmp_path / "whole")
    plain = funmatch.distill(
        **told | {"compile": "off"}, steps=6, schedule="constant", warmup_steps=0, out=tmp_path / "x"
    )
    losses = [
        [r["loss"] for r in runs.Run(run.folder).metrics.read() if r["event"] == "step"] for run in (whole, plain)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    again = funmatch.distill(**told, steps=6, schedule="constant", warmup_steps=0, out=tmp_path / "again")
    assert weights(whole.folder) == weights(again.folder)


@pytest.mark.slow
def test_a_compiled_run_that_was_stopped_ends_with_the_same_bits(tmp_path, monkeypatch):
    told = TINY | {"compile": "on", "save_every": 2, "log_every": 1, "precision": "fp32", "steps": 6}
    whole = funmatch.distill(**told, out=tmp_path / "whole")
    real = checkpoint.save

    def stopping(place, step, *rest):
        real(place, step, *rest)
        if step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", stopping)
        with pytest.raises(KeyboardInterrupt):
            funmatch.distill(**told, out=tmp_path / "run")
    again = funmatch.distill(**told, out=tmp_path / "run")
    assert weights(whole.folder) == weights(again.folder)


def test_teachers_in_pieces():
    views = {32: torch.rand(7, 3, 32, 32)}

    class Member:
        side, share = 32, 1.0
        frozen = nn.Identity()

        def answers(self, views):
            assert len(views) <= 3
            return views.mean((2, 3))

    assert torch.equal(Teachers([Member()], at_once=3)(views), views[32].mean((2, 3)))  # pyrefly: ignore
