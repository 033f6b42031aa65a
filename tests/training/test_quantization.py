"""Training for INT8: what layers compute, resuming, plain students, and the options taken from a run."""

import json
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import timm
import torch
from make_images import FEW
from safetensors.torch import load_file
from torch import nn

import funmatch
from funmatch.cli import parse
from funmatch.errors import InputError
from funmatch.shipping.quantize import graph, static
from funmatch.shipping.quantize.scores import logits_of
from funmatch.shipping.runtimes import open_runtime
from funmatch.training.student.quantization import quantize_layers, strip_quantization
from funmatch.training.student.trained_model import open_trained_model

pytest.importorskip("torchao")
SMALL = {
    "student": "resnet10t", "student_kwargs": {"channels": (8, 16, 16, 24), "stem_width": 8, "drop_rate": 0.2},
    "side": 28, "batch": 16, "threads": 1, "log_every": 2, "eval_every": 6, "save_every": 2,
}  # fmt: skip


def levels(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Rounds to 256 levels from low to high, one of which is 0, in numpy."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / 255
    zero = np.round(-low / scale)
    return (np.clip(np.round(values / scale) + zero, 0, 255) - zero) * scale


def test_a_layer_computes_with_inputs_and_weights_of_8_bits():
    torch.manual_seed(0)
    layer = nn.Linear(6, 4)
    net = quantize_layers(nn.Sequential(layer)).train()
    views = torch.randn(32, 6)
    out = net(views).detach().numpy()
    weight, x = layer.weight.detach().numpy(), views.numpy()
    scale = np.abs(weight).max(1, keepdims=True) / 127
    expected = levels(x, x.min(), x.max()) @ (np.round(weight / scale) * scale).T + layer.bias.detach().numpy()
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_gradients_reach_weights_and_inputs_and_evaluation_moves_no_range():
    net = quantize_layers(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))).train()
    views = torch.rand(8, 3, 4, 4, requires_grad=True)
    net(views).square().sum().backward()
    assert views.grad is not None and views.grad.abs().sum() > 0  # noqa: PT018
    assert all(each.grad is not None and each.grad.abs().sum() > 0 for each in net.parameters())
    before = {name: tensor.clone() for name, tensor in net.state_dict().items() if "inputs" in name}
    net.eval()(100 * views)
    after = net.state_dict()
    moved = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    assert all(name.endswith("observer_enabled") for name in moved)


def test_stripping_gives_the_plain_network_back():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    views, names = torch.rand(2, 3, 4, 4), list(net.state_dict())
    expected = net(views)
    quantize_layers(net).train()(views)
    ranges = strip_quantization(net)
    assert torch.equal(net(views), expected)
    assert list(net.state_dict()) == names
    assert [type(each) for each in net] == [nn.Conv2d, nn.ReLU, nn.Flatten, nn.Linear]
    assert ranges["0"] == pytest.approx((views.min().item(), views.max().item()))


def test_weights_that_a_layer_standardises_are_rounded_as_they_are_used():
    torch.manual_seed(0)
    layer = timm.layers.StdConv2d(3, 4, 3, padding=0)
    net = quantize_layers(nn.Sequential(layer)).train()
    views = torch.rand(2, 3, 8, 8)
    used = nn.functional.batch_norm(
        layer.weight.reshape(1, 4, -1), None, None, training=True, momentum=0.0, eps=layer.eps
    ).reshape_as(layer.weight)
    scale = used.abs().amax((1, 2, 3), keepdim=True) / 127
    rounded = torch.from_numpy(levels(views.numpy(), 0, views.max().item())).float()
    expected = nn.functional.conv2d(rounded, (used / scale).round() * scale, layer.bias)
    torch.testing.assert_close(net(views), expected, atol=1e-4, rtol=1e-3)


def linear_layers() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.GELU(), nn.Linear(32, 10))


def convolutions() -> nn.Sequential:
    # Before a hard swish, which takes outputs that no layer's input has the range of.
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.Hardswish(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 10, 2)
    return nn.Sequential(*layers, nn.Flatten())


@pytest.mark.parametrize("build", [linear_layers, convolutions])
def test_the_exported_int8_model_agrees_with_the_rounded_network(tmp_path, build):
    """With trained ranges an INT8 model computes what the student computed in training."""
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    net = build()
    batches = [np.random.default_rng(0).random((32, 3, 4, 4), np.float32)]
    views = torch.from_numpy(batches[0])
    plain = net(views).detach().numpy()
    quantize_layers(net).train()(views)
    with torch.no_grad():
        expected = net.eval()(views).numpy()
    ranges = strip_quantization(net)
    with warnings.catch_warnings(action="ignore"):
        program = torch.onnx.export(net, (views[:2],), dynamo=True, verbose=False, dynamic_shapes=({0: "batch"},))
    assert program is not None
    program.save(str(tmp_path / "net.onnx"))
    found = graph.prepare(tmp_path / "net.onnx", tmp_path)
    # Calibrated on other images, so that only the trained ranges give the same numbers.
    minmax = static.calibrate(found, "minmax", [3 * batches[0]], tmp_path)
    differences = {}
    for name, each in {"minmax": minmax, "trained": static.with_trained(found, minmax, ranges)}.items():
        static.write_int8(found, each, tmp_path / f"{name}.onnx")
        differences[name] = np.abs(logits_of(open_runtime(tmp_path / f"{name}.onnx"), batches) - expected).max()
    # Biases are integers in INT8, which may move the input of the next layer by a level.
    assert differences["trained"] < 0.3 * np.abs(plain - expected).max()
    assert differences["trained"] < 0.1 * differences["minmax"]


@pytest.fixture(scope="module", name="run")
def finished_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "plain"
    funmatch.distill(FEW, "fashion-mini-teacher", out=out, steps=40, seed=3, **SMALL)
    return out


def words(run, out, *more: str) -> list[str]:
    return ["distill", str(run), "--quantize", "8", "--out", str(out), *more]


def test_options_are_the_runs_but_shorter_and_gentler(run, tmp_path):
    config = parse(words(run, tmp_path / "q"))
    record = json.loads((run / "config.json").read_text())["knobs"]
    assert (config.quantize, config.student, config.out) == (8, str(run), tmp_path / "q")
    assert config.teacher == ("fashion-mini-teacher",)
    assert config.steps == record["steps"] // 10
    assert config.lr == pytest.approx(record["lr"] / 10)
    assert (config.seed, config.batch, config.side) == (3, 16, 28)
    assert config.student_kwargs == ()  # the run's student brings its own
    # What the user sets counts more.
    config = parse(words(run, tmp_path / "q", "--epochs", "2", "--lr", "0.5", "--seed", "4"))
    assert (config.steps, config.epochs, config.lr, config.seed) == (None, 2, 0.5, 4)


def test_a_run_without_a_teacher_becomes_its_own(tmp_path):
    funmatch.train(FEW, out=tmp_path / "labels", steps=2, **SMALL)
    config = parse(words(tmp_path / "labels", tmp_path / "q"))
    assert config.teacher == (config.student,) == (str(tmp_path / "labels"),)


def go_on(run, out, steps=8, **more):
    config = parse(words(run, out, "--steps", str(steps), "--save-every", "2", "--eval-every", "4"))
    options = {name: getattr(config, name) for name in type(config).model_fields if config.moved(name)}
    return funmatch.distill(**options | more)


def test_a_run_that_is_stopped_and_resumed_changes_no_bit(run, tmp_path):
    go_on(run, tmp_path / "whole")

    def stop(event, step, _):
        if event == "step" and step >= 4:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        go_on(run, tmp_path / "stopped", on_event=stop)
    assert not (tmp_path / "stopped" / "result.json").exists()
    go_on(run, tmp_path / "stopped")
    first, second = (tmp_path / name for name in ("whole", "stopped"))
    for file in ("student.safetensors", "optimizer.safetensors"):
        tensors = [load_file(each / "checkpoints" / "step-000000008" / file) for each in (first, second)]
        assert tensors[0].keys() == tensors[1].keys()
        assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
    about = [json.loads((each / "student" / "config.json").read_text())["funmatch"] for each in (first, second)]
    assert about[0]["ranges"] == about[1]["ranges"]


def test_its_student_is_a_plain_network_with_ranges_beside_it(run, tmp_path):
    result = go_on(run, tmp_path / "q")
    folder = tmp_path / "q" / "student"
    net = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert not [name for name in net.state_dict() if "fake_quantize" in name]
    assert result.figures["parameters"] == sum(each.numel() for each in net.parameters())
    ranges = json.loads((folder / "config.json").read_text())["funmatch"]["ranges"]
    layers = [name for name, each in net.named_modules() if isinstance(each, nn.Conv2d | nn.Linear)]
    assert list(ranges) == layers
    assert all(low < high for low, high in ranges.values())


@pytest.mark.parametrize("verb", ["train", "finetune"])
def test_training_on_labels_rounds_too(tmp_path, verb):
    options = {"out": tmp_path / "q", "steps": 4, "quantize": 8, "batch": 16, "eval_every": 4, "threads": 1}
    if verb == "train":
        result = funmatch.train(FEW, **SMALL | options)
    else:
        result = funmatch.finetune(FEW, "fashion-mini-teacher", **options)
    net = timm.create_model(f"local-dir:{tmp_path / 'q' / 'student'}", pretrained=True)
    ranges = json.loads((tmp_path / "q" / "student" / "config.json").read_text())["funmatch"]["ranges"]
    assert list(ranges) == [name for name, each in net.named_modules() if isinstance(each, nn.Conv2d | nn.Linear)]
    assert result.figures["parameters"] == sum(each.numel() for each in net.parameters())
    saved = load_file(max((tmp_path / "q" / "checkpoints").glob("step-*")) / "student.safetensors")
    assert any("fake_quantize" in name or "observer" in name for name in saved)


@pytest.mark.slow
def test_kills_change_no_bit(run, tmp_path):
    more = ("--steps", "120", "--save-every", "10", "--eval-every", "40", "--val", "none")

    def command(name: str) -> subprocess.Popen:
        argv = [sys.executable, "-m", "funmatch", *words(run, tmp_path / name, *more)]
        return subprocess.Popen(argv, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    assert command("whole").wait() == 0
    for number in range(3):
        process, checkpoints = command("killed"), tmp_path / "killed" / "checkpoints"
        # Once it has come further than before, so that each kill is another one.
        while process.poll() is None and len([*checkpoints.glob(f"step-*{number + 2}0")]) == 0:
            time.sleep(0.02)
        process.kill()
        process.wait()
    assert command("killed").wait() == 0
    for file in ("student.safetensors", "optimizer.safetensors"):
        places = (tmp_path / name / "checkpoints" / "step-000000120" / file for name in ("whole", "killed"))
        one, other = map(load_file, places)
        assert [name for name, tensor in one.items() if not torch.equal(tensor, other[name])] == []


def test_an_unfinished_run_can_be_used_as_a_plain_network(run, tmp_path):
    def stop(event, step, _):
        if event == "step" and step >= 4:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        go_on(run, tmp_path / "q", on_event=stop)
    model = open_trained_model(str(tmp_path / "q"))
    assert model.step is not None
    assert model.classifier(torch.rand(1, 3, 28, 28)).shape == (1, 10)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--ema", "0.99"], "--quantize does not go with --ema"),
        (["--compile", "on"], "--quantize does not go with --compile on"),
        (["--quantize", "4"], "quantize"),
    ],
)
def test_options_that_contradict_each_other_are_refused(run, tmp_path, more, said, capsys):
    with pytest.raises((InputError, SystemExit)) as caught:
        parse(words(run, tmp_path / "q", *more)).check()
    assert said in f"{caught.value}{capsys.readouterr().err}"


def test_a_run_without_quantize_and_a_folder_without_a_run_are_refused(run, tmp_path):
    with pytest.raises(InputError, match="is a run; pass --quantize 8"):
        parse(["distill", str(run), "--out", str(tmp_path / "q")])
    with pytest.raises(InputError, match="there is no run in"):
        parse(words(tmp_path / "nothing", tmp_path / "q"))


def test_without_torchao_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization.pt2e", None)
    with pytest.raises(InputError, match=r"pip install 'funmatch\[ship\]'"):
        quantize_layers(nn.Sequential(nn.Linear(2, 2)))


def test_a_network_without_layers_is_refused():
    with pytest.raises(InputError, match="needs a student with convolutions or linear layers"):
        quantize_layers(nn.Sequential(nn.ReLU()))
