"""Freezes a teacher, and picks the fastest inference mode whose outputs match plain fp32."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from funmatch.errors import InputError, first_line
from funmatch.models.classifier import Classifier, to_memory_format
from funmatch.models.inference.fold import fold
from funmatch.models.inference.fp32_layers import convert
from funmatch.models.inference.modes import DTYPES, LAYOUTS, PLAIN, AllowedModes, InferenceMode
from funmatch.models.inference.native.layers import PRECISIONS, native_group_norms, use_native_kernels
from funmatch.models.inference.native.packed import pack_layers
from funmatch.models.inference.native.sums import fuse_sums
from funmatch.models.inference.outputs import logits_of
from funmatch.models.inference.parity import ParityCheck, compare
from funmatch.models.inference.reference import VIEWS, VIEWS_NEAR_LIMIT, FurtherViews, Reference, answer
from funmatch.models.inference.timing import CLEARLY_FASTER, time_layouts
from funmatch.models.inference.variants import with_variants
from funmatch.models.timm_models import head_modules
from funmatch.ops.native import norms
from funmatch.ops.native.attention import ProductAttention
from funmatch.ops.tasks.task import task_of

TIMED_IMAGES = 8
SMALL_NETWORK = 1_000_000
"""Number of parameters below which no other mode is worth its rounding."""


Variants = Callable[[Callable[[], Classifier], InferenceMode, Reference], Iterable[InferenceMode]]


class Frozen(nn.Module):
    """A classifier that stays in evaluation mode, even after `.train()` on a parent, and has no gradients.

    Args:
        classifier: taken over; any mode but `PLAIN` changes its network for good.
        mode: how it computes.

    Raises:
        UnknownLayers: the network has no layers of the names in `mode.fp32_layers`.

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
        self.input_dtype = DTYPES[mode.precision]
        if mode.fp32_layers and mode.precision != "fp32":
            self.input_dtype = convert(net, self.input_dtype, mode.fp32_layers)
        else:
            net.to(self.input_dtype)
        to_memory_format(net, LAYOUTS[mode.layout])
        if mode.native and not norms.why_unavailable():
            for norm in native_group_norms(use_native_kernels(net, training_only=False)):
                norm.float()  # the kernels read weights in fp32, whatever the images are in
        if mode.precision != "fp32":
            # Logits of 16 bits are too coarse: 10.03 and 10.05 would be the same.
            # Folding may have joined the head with a norm, under another name.
            for head in head_modules(net):
                head.float().register_forward_pre_hook(lambda _, inputs: tuple(value.float() for value in inputs))
        if mode.packed:
            self.pack(sums=mode.sums)
        self.compiled: tuple[set[torch.Size], Callable[[Tensor], Any]] | None = None

    def pack(self, *, sums: bool) -> None:
        """Lays the weights out for oneDNN, for good, as `InferenceMode.packed` says.

        Args:
            sums: as of `InferenceMode`, where there are any.
        """
        pack_layers(self.classifier.net)
        self.mode = replace(self.mode, packed=True, sums=sums and fuse_sums(self.classifier.net) > 0)

    def train(self, mode: bool = True) -> Self:  # noqa: ARG002  (the signature is nn.Module's)
        return self

    @torch.no_grad()
    def forward(self, views: Tensor) -> Tensor:
        """Computes logits, or the rows of a readout, ignoring autocast.

        Args:
            views: (n, 3, side, side) in [0, 1].

        Returns:
            (n, classes), or (n, width), in fp32.
        """
        # The mode alone decides the precision: under the student's autocast fp32 would silently become bf16.
        attention = ProductAttention() if self.mode.packed else nullcontext()
        with torch.autocast(views.device.type, enabled=False), attention:
            inputs = self.classifier.normalize(views.float()).to(self.input_dtype)
            inputs = inputs.contiguous(memory_format=LAYOUTS[self.mode.layout])
            output = self.net_for(inputs)(inputs)
        return (output if isinstance(output, Tensor) else logits_of(output, self.classifier.card.name)).float()

    def net_for(self, inputs: Tensor) -> Callable[[Tensor], Any]:
        """Returns the network, compiled if batches of this shape are."""
        plain = self.classifier.answer_net if self.classifier.readout else self.classifier.net
        if not self.mode.compiled:
            return plain
        if self.compiled is None:
            # "freezing" lets the compiler lay out kernels for this machine, since they never change.
            compiled = torch.compile(plain, dynamic=False, options={"freezing": True})
            self.compiled = ({inputs.shape}, compiled)
        # Other shapes, such as a last batch, run uncompiled: compiling each would take a minute.
        shapes, compiled = self.compiled
        return compiled if inputs.shape in shapes else plain

    def compile_for(self, views: Tensor, batches: Sequence[int]) -> None:
        """Compiles the network for batches of these sizes, if its mode is compiled.

        Args:
            views: at least as many as the largest batch, (n, 3, side, side) in [0, 1].
            batches: the first one is that of the first call, if there was one.
        """
        for size in batches:
            if self.compiled:
                shapes, _ = self.compiled
                shapes.add(torch.Size((size, *next(iter(shapes))[1:])))
            if self.mode.compiled:
                self(views[:size])


def freeze(
    make: Callable[[], Classifier],
    views: Tensor,
    allowed: AllowedModes,
    further: FurtherViews | None = None,
    variants: Variants | None = None,
) -> tuple[Frozen, list[ParityCheck]]:
    """Freezes a teacher in the fastest mode whose outputs on a run's first views match plain fp32.

    Modes of fp32 differ by its rounding alone, which the first batch shows. Those of 16 bits are compared on `VIEWS`
    views, or as many as are affordable (`Reference`), and where chance may decide, on up to `VIEWS_NEAR_LIMIT`.

    Args:
        make: returns the classifier, a new one in each call.
        views: of the first batch, (n, 3, side, side) in [0, 1], on the teacher's device.
        allowed: the modes to try.
        further: the views that follow; None for a run too short to be worth more than its first batch.
        variants: called with a mode of 16 bits that failed, before modes of fp32 are tried; yields others to try in its
            place.

    Returns:
        the frozen teacher, and the checks of the modes that were tried, in order; the last one is the teacher's.
    """
    reference, small = _reference(make, views, allowed, further)
    checks: list[ParityCheck] = []
    modes = candidate_modes(make, views[:TIMED_IMAGES], allowed, small=small)
    for mode in with_variants(modes, checks, lambda failed: variants(make, failed, reference) if variants else ()):
        frozen, check = judge_mode(make, mode, reference)
        checks.append(check)
        is_requested = len(allowed.precisions) == 1 and not check.failed
        if frozen is not None and (check.good or is_requested):
            return frozen, checks
    return Frozen(make().to(views.device)), [*checks, ParityCheck(PLAIN, len(views), 0.0, 1.0)]


def _reference(
    make: Callable[[], Classifier], views: Tensor, allowed: AllowedModes, further: FurtherViews | None
) -> tuple[Reference, bool]:
    """Computes plain fp32's answers; returns them, and whether the network is small."""
    plain, reference = Frozen(make().to(views.device)), Reference(views, further)
    small = plain.size < SMALL_NETWORK
    rounds = set(precisions_to_try(allowed, small=small)) != {"fp32"}
    reference.extend(lambda: plain, VIEWS if rounds else len(views))
    # Freed on return, before the next one is built: two large teachers at once may not fit into memory.
    return reference, small


def precisions_to_try(allowed: AllowedModes, *, small: bool) -> tuple[str, ...]:
    """Returns the precisions among which the fastest is chosen: of a small network fp32, unless another is wanted."""
    return ("fp32",) if small and len(allowed.precisions) > 1 else allowed.precisions


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

    def build(mode: InferenceMode) -> Frozen:
        return Frozen(make().to(views.device), mode)

    precisions = precisions_to_try(allowed, small=small)
    seconds: dict[InferenceMode, float] = {}
    for precision in precisions:
        # Packed weights are faster than either layout of plain ones, so that the usual one is enough beside them.
        layouts = [*LAYOUTS][:1] if allowed.packed else [*LAYOUTS]
        modes = [InferenceMode(precision=precision, layout=layout) for layout in layouts]
        fastest = min(seconds.values(), default=math.inf)
        timed = {} if small else time_layouts(build, modes, views, fastest, allowed)
        seconds |= timed or {modes[0]: 0.0}
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


def judge_mode(
    make: Callable[[], Classifier], mode: InferenceMode, reference: Reference
) -> tuple[Frozen | None, ParityCheck]:
    """Tries a mode as `try_mode` does, on more views where chance may decide."""
    frozen, check = try_mode(make, mode, reference)

    def plain() -> Frozen:
        nonlocal frozen
        frozen = None  # freed before the plain one is built: both at once may not fit into memory
        return Frozen(make().to(reference.first.device))

    if check.near_limit and reference.extend(plain, VIEWS_NEAR_LIMIT):
        return try_mode(make, mode, reference)
    return frozen, check


def try_mode(
    make: Callable[[], Classifier], mode: InferenceMode, reference: Reference
) -> tuple[Frozen | None, ParityCheck]:
    """Freezes a teacher in a mode and compares its answers with the plain teacher's, until more views say no more.

    Returns:
        the teacher, or None if it could not be computed; and the check.
    """
    try:
        frozen = Frozen(make().to(reference.first.device), mode)
        classes = getattr(frozen.classifier.readout, "classes", None)
        task, found = task_of(frozen.classifier.card.task), None
        check = ParityCheck(mode, 0, 0.0, 1.0)
        for views, expected in reference:
            # Compiled for the size of the first batch, so that it gets all views at once.
            rows = answer(frozen, views, whole=mode.compiled)
            found = compare(rows, expected, classes, task).joined(found)
            check = found.check(mode)
            if check.hopeless or check.is_rounding_of_fp32:
                break
        return frozen, check
    except InputError:
        raise
    except Exception as error:  # compilers fail in as many ways as machines can be set up
        return None, ParityCheck(mode, len(reference.first), 0.0, 0.0, first_line(error))
