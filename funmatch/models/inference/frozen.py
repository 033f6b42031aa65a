"""The teacher: a classifier that never changes again, and so may be computed in the fastest form that is as good."""

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
MAX_KL = 1e-3  # nats of KL from the plain teacher, in the mean, up to which a faster form is as good
MIN_AGREEMENT = 0.995  # share of images on which both have the same first class
TIE_MARGIN = (MAX_KL / 2) ** 0.5
"""Of probability, up to which two classes are equally the first: so far a KL of `CLOSE` may move one (Pinsker)."""
CHUNK_IMAGES = 64  # images that the plain teacher is asked at a time
TIMED_IMAGES, TIMING_REPEATS = 16, 3
CLEARLY_FASTER = 1.1  # times as fast, for a layout to be preferred to the usual one
SMALL_NETWORK = 1_000_000  # parameters below which no other form is worth its rounding


@dataclass(frozen=True)
class InferenceMode:
    """How a frozen classifier computes.

    Attributes:
        folded: whether weight standardisation and BatchNorm are in its kernels.
        precision: of its arithmetic: fp32, bf16 or fp16. The head is fp32 in any.
        layout: of images in memory: channels_last or contiguous.
        compiled: whether by `torch.compile`, for batches of the size that comes first.
        native: whether its GroupNorms are computed by our own kernels, as far as they can be had.
    """

    folded: bool = True
    precision: str = "fp32"
    layout: str = "channels_last"
    compiled: bool = False
    native: bool = False

    def __str__(self) -> str:
        words = [self.precision, self.layout.replace("_", " ")]
        how = {"compiled": self.compiled, "own kernels": self.native}
        return ", ".join(
            [*(["folded"] if self.folded else []), *words, *(name for name, is_so in how.items() if is_so)]
        )

    def is_allowed(self, wish: "AllowedModes") -> bool:
        """Whether this is a form at all, and one that is allowed: a record of it may have been damaged."""
        flags = all(isinstance(flag, bool) for flag in (self.folded, self.compiled, self.native))
        words = isinstance(self.precision, str) and isinstance(self.layout, str)
        precisions = wish.precisions if len(wish.precisions) == 1 else ("fp32", *wish.precisions)
        allowed = self.compiled <= wish.compiled and self.native <= wish.native
        return flags and words and allowed and self.precision in precisions and self.layout in LAYOUTS


PLAIN = InferenceMode(folded=False)


class Frozen(nn.Module):
    """A classifier in evaluation mode for good, also after `.train()` on a parent, and without gradients."""

    def __init__(self, classifier: Classifier, form: InferenceMode = PLAIN) -> None:
        """Takes a classifier over: any other form than `PLAIN` changes its network for ever."""
        super().__init__()
        self.classifier = classifier.requires_grad_(False).eval()
        self.mode = form
        self.size = classifier.count_parameters()  # before what is fixed is folded away
        net = classifier.net
        if form.folded:
            net = classifier.net = fold(net)
        to_memory_format(net.to(DTYPES[form.precision]), LAYOUTS[form.layout])
        if form.native and not norms.why_unavailable():
            for norm in native_group_norms(use_native_kernels(net, taught_only=False)):
                norm.float()  # few numbers, which the kernels read as they are
        if form.precision != "fp32":
            inside = dict(net.named_modules())  # folding may have joined the head with something else
            for head in (inside[name] for name in head_names(net) if name in inside):
                # Logits of 16 bits are too coarse: 10.03 and 10.05 would be the same.
                head.float().register_forward_pre_hook(lambda _, given: tuple(value.float() for value in given))
        self.compiled: tuple[torch.Size, Callable[[Tensor], Any]] | None = None

    def train(self, mode: bool = True) -> Self:  # noqa: ARG002  (the signature is nn.Module's)
        return self

    @torch.no_grad()
    def forward(self, views: Tensor) -> Tensor:
        """Logits (n, classes) in fp32 of views (n, 3, side, side) in [0, 1], whatever autocast is on outside."""
        with torch.autocast(views.device.type, enabled=False):
            seen = self.classifier.normalize(views.float()).to(DTYPES[self.mode.precision])
            seen = seen.contiguous(memory_format=LAYOUTS[self.mode.layout])
            answer = self.net_for(seen)(seen)
        return getattr(answer, "logits", answer).float()

    def net_for(self, seen: Tensor) -> Callable[[Tensor], Any]:
        """The network, compiled where batches of this size are."""
        if not self.mode.compiled:
            return self.classifier.net
        if self.compiled is None:
            # "freezing" lets the compiler lay kernels out for the machine, since nobody will change them.
            compiled = torch.compile(self.classifier.net, dynamic=False, options={"freezing": True})
            self.compiled = (seen.shape, compiled)
        shape, compiled = self.compiled
        return compiled if seen.shape == shape else self.classifier.net


@dataclass(frozen=True)
class ParityCheck:
    """How a form answers beside the plain one.

    Attributes:
        form: which.
        images: compared.
        kl: KL(plain ‖ form), mean over images, nats.
        agreement: share of images with the same first class, or one that is as likely within `TIED`.
        failed: why it could not be computed, or None.
    """

    form: InferenceMode
    images: int
    kl: float
    agreement: float
    failed: str | None = None

    @property
    def good(self) -> bool:
        return not self.failed and self.kl <= MAX_KL and self.agreement >= MIN_AGREEMENT

    def __str__(self) -> str:
        told = self.failed or f"KL {self.kl:.1e}, agreement {100 * self.agreement:.1f} % on {self.images} images"
        return f"{self.form}: {told}"


@dataclass(frozen=True)
class AllowedModes:
    """What form a teacher should take.

    Attributes:
        precisions: that the machine has; the fastest that answers well is taken. One alone is taken whatever it costs.
        compiled: whether to compile.
        native: whether GroupNorm by our own kernels.
        first: the form that was best on this machine before, which is tried first.
    """

    precisions: tuple[str, ...] = ("fp32",)
    compiled: bool = False
    native: bool = False
    first: InferenceMode | None = None


def freeze(make: Callable[[], Classifier], views: Tensor, wish: AllowedModes) -> tuple[Frozen, list[ParityCheck]]:
    """Freezes a teacher in the fastest form that answers the first views as the plain one does.

    Args:
        make: gives the classifier, a new one each time it is called.
        views: of the first batch, (n, 3, side, side) in [0, 1], on the device where the teacher is to be.

    Returns:
        the frozen teacher, and the forms that were tried, in order; the last one is what was taken.
    """
    plain = Frozen(make().to(views.device))
    truth = torch.cat([plain(part) for part in views.split(CHUNK_IMAGES)])
    small = plain.size < SMALL_NETWORK
    tried: list[ParityCheck] = []
    del plain
    for form in candidate_modes(make, views[:TIMED_IMAGES], wish, small=small):
        frozen, check = try_mode(make, form, views, truth)
        tried.append(check)
        if frozen is not None and (check.good or (len(wish.precisions) == 1 and not check.failed)):
            return frozen, tried
    return Frozen(make().to(views.device)), [*tried, ParityCheck(PLAIN, len(views), 0.0, 1.0)]


def candidate_modes(
    make: Callable[[], Classifier], views: Tensor, wish: AllowedModes, *, small: bool
) -> Iterator[InferenceMode]:
    """The forms to try, the fastest first; each is measured, since machines differ."""
    if wish.first:
        yield wish.first
    precisions = ("fp32",) if small and len(wish.precisions) > 1 else wish.precisions
    seconds: dict[InferenceMode, float] = {}
    for precision in precisions:
        forms = [InferenceMode(precision=precision, layout=layout) for layout in LAYOUTS]
        seconds |= {forms[0]: 0.0} if small else time_layouts(make, forms, views)
    usual = [form for form in seconds if form.precision == "fp32"]
    least = CLEARLY_FASTER * min((seconds[form] for form in usual), default=float("inf"))
    # Others round more than fp32 does, so they have to be clearly faster.
    ranked = sorted(seconds, key=lambda form: seconds[form] * (1 if form.precision == "fp32" else CLEARLY_FASTER))
    for form in ranked:
        if wish.compiled:
            yield replace(form, compiled=True)
        if wish.native and form.precision in PRECISIONS:
            yield replace(form, layout="channels_last", native=True)  # the only one that the kernels know
        if seconds[form] <= least:
            yield form


def time_layouts(
    make: Callable[[], Classifier], forms: list[InferenceMode], views: Tensor
) -> dict[InferenceMode, float]:
    """Seconds for the views in the faster one of forms that differ in their layout; no end of them where both fail.

    The first one is the usual one, and the others have to be clearly faster.
    """
    seconds = {}
    try:
        frozen = Frozen(make().to(views.device), forms[0])
        for form in forms:
            frozen.mode = form
            to_memory_format(frozen.classifier.net, LAYOUTS[form.layout])
            frozen(views)
            seconds[form] = statistics.median(_seconds(frozen, views) for _ in range(TIMING_REPEATS))
    except InputError:
        raise
    except Exception:  # not every network can be computed in every form; who tries it will say why
        return {forms[0]: float("inf")}
    best = min(forms, key=lambda form: seconds[form] * (1 if form is forms[0] else CLEARLY_FASTER))
    return {best: seconds[best]}


def try_mode(
    make: Callable[[], Classifier], form: InferenceMode, views: Tensor, truth: Tensor
) -> tuple[Frozen | None, ParityCheck]:
    """A teacher in a form, and how it answers views whose plain answers are `truth`."""
    try:
        frozen = Frozen(make().to(views.device), form)
        answers = torch.cat([frozen(part) for part in views.split(len(views) if form.compiled else CHUNK_IMAGES)])
    except InputError:
        raise
    except Exception as error:  # compilers fail in as many ways as machines can be set up
        return None, ParityCheck(form, len(views), 0.0, 0.0, first_line(error))
    return frozen, check_parity(form, answers, truth)


def check_parity(form: InferenceMode, answers: Tensor, truth: Tensor) -> ParityCheck:
    """The check of answers (n, classes) against the plain teacher's."""
    if not truth.isfinite().all():
        return ParityCheck(form, len(truth), 0.0, 1.0)  # no form is to blame; who judges the teacher will say so
    distance = max(0.0, kl(answers, truth).mean().item()) if answers.isfinite().all() else float("inf")
    likely = truth.double().softmax(-1)
    first = likely.gather(-1, answers.argmax(-1, keepdim=True)).squeeze(-1)
    agreement = (first >= likely.amax(-1) - TIE_MARGIN).double().mean().item()
    return ParityCheck(form, len(truth), distance, agreement)


def _seconds(frozen: Frozen, views: Tensor) -> float:
    began = time.perf_counter()
    frozen(views).sum().item()  # which waits for the device
    return time.perf_counter() - began
