"""Quantised ONNX models: their weights by numpy, their limit of what may be lost, and input that does not fit."""

import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from funmatch.errors import InputError, WorkFailed
from funmatch.shipping.quantize import gate, graph, static
from funmatch.shipping.quantize.quantize import How, quantize_onnx
from funmatch.shipping.quantize.scores import Images, logits_of
from funmatch.shipping.runtimes import open_runtime

onnx = pytest.importorskip("onnx")
numpy_helper = pytest.importorskip("onnx.numpy_helper")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
SIDE, CLASSES = 12, 6


class Net(nn.Module):
    """Three convolutions and a head; one channel may dwarf the others that the third convolution takes."""

    def __init__(self, dwarf: float = 1.0) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, 2)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.third = nn.Conv2d(8, 12, 3)
        self.head = nn.Linear(12, CLASSES)
        with torch.no_grad():
            # Large, and without influence: the range of the other channels is then a few of 256 steps.
            self.second.weight[0] *= dwarf
            self.second.bias[0] = dwarf
            self.third.weight[:, 0] = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.second(self.first(images - 0.5).relu()).relu()
        return self.head(self.third(hidden).relu().mean((2, 3)))

    @torch.no_grad()
    def centred(self, images: "Images") -> "Net":
        """Returns the network with another bias, so that the images are not all of one class."""
        self.head.bias -= self(torch.from_numpy(np.concatenate(list(images.batches)))).median(0).values
        return self


def export(net: nn.Module, path):
    """Exports a network, with a batch of any size, and returns the path."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            net.eval(), (torch.rand(2, 3, SIDE, SIDE),), dynamo=True, verbose=False, optimize=True,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},),
        )  # fmt: skip
    assert program is not None
    program.model.metadata_props["classes"] = "a b c"
    program.save(str(path), external_data=False)
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory, images):
    """A plain model, and one with a layer that INT8 ruins."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    plain, hard = Net().centred(images), Net(dwarf=300).centred(images)
    return {"plain": (plain, export(plain, folder / "p.onnx")), "hard": (hard, export(hard, folder / "h.onnx"))}


@pytest.fixture(scope="module", name="images")
def random_images() -> Images:
    rng = np.random.default_rng(0)
    # Each of another colour, so that they are told apart.
    colours = rng.random((4, 16, 3, 1, 1), np.float32)
    return Images([rng.random((16, 3, SIDE, SIDE), np.float32) * colour for colour in colours])


def labelled(net: nn.Module, images: Images) -> Images:
    """The images, with the classes that a network gives them as labels."""
    with torch.no_grad():
        labels = np.concatenate([net(torch.from_numpy(batch)).argmax(-1).numpy() for batch in images.batches])
    return Images(images.batches, labels)


def initializers(path) -> dict[str, np.ndarray]:
    return {each.name: numpy_helper.to_array(each) for each in onnx.load(str(path)).graph.initializer}


def test_weights_are_rounded_per_output_channel_as_numpy_rounds_them(models, images, tmp_path):
    net, path = models["plain"]
    result = quantize_onnx(path, tmp_path / "q.onnx", images, images, How(max_drop=100))
    stored = initializers(result.path)
    for name in ("first", "second", "third"):
        weight = net.get_submodule(name).weight.detach().numpy()
        scale = np.abs(weight).max((1, 2, 3)) / 127
        got = stored[f"{name}.weight_quantized"]
        assert got.dtype == np.int8
        np.testing.assert_allclose(stored[f"{name}.weight_scale"], scale, rtol=1e-6)
        expected = np.round(weight / scale[:, None, None, None])
        # A weight halfway between two numbers may go either way, since the scales differ in the last bit.
        assert np.abs(got - expected).max() <= 1
        assert (got != expected).mean() < 0.01


def test_outputs_stay_close_and_the_report_says_what_changed(models, images, tmp_path):
    net, path = models["plain"]
    known = labelled(net, images)
    result = quantize_onnx(path, tmp_path / "q.onnx", images, known, How(max_drop=100))
    plain, small = (logits_of(open_runtime(each), images.batches) for each in (path, result.path))
    assert 0 < np.abs(plain - small).max() < 0.1 * np.abs(plain).max()
    assert result.before.top1 == 1  # the labels are its own classes
    assert result.after.top1 == np.mean(small.argmax(-1) == known.labels)
    assert result.drop == pytest.approx(100 * (1 - result.after.top1))
    assert result.after.bytes == (tmp_path / "q.onnx").stat().st_size
    assert result.before.milliseconds
    assert result.after.milliseconds
    assert (result.layers, result.fp32) == (4, ())
    assert {each.key: each.value for each in onnx.load(str(result.path)).metadata_props}["classes"] == "a b c"


def test_ranges_are_those_that_agree_best_with_the_teacher(models, images, tmp_path):
    _, path = models["plain"]
    logits = logits_of(open_runtime(path), images.batches)
    result = quantize_onnx(path, tmp_path / "q.onnx", Images(images.batches, teacher=logits), images, How(max_drop=100))
    assert set(result.methods) == {"minmax", "percentile", "entropy"}
    assert result.methods[result.method] == max(result.methods.values())


def test_a_layer_that_8_bits_ruin_stays_in_fp32(models, images, tmp_path):
    net, path = models["hard"]
    loose = quantize_onnx(path, tmp_path / "loose.onnx", images, labelled(net, images), How(max_drop=100))
    assert loose.drop > 5  # else this test would prove nothing
    result = quantize_onnx(path, tmp_path / "q.onnx", images, labelled(net, images), How(max_drop=6))
    assert result.drop <= 6
    assert 0 < len(result.fp32) <= 2
    assert set(result.fp32) <= {"second", "third"}
    assert [each.layer for each in result.sensitivity[: len(result.fp32)]] == list(result.fp32)
    # What stays is stored as it was, and the others as bytes.
    stored = initializers(result.path)
    assert all(f"{name}.weight" in stored for name in result.fp32)
    assert "first.weight_quantized" in stored


def test_without_labels_the_limit_is_on_agreement_with_fp32(models, images, tmp_path):
    _, path = models["hard"]
    result = quantize_onnx(path, tmp_path / "q.onnx", images, images, How(max_drop=6))
    assert result.before.top1 is None
    assert result.drop == pytest.approx(100 * (1 - result.after.same))
    assert result.drop <= 6


def test_a_limit_that_cannot_be_kept_names_layers_and_the_way_out_and_writes_nothing(models, images, tmp_path):
    net, path = models["hard"]
    with pytest.raises(WorkFailed) as caught:
        quantize_onnx(
            path, tmp_path / "q.onnx", images, labelled(net, images), How(max_drop=-1, advice="Run `funmatch x`")
        )
    assert "--max-drop allows -1" in str(caught.value)
    assert "The most sensitive layers: " in str(caught.value)
    assert "Run `funmatch x`" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_interval_of_the_loss_is_that_of_paired_images(models, images, tmp_path):
    """Reckoned by Agresti and Min's formula from the two models' outputs."""
    net, path = models["hard"]
    known = labelled(net, images)
    assert known.labels is not None
    known.labels[::3] = (known.labels[::3] + 1) % CLASSES  # so that images are gained, too
    result = quantize_onnx(path, tmp_path / "q.onnx", images, known, How(max_drop=100))
    plain, small = (logits_of(open_runtime(each), images.batches) for each in (path, result.path))
    lost = np.array([before == label != after for before, after, label in
                     zip(plain.argmax(-1), small.argmax(-1), known.labels, strict=True)])  # fmt: skip
    gained = np.array([after == label != before for before, after, label in
                       zip(plain.argmax(-1), small.argmax(-1), known.labels, strict=True)])  # fmt: skip
    assert lost.sum() > 0 and gained.sum() > 0  # noqa: PT018
    assert (result.after.lost, result.after.gained, result.after.images) == (lost.sum(), gained.sum(), len(lost))
    # Half an image in each of four cases: the variance of −1, 0 and 1.
    values = np.concatenate([np.ones(lost.sum()), -np.ones(gained.sum())])
    total = len(lost) + 2
    mean, square = values.sum() / total, (len(values) + 1) / total
    half = 1.959964 * np.sqrt((square - mean**2) / total)
    assert result.drop_interval == pytest.approx((100 * (mean - half), 100 * (mean + half)), abs=1e-4)


@pytest.mark.parametrize(("limit", "warns"), [(1, True), (5, False)])
def test_a_limit_that_few_images_cannot_tell_is_warned_of(models, images, tmp_path, capsys, limit, warns):
    _, path = models["plain"]
    result = quantize_onnx(path, tmp_path / "q.onnx", images, images, How(bits=16, max_drop=limit))
    assert result.drop == 0
    # All of 64 images keep their class: Wilson's upper bound of the share that does not is z² / (n + z²).
    assert result.drop_interval == pytest.approx((0, 100 * 1.959964**2 / (64 + 1.959964**2)), abs=1e-4)
    text = capsys.readouterr()
    assert (f"too few images for --max-drop {limit}" in text.out + text.err) is warns


def test_half_precision_runs_on_a_cpu_with_the_same_inputs_and_outputs(models, images, tmp_path):
    net, path = models["plain"]
    result = quantize_onnx(path, tmp_path / "h.onnx", images, labelled(net, images), How(bits=16))
    plain, half = (logits_of(open_runtime(each), images.batches) for each in (path, result.path))
    assert half.dtype == np.float32
    np.testing.assert_allclose(half, plain, atol=5e-3 * np.abs(plain).max())
    assert {each.dtype for name, each in initializers(result.path).items() if name.endswith("weight")} == {
        np.dtype(np.float16)
    }


@pytest.mark.parametrize("most", [0, 1, 2, 3, 7, 20])
def test_the_fewest_layers_are_found_as_by_trying_all(most):
    for threshold in range(1, most + 3):
        found = gate.fewest(lambda count, threshold=threshold: count >= threshold, most)
        assert found == (threshold if threshold <= most else None)


def test_attention_networks_keep_everything_between_layers_in_fp32(tmp_path):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(3 * SIDE, 8), nn.Linear(8, CLASSES)

        def forward(self, images):
            hidden = self.one(images.transpose(1, 2).flatten(2))
            return self.two((hidden @ hidden.transpose(1, 2)).softmax(-1) @ hidden).mean(1)

    found = graph.prepare(export(Attention(), tmp_path / "a.onnx"), tmp_path)
    assert found.operations == graph.LAYERS
    # The products of two activations have no weights.
    assert [layer.name for layer in found.layers] == ["one", "two"]
    batch = np.random.default_rng(0).random((16, 3, SIDE, SIDE), np.float32)
    static.write_int8(found, static.calibrate(found, "minmax", [batch], tmp_path), tmp_path / "q.onnx")
    kinds = [node.op_type for node in onnx.load(str(tmp_path / "q.onnx")).graph.node]
    assert kinds.count("QuantizeLinear") == 2  # the inputs of the two layers


def test_a_file_that_exists_is_kept(models, images, tmp_path):
    target = tmp_path / "q.onnx"
    target.write_text("mine")
    with pytest.raises(InputError, match="exists already; choose another file"):
        quantize_onnx(models["plain"][1], target, images, images, How())
    assert target.read_text() == "mine"


def test_too_few_images_for_calibration(models, images, tmp_path):
    few = Images([images.batches[0][:3]])
    with pytest.raises(InputError, match="3 images for calibration, but at least 16"):
        quantize_onnx(models["plain"][1], tmp_path / "q.onnx", few, images, How())
    assert not list(tmp_path.iterdir())


def test_a_model_without_layers_or_quantised_already(models, images, tmp_path):
    class Nothing(nn.Module):
        def forward(self, images):
            return images.mean((2, 3)).sigmoid()

    with pytest.raises(InputError, match="has no layer to quantise"):
        quantize_onnx(export(Nothing(), tmp_path / "n.onnx"), tmp_path / "q.onnx", images, images, How())
    done = quantize_onnx(models["plain"][1], tmp_path / "q.onnx", images, images, How(max_drop=100)).path
    with pytest.raises(InputError, match="quantised already; give the fp32 model"):
        quantize_onnx(done, tmp_path / "r.onnx", images, images, How())


def test_without_onnx_runtime_the_extra_is_named(models, images, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match=r"pip install 'funmatch\[ship\]'"):
        quantize_onnx(models["plain"][1], tmp_path / "q.onnx", images, images, How())
    assert not list(tmp_path.iterdir())
