"""Quantises an exported ONNX model to INT8 or fp16, within a limit of what it may lose."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from funmatch.errors import InputError, WorkFailed
from funmatch.ops.intervals import wilson
from funmatch.ops.tasks.task import MULTILABEL
from funmatch.runtime.disk.files import write_atomically
from funmatch.runtime.log import info
from funmatch.runtime.text import counted
from funmatch.shipping.quantize import gate as gates
from funmatch.shipping.quantize.gate import Gate, Sensitivity
from funmatch.shipping.quantize.graph import Graph, prepare
from funmatch.shipping.quantize.half import write_half
from funmatch.shipping.quantize.scores import Array, Images, Score, compare, latency, score
from funmatch.shipping.quantize.static import METHODS, TRAINED, Ranges, calibrate, with_trained, write_int8
from funmatch.shipping.runtimes import require

FEWEST = 16
"""Images for calibration at least: of fewer, the ranges would be those of these images."""
MARGIN = 0.01
"""By how much ranges from training must agree better with the teacher than those by calibration, to be kept."""
SHOWN = 5
"""Layers named in a message."""


@dataclass(frozen=True)
class QuantizeResult:
    """A quantised model, and what it lost and gained.

    Attributes:
        path: of the model.
        bits: 8 or 16.
        method: how ranges of activations were chosen (minmax, percentile, entropy, trained); None for 16 bits.
        methods: of each method tried, agreement with the teacher (or the fp32 model) on the images for calibration.
        fp32: names of the layers that stayed in fp32.
        layers: number of layers with weights.
        before, after: scores of the fp32 and the quantised model.
        drop: percentage points lost: of accuracy, or without labels of agreement with the fp32 model.
        drop_interval: its 95 % interval.
        max_drop: the limit for it.
        sensitivity: of each layer, the most sensitive first; empty where it was not measured.
    """

    path: Path
    bits: int
    method: str | None
    methods: dict[str, float]
    fp32: tuple[str, ...]
    layers: int
    before: Score
    after: Score
    drop: float
    drop_interval: tuple[float, float]
    max_drop: float
    sensitivity: tuple[Sensitivity, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns everything as JSON values."""
        plain = {name: value for name, value in vars(self).items() if name not in ("before", "after", "sensitivity")}
        return plain | {
            "path": str(self.path), "fp32": list(self.fp32), "drop_interval": list(self.drop_interval),
            "before": vars(self.before), "after": vars(self.after),
            "sensitivity": [vars(each) for each in self.sensitivity],
        }  # fmt: skip


@dataclass(frozen=True)
class How:
    """How a model is quantised.

    Attributes:
        bits: 8 for INT8, or 16 for fp16.
        max_drop: what may be lost, in percentage points: of accuracy, or without labels of agreement with the fp32
            model. Sensitive layers stay in fp32 until it holds.
        sensitivity: measure the sensitivity of every layer also where no layer has to stay in fp32.
        advice: sentence about what to do where the limit cannot be kept, such as the command that trains for INT8.
        threads: of the runtime; None: its own choice.
        trained: ranges of the inputs of layers, by the layers' names, from training for INT8; empty where there was
            none. They are tried beside those by calibration.
    """

    bits: int = 8
    max_drop: float = 1.0
    sensitivity: bool = False
    advice: str = ""
    threads: int | None = None
    trained: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def quantize_onnx(source: Path, target: Path, calibration: Images, validation: Images, how: How) -> QuantizeResult:
    """Quantises a model, and writes it if it loses no more than allowed.

    Args:
        source: an fp32 .onnx file, whose input is (n, 3, side, side).
        target: the file to write; it must not exist.
        calibration: images by which ranges are chosen; no labels are used. By agreement with their teacher's outputs,
            or with the fp32 model's where there are none, the best of three ways to choose ranges is kept.
        validation: images by which the loss is measured: their labels, or else agreement with the fp32 model.

    Raises:
        InputError: a library is missing, the target exists, there are too few images, or the model has no layer to
            quantise.
        WorkFailed: the limit cannot be kept; nothing is written.
    """
    _check(target, calibration, how.bits)
    with tempfile.TemporaryDirectory(prefix="funmatch-quantize-") as name:
        folder = Path(name)
        before, plain = score(source, validation, threads=how.threads)
        gate = Gate(validation, before, plain, how.max_drop, how.threads)
        work = folder / "quantized.onnx"
        if how.bits == 16:
            write_half(source, work)
            found = Found(after=gate.score(work))
        else:
            found = _int8(source, folder, work, calibration, gate, how)
        drop = gate.drop(found.after)
        if not gate.holds(found.after):
            raise WorkFailed(_missed(gate, found, how))
        if gate.is_too_coarse(found.after):
            info(_too_few(gate, found.after))
        # One image: what a student is for is to answer quickly.
        first = next(iter(validation.batches))[:1]
        scores = [_with_latency(*each, first, how.threads) for each in ((source, before), (work, found.after))]
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, work.read_bytes())
    facts = {name: value for name, value in vars(found).items() if name != "after"}
    return QuantizeResult(
        target, how.bits, before=scores[0], after=scores[1], drop=drop, drop_interval=gate.interval(found.after),
        max_drop=how.max_drop, **facts,
    )  # fmt: skip


@dataclass(frozen=True)
class Found:
    """What was found out about a quantised model: attributes of `QuantizeResult`."""

    after: Score
    method: str | None = None
    methods: dict[str, float] = field(default_factory=dict)
    layers: int = 0
    fp32: tuple[str, ...] = ()
    sensitivity: tuple[Sensitivity, ...] = ()


def _check(target: Path, calibration: Images, bits: int) -> None:
    """Raises `InputError` for what would fail after minutes of work."""
    for name in ("onnx", "onnxruntime"):
        require(name)
    if bits not in (8, 16):
        raise InputError(f"models are quantised to 8 or 16 bits, not {bits}")
    if target.exists():
        raise InputError(f"{target} exists already; choose another file, or remove it")
    count = sum(map(len, calibration.batches))
    if bits == 8 and count < FEWEST:
        raise InputError(
            f"{counted(count, 'image')} for calibration, but at least {FEWEST} are needed to know the ranges of "
            "activations; pass a larger --calibration, or data with more images"
        )


def _int8(source: Path, folder: Path, work: Path, calibration: Images, gate: Gate, how: How) -> Found:
    """Writes the INT8 model with the best ranges, and as many layers in fp32 as the gate needs."""
    graph = prepare(source, folder)
    ranges, methods = _best_ranges(graph, calibration, folder, how)
    write_int8(graph, ranges, work)
    after, fp32, found = gate.score(work), (), ()
    if how.sensitivity or not gate.holds(after):
        found = gates.measure_sensitivity(graph, ranges, calibration, folder, threads=gate.threads)
    if not gate.holds(after):
        info(f"INT8 loses {gate.drop(after):.2f} points, more than {gate.max_drop:g}; keeping layers in fp32")
        fp32, after = gates.keep_layers(graph, ranges, [each.layer for each in found], gate, work)
    return Found(after, ranges.method, methods, len(graph.layers), fp32, found)


def _best_ranges(graph: Graph, images: Images, folder: Path, how: How) -> tuple[Ranges, dict[str, float]]:
    """Tries every way to choose ranges; returns the best on the images for calibration, and the agreement of each."""
    _, plain = score(graph.path, images, threads=how.threads)
    reference = plain if images.teacher is None else images.teacher
    path, found, methods = folder / "method.onnx", [], {}
    tried = {method: calibrate(graph, method, images.batches, folder) for method in METHODS}
    if how.trained:
        tried[TRAINED] = with_trained(graph, tried["minmax"], how.trained)
    for method, ranges in tried.items():
        write_int8(graph, ranges, path)
        _, logits = score(path, images, plain, threads=how.threads)
        # KL where equal shares agree: of few images many ways have the same.
        column = compare(logits, reference, images.task)
        # fp32 between the layers costs speed, which a difference of a few images is not worth.
        margin = 0.0 if ranges.outputs else MARGIN
        found.append(((column["agreement"] - margin, -column["kl"]), ranges))
        methods[method] = column["agreement"]
        info(f"ranges by {method}: agreement {100 * column['agreement']:.2f} % on the images for calibration")
    _, best = max(found, key=lambda each: each[0])
    return best, methods


def _with_latency(path: Path, each: Score, batch: Array, threads: int | None) -> Score:
    return Score(**vars(each) | {"milliseconds": latency(path, batch, threads=threads)})


def _loss(gate: Gate, after: Score) -> str:
    """Says what a model loses, and how well the images tell it."""
    measured = "mean average precision" if gate.before.map is not None else "accuracy"
    what = measured if gate.before.accuracy is not None else "agreement with the fp32 model"
    low, high = gate.interval(after)
    return (
        f"{gate.drop(after):.2f} points of {what} on {counted(after.images, 'validation image')} "
        f"(95 % interval {low:.2f} … {high:.2f})"
    )


def _too_few(gate: Gate, after: Score) -> str:
    """Describes a limit that holds on images that are too few for it, with what else they tell."""
    low, high = wilson(after.same, after.images) or (0.0, 1.0)
    # The first class changes more often than accuracy does, and of few images it is the better known of the two.
    same = f"{100 * after.same:.1f} % of them keep their first class (95 % interval {100 * low:.1f} … {100 * high:.1f})"
    if gate.images.task is MULTILABEL:
        # Those of an image are not independent of each other, so that they have no interval.
        same = f"{100 * after.same:.1f} % of the decisions on their classes stay"
    return (
        f"WARNING: too few images for --max-drop {gate.max_drop:g}: it loses {_loss(gate, after)}; {same}. Evaluate "
        "it on more images, or pass other --data to the export"
    )


def _missed(gate: Gate, found: Found, how: How) -> str:
    """Describes a limit that cannot be kept."""
    name = "fp16" if how.bits == 16 else "INT8"
    kept = f", even with {counted(len(found.fp32), 'layer')} of {found.layers} in fp32" if found.fp32 else ""
    worst = ", ".join(each.layer for each in found.sensitivity[:SHOWN])
    layers = f". The most sensitive layers: {worst}" if worst else ""
    hint = f". {how.advice}" if how.advice else ""
    return (
        f"{name} loses {_loss(gate, found.after)}{kept}; --max-drop allows "
        f"{how.max_drop:g}{layers}{hint}. Or pass a larger --max-drop. Nothing was written"
    )
