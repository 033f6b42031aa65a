"""Finds the few layers that carry most of a network's error in 16 bits, and whether keeping them in fp32 pays off."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from funmatch.errors import InputError, first_line
from funmatch.models.classifier import Classifier
from funmatch.models.inference.fp32_layers import lowered
from funmatch.models.inference.frozen import Frozen
from funmatch.models.inference.modes import DTYPES, InferenceMode
from funmatch.models.inference.parity import MAX_ERROR, MAX_KL, compare
from funmatch.models.inference.reference import Reference
from funmatch.models.inference.timing import CLEARLY_FASTER
from funmatch.models.timm_models import head_modules
from funmatch.ops.tasks.task import task_of
from funmatch.runtime.log import info
from funmatch.runtime.text import percent

IMAGES = 16
"""Views on which the error of each layer is measured."""
SECONDS = 15.0
"""Seconds of search, unless a small part of the run is longer."""
MAX_SHARE = 0.5
"""Largest share of the time that layers in fp32 may take: with more of them, the whole network may as well."""
SMALLEST_SHARE = 0.02
"""Share of the time of a layer that is not split any further."""
GOALS = (0.7, 0.35, 0.15)
"""Errors that are left, as multiples of what is allowed, tried one after the other: a few views give estimates."""
MAX_LAYERS = 24
"""Layers that stay in fp32, at most: more of them are no exception."""


@dataclass(frozen=True)
class Layer:
    """A layer, and what it costs.

    Attributes:
        name: in the network.
        error: of the outputs if only this layer computes in 16 bits, in multiples of what is allowed; may be infinite.
        share: of the network's time that it takes in fp32.
    """

    name: str
    error: float
    share: float


class Search:
    """Measures the error of single layers, one in 16 bits at a time in a network in fp32.

    Args:
        classifier: taken over.
        mode: the mode of 16 bits that failed.
        views: on which to measure, (n, 3, side, side).
        expected: plain fp32's answers to them, (n, width).
        seconds: most time.
    """

    def __init__(
        self, classifier: Classifier, mode: InferenceMode, views: Tensor, expected: Tensor, seconds: float
    ) -> None:
        # Without packed weights, which would stay those of one precision.
        self.frozen = Frozen(classifier, replace(mode, precision="fp32", packed=False, sums=False))
        self.dtype = DTYPES[mode.precision]
        self.net, self.views, self.expected = classifier.net, views, expected
        self.until = time.perf_counter() + seconds
        self.seconds = self._seconds_by_name()

    def error_of(self, name: str) -> float:
        """Returns the error of the answers if one layer computes in 16 bits, or the whole network for no name."""
        with self._lowered(name):
            rows = self.frozen(self.views)
        classes = getattr(self.frozen.classifier.readout, "classes", None)
        found = compare(rows, self.expected, classes, task_of(self.frozen.classifier.card.task))
        # Errors of layers add up in their squares, as those of independent numbers do; KL is such a square.
        kl = found.kl.mean().item() / MAX_KL
        return kl if found.error is None else max(kl, (found.error.mean().item() / MAX_ERROR) ** 2)

    def speedup(self) -> float:
        """Returns how many times as fast the whole network is in 16 bits."""
        times: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(3):  # interleaved, since others may use the machine
            times[False].append(self._timed())
            with self._lowered(""):
                times[True].append(self._timed())
        return min(times[False]) / min(times[True])

    def layers(self) -> list[Layer]:
        """Returns layers, the parts of those that carry much of the error, as far as there is time."""
        found = [self._measured(name) for name in self._parts_of("")]
        settled: set[str] = set()
        while time.perf_counter() < self.until:
            total = sum(layer.error for layer in found)
            open_ = [layer for layer in found if layer.name not in settled and layer.share > SMALLEST_SHARE]
            largest = max(open_, key=lambda layer: layer.error, default=None)
            if largest is None or largest.error < total / 20:
                break
            settled.add(largest.name)
            parts = [self._measured(name) for name in self._parts_of(largest.name)]
            # An error that arises between the parts is not theirs.
            if sum(part.error for part in parts) >= largest.error / 2:
                found = [layer for layer in found if layer is not largest] + parts
        return found

    def _lowered(self, name: str) -> AbstractContextManager[None]:
        layer, native = self.net.get_submodule(name), self.frozen.mode.native
        return lowered(self.net, layer, self.dtype, native=native)

    def _measured(self, name: str) -> Layer:
        return Layer(name, self.error_of(name), self.seconds[name] / self.seconds[""])

    def _parts_of(self, name: str) -> Iterator[str]:
        """Yields the names of the parts of a layer that are called and have weights; the head is fp32 anyway."""
        heads = head_modules(self.net)
        for key, module in self.net.get_submodule(name).named_children():
            own = f"{name}.{key}".removeprefix(".")
            if module in heads or not any(True for _ in module.parameters()):
                continue
            if own in self.seconds:
                yield own
            else:  # a list of modules, which is not called itself
                yield from self._parts_of(own)

    def _timed(self) -> float:
        began = time.perf_counter()
        self.frozen(self.views).sum().item()  # `item` waits for the device
        return time.perf_counter() - began

    def _seconds_by_name(self) -> dict[str, float]:
        """Returns the seconds of each module that is called, those of the network under ""."""
        seconds: dict[str, float] = {}
        began: dict[str, float] = {}
        device = self.views.device

        def now() -> float:
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            return time.perf_counter()

        def watch(name: str, module: nn.Module) -> list:
            def start(*_: object) -> None:
                began[name] = now()

            def stop(*_: object) -> None:
                seconds[name] = seconds.get(name, 0.0) + now() - began[name]

            return [module.register_forward_pre_hook(start), module.register_forward_hook(stop)]

        self.frozen(self.views)  # the first pass chooses kernels and allocates
        handles = [handle for name, module in self.net.named_modules() for handle in watch(name, module)]
        try:
            began[""] = now()
            self.frozen(self.views)
            # A readout calls the parts of the network, not the network.
            seconds[""] = now() - began[""]
        finally:
            for handle in handles:
                handle.remove()
        return seconds


def modes_with_fp32_layers(
    make: Callable[[], Classifier], mode: InferenceMode, reference: Reference
) -> Iterator[InferenceMode]:
    """Yields a mode of 16 bits with its most sensitive layers in fp32: few of them at first, then more.

    Each layer is measured in 16 bits by itself, layers with much of the error part by part, for `SECONDS` or as long as
    views of the run's share take. Nothing is yielded where layers in fp32 would take `MAX_SHARE` of the time, or the
    teacher would not be clearly faster than in fp32.

    Args:
        make: returns the classifier, a new one in each call.
        mode: a mode that failed.
        reference: the answers of plain fp32.
    """
    try:
        layers, whole, speedup = _measure(make, mode, reference)
    except InputError:
        raise
    except Exception as error:  # not every network runs with a part of it in another precision
        info(f"{mode}: its sensitive layers were not found ({first_line(error)})")
        return
    tried: set[tuple[str, ...]] = set()
    for kept in choices(layers, whole):
        share, names = sum(layer.share for layer in kept), tuple(sorted(layer.name for layer in kept))
        times = 1 / (share + (1 - share) / speedup)
        if share > MAX_SHARE or times < CLEARLY_FASTER or len(names) > MAX_LAYERS:
            return
        if names and names not in tried:
            tried.add(names)
            found = replace(mode, fp32_layers=names)
            info(
                f"trying {found}: these layers take {percent(share)} of its time in fp32, which leaves it about "
                f"{times:.1f} times as fast as in fp32"
            )
            yield found


def _measure(
    make: Callable[[], Classifier], mode: InferenceMode, reference: Reference
) -> tuple[list[Layer], float, float]:
    """Returns the layers, the error of all of them together, and how many times as fast 16 bits are.

    No layers where 16 bits are not clearly faster. The network is freed on return, before the next one is built.
    """
    views, expected = next(iter(reference))
    seconds = max(SECONDS, reference.seconds_of_share)
    search = Search(make().to(views.device), mode, views[:IMAGES], expected[:IMAGES], seconds)
    speedup = search.speedup()
    layers = search.layers() if speedup >= CLEARLY_FASTER else []
    return layers, search.error_of(""), speedup


def choices(layers: list[Layer], whole: float) -> Iterator[list[Layer]]:
    """Yields the layers to keep for each of `GOALS`: those first that carry the most error for the time they take.

    Args:
        whole: the error with all layers in 16 bits.
    """
    ranked = sorted(layers, key=lambda layer: (layer.error / max(layer.share, 1e-6), -layer.share), reverse=True)
    errors = [layer.error for layer in ranked]
    finite = sum(error for error in errors if error != float("inf"))
    # Errors do not quite add up; what all of them make together is known.
    scale = whole / finite if finite > 0 and whole != float("inf") else 1.0
    left = [sum(errors[count:]) * scale for count in range(len(errors) + 1)]
    for goal in GOALS if layers else ():
        count = next(count for count, error in enumerate(left) if error <= goal * min(1.0, whole))
        yield ranked[:count]
