"""Freezes a teacher, and picks the fastest inference mode whose outputs match plain fp32."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from funmatch.errors import InputError, first_line
from funmatch.models.classifier import Classifier, to_memory_format
from funmatch.models.inference.fold import fold
from funmatch.models.inference.native_layers import PRECISIONS, native_group_norms, use_native_kernels
from funmatch.models.timm_models import head_names
from funmatch.ops.distances import kl
from funmatch.ops.native import norms

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
MAX_KL = 1e-3
"""Largest mean KL divergence from the plain teacher, in nats, at which a mode counts as equal."""
MIN_AGREEMENT = 0.995
"""Least fraction of images on which both have the same first class."""
# By Pinsker's inequality a KL of MAX_KL moves a probability by at most this. Two classes that are nearer to each other
# are tied: which of them comes first is a matter of rounding.
TIE_MARGIN = (MAX_KL / 2) ** 0.5
CHUNK_IMAGES = 64
TIMED_IMAGES, TIMING_REPEATS = 16, 3
CLEARLY_FASTER = 1.1
"""Speed-up that is needed to prefer what is less usual: timings vary by a few per cent."""
SMALL_NETWORK = 1_000_000
"""Number of parameters below which no other mode is worth its rounding."""


@dataclass(frozen=True)
class InferenceMode:
    """How a frozen classifier computes.

    Attributes:
        folded: weight standardization and BatchNorm are folded into its kernels.
        precision: fp32, bf16 or fp16; the head is fp32 in any.
        layout: memory layout of images, channels_last or contiguous.
        compiled: by `torch.compile`, for batches of the size of the first one.
        native: GroupNorms are computed by the native CPU kernels where these are available.
    """

    # Runs record these fields in config.json and read them back by name.
    folded: bool = True
    precision: str = "fp32"
    layout: str = "channels_last"
    compiled: bool = False
    native: bool = False

    def __str__(self) -> str:
        flags = {"compiled": self.compiled, "native kernels": self.native}
        words = [self.precision, self.layout.replace("_", " "), *(name for name, is_on in flags.items() if is_on)]
        return ", ".join(["folded", *words] if self.folded else words)

    def is_allowed(self, allowed: "AllowedModes") -> bool:
        """Returns whether this is a valid mode and one that is allowed; a record read from disk may be damaged."""
        has_flags = all(isinstance(flag, bool) for flag in (self.folded, self.compiled, self.native))
        has_words = isinstance(self.precision, str) and isinstance(self.layout, str)
        # fp32 is what all fall back to, unless a precision was requested, which is then the only one.
        precisions = allowed.precisions if len(allowed.precisions) == 1 else ("fp32", *allowed.precisions)
        has_kernels = self.compiled <= allowed.compiled and self.native <= allowed.native
        return has_flags and has_words and has_kernels and self.precision in precisions and self.layout in LAYOUTS


PLAIN = InferenceMode(folded=False)


class Frozen(nn.Module):
    """A classifier that stays in evaluation mode, even after `.train()` on a parent, and has no gradients.

    Args:
        classifier: taken over; any mode but `PLAIN` changes its network for good.
        mode: how it computes.

    Attributes:
        size: number of parameters, counted before folding removes some.
    """

    def __init__(self, classifier: Classifier, mode: InferenceMode = PLAIN) -> None:
        super().__init__()
        self.classifier = classifier.requires_grad_(False).eval()
        self.mode = mode
        self.size = classifier.count_parameters()
        net = classifier.net
        # Folded in fp32, before the conversion: folding kernels that are rounded already would round them twice.
        if mode.folded:
            net = classifier.net = fold(net)
        to_memory_format(net.to(DTYPES[mode.precision]), LAYOUTS[mode.layout])
        if mode.native and not norms.why_unavailable():
            for norm in native_group_norms(use_native_kernels(net, training_only=False)):
                norm.float()  # the kernels read weights in fp32, whatever the images are in
        if mode.precision != "fp32":
            # Logits of 16 bits are too coarse: 10.03 and 10.05 would be the same.
            by_name = dict(net.named_modules())
            # Folding may have joined the head with a norm, under another name.
            for head in (by_name[name] for name in head_names(net) if name in by_name):
                head.float().register_forward_pre_hook(lambda _, inputs: tuple(value.float() for value in inputs))
        self.compiled: tuple[torch.Size, Callable[[Tensor], Any]] | None = None

    def train(self, mode: bool = True) -> Self:  # noqa: ARG002  (the signature is nn.Module's)
        return self

    @torch.no_grad()
    def forward(self, views: Tensor) -> Tensor:
        """Computes logits, (n, classes) in fp32, of views (n, 3, side, side) in [0, 1], ignoring autocast."""
        # The mode alone decides the precision: under the student's autocast fp32 would silently become bf16.
        with torch.autocast(views.device.type, enabled=False):
            inputs = self.classifier.normalize(views.float()).to(DTYPES[self.mode.precision])
            inputs = inputs.contiguous(memory_format=LAYOUTS[self.mode.layout])
            output = self.net_for(inputs)(inputs)
        # Networks of Hugging Face return an object that holds the logits.
        return getattr(output, "logits", output).float()

    def net_for(self, inputs: Tensor) -> Callable[[Tensor], Any]:
        """Returns the network, compiled if batches of this shape are."""
        if not self.mode.compiled:
            return self.classifier.net
        if self.compiled is None:
            # "freezing" lets the compiler lay out kernels for this machine, since they never change.
            compiled = torch.compile(self.classifier.net, dynamic=False, options={"freezing": True})
            self.compiled = (inputs.shape, compiled)
        # Other shapes, such as a last batch, run uncompiled: compiling each would take a minute.
        shape, compiled = self.compiled
        return compiled if inputs.shape == shape else self.classifier.net


@dataclass(frozen=True)
class ParityCheck:
    """How far a mode's outputs are from those of plain fp32.

    Attributes:
        mode: the mode that was tried.
        images: number of images compared.
        kl: mean of KL(plain ‖ mode) over the images, nats.
        agreement: fraction of images with the same first class, or one that is tied with it (`TIE_MARGIN`).
        failed: why the mode could not be computed, or None.
    """

    mode: InferenceMode
    images: int
    kl: float
    agreement: float
    failed: str | None = None

    @property
    def good(self) -> bool:
        """Whether the mode counts as equal to plain fp32."""
        return not self.failed and self.kl <= MAX_KL and self.agreement >= MIN_AGREEMENT

    def __str__(self) -> str:
        result = self.failed or f"KL {self.kl:.1e}, agreement {100 * self.agreement:.1f} % on {self.images} images"
        return f"{self.mode}: {result}"


@dataclass(frozen=True)
class AllowedModes:
    """Which modes a teacher may take.

    Attributes:
        precisions: the precisions that the machine is fast in, of which the fastest that passes is taken; a single one
            is taken even if it fails the check.
        compiled: try `torch.compile`.
        native: try the native kernels for GroupNorm.
        first: the mode that was best on this machine before; it is tried first.
    """

    precisions: tuple[str, ...] = ("fp32",)
    compiled: bool = False
    native: bool = False
    first: InferenceMode | None = None


def freeze(make: Callable[[], Classifier], views: Tensor, allowed: AllowedModes) -> tuple[Frozen, list[ParityCheck]]:
    """Freezes a teacher in the fastest mode whose outputs on the first views match plain fp32.

    Args:
        make: returns the classifier, a new one in each call.
        views: of the first batch, (n, 3, side, side) in [0, 1], on the teacher's device.
        allowed: the modes to try.

    Returns:
        the frozen teacher, and the checks of the modes that were tried, in order; the last one is the teacher's.
    """
    plain = Frozen(make().to(views.device))
    reference = torch.cat([plain(part) for part in views.split(CHUNK_IMAGES)])
    small = plain.size < SMALL_NETWORK
    checks: list[ParityCheck] = []
    # Freed before the next one is built: two large teachers at once may not fit into memory.
    del plain
    for mode in candidate_modes(make, views[:TIMED_IMAGES], allowed, small=small):
        frozen, check = try_mode(make, mode, views, reference)
        checks.append(check)
        is_requested = len(allowed.precisions) == 1 and not check.failed
        if frozen is not None and (check.good or is_requested):
            return frozen, checks
    return Frozen(make().to(views.device)), [*checks, ParityCheck(PLAIN, len(views), 0.0, 1.0)]


def candidate_modes(
    make: Callable[[], Classifier], views: Tensor, allowed: AllowedModes, *, small: bool
) -> Iterator[InferenceMode]:
    """Yields the modes to try, the fastest first, as measured on this machine.

    Args:
        make, allowed: as of `freeze`.
        views: to time with, (n, 3, side, side).
        small: the network is small, so that only folded fp32 is tried.
    """
    # Yielded before anything is measured: if it passes, the rest of this generator never runs.
    if allowed.first:
        yield allowed.first
    precisions = ("fp32",) if small and len(allowed.precisions) > 1 else allowed.precisions
    seconds: dict[InferenceMode, float] = {}
    for precision in precisions:
        modes = [InferenceMode(precision=precision, layout=layout) for layout in LAYOUTS]
        seconds |= {modes[0]: 0.0} if small else time_layouts(make, modes, views)
    in_fp32 = [mode for mode in seconds if mode.precision == "fp32"]
    limit = CLEARLY_FASTER * min((seconds[mode] for mode in in_fp32), default=float("inf"))
    # Other precisions round more than fp32, so they have to be clearly faster.
    ranked = sorted(seconds, key=lambda mode: seconds[mode] * (1 if mode.precision == "fp32" else CLEARLY_FASTER))
    for mode in ranked:
        if allowed.compiled:
            yield replace(mode, compiled=True)
        if allowed.native and mode.precision in PRECISIONS:
            yield replace(mode, layout="channels_last", native=True)  # the only layout that the kernels support
        if seconds[mode] <= limit:
            yield mode


def time_layouts(
    make: Callable[[], Classifier], modes: list[InferenceMode], views: Tensor
) -> dict[InferenceMode, float]:
    """Times modes that differ in their layout only.

    Args:
        make: as of `freeze`.
        modes: the usual one first; others have to be clearly faster.
        views: to time with, (n, 3, side, side).

    Returns:
        the better mode and its seconds for the views, infinite if it could not be computed.
    """
    seconds = {}
    try:
        frozen = Frozen(make().to(views.device), modes[0])
        for mode in modes:
            frozen.mode = mode
            to_memory_format(frozen.classifier.net, LAYOUTS[mode.layout])
            frozen(views)  # the first pass in a layout chooses kernels and allocates
            seconds[mode] = statistics.median(_seconds(frozen, views) for _ in range(TIMING_REPEATS))
    except InputError:
        raise
    except Exception:  # not every network runs in every mode; `try_mode` reports why
        return {modes[0]: float("inf")}
    best = min(modes, key=lambda mode: seconds[mode] * (1 if mode is modes[0] else CLEARLY_FASTER))
    return {best: seconds[best]}


def try_mode(
    make: Callable[[], Classifier], mode: InferenceMode, views: Tensor, reference: Tensor
) -> tuple[Frozen | None, ParityCheck]:
    """Freezes a teacher in a mode and compares its logits of the views with the plain teacher's, (n, classes).

    Returns:
        the teacher, or None if it could not be computed; and the check.
    """
    try:
        frozen = Frozen(make().to(views.device), mode)
        # Compiled for the size of the first batch, so that it gets all views at once.
        logits = torch.cat([frozen(part) for part in views.split(len(views) if mode.compiled else CHUNK_IMAGES)])
    except InputError:
        raise
    except Exception as error:  # compilers fail in as many ways as machines can be set up
        return None, ParityCheck(mode, len(views), 0.0, 0.0, first_line(error))
    return frozen, check_parity(mode, logits, reference)


def check_parity(mode: InferenceMode, logits: Tensor, reference: Tensor) -> ParityCheck:
    """Compares a mode's logits with the plain teacher's, (n, classes) each."""
    # A teacher that gives NaN does so in any mode; the check of its accuracy reports it.
    if not reference.isfinite().all():
        return ParityCheck(mode, len(reference), 0.0, 1.0)
    # Rounding may leave a KL of zero slightly negative.
    divergence = max(0.0, kl(logits, reference).mean().item()) if logits.isfinite().all() else float("inf")
    probabilities = reference.double().softmax(-1)
    chosen = probabilities.gather(-1, logits.argmax(-1, keepdim=True)).squeeze(-1)
    agreement = (chosen >= probabilities.amax(-1) - TIE_MARGIN).double().mean().item()
    return ParityCheck(mode, len(reference), divergence, agreement)


def _seconds(frozen: Frozen, views: Tensor) -> float:
    began = time.perf_counter()
    frozen(views).sum().item()  # `item` waits for the device
    return time.perf_counter() - began
