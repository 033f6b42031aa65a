"""Runs models on a stream of images: read and resized ahead in threads, computed in batches, in their order."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, repeat
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from funmatch.config.finished.predict import ImageReading
from funmatch.data.cache.scan import reason_of
from funmatch.data.jpeg import pick_decoder
from funmatch.data.limits import MAX_PIXELS, MAX_SCANS, Limits, is_of_machine
from funmatch.data.prefetch import prefetch_items
from funmatch.models.classifier import Classifier
from funmatch.models.inference.frozen import Frozen
from funmatch.models.inference.modes import InferenceMode
from funmatch.models.inference.native.layers import native_group_norms
from funmatch.models.inference.outputs import NEAR, is_close
from funmatch.ops.crops import stack_views
from funmatch.ops.native import norms
from funmatch.ops.view_spec import Preprocessing
from funmatch.runtime import devices, transfers
from funmatch.runtime.malloc import keep_freed_memory
from funmatch.shipping.sources.files import Decoding
from funmatch.training.student.trained_model import TrainedModel

FIRST_BATCH = 8
"""Images of the first batch, at most, so that the first rows come early."""

Outputs = Callable[[Tensor], Tensor]
"""Maps views (n, 3, side, side) in [0, 1] to a row for each."""


class Image(Protocol):
    """An image that is not read yet."""

    @property
    def path(self) -> str:
        """Its path, or its name."""
        ...

    def pixels(self, how: Decoding) -> np.ndarray:
        """Returns it as (height, width, 3) uint8; what it raises says why it cannot be read."""
        ...


@dataclass(frozen=True)
class Answers:
    """What models compute for a batch of images.

    Attributes:
        paths: of the images, (n,).
        reasons: for each why it cannot be read, or None.
        outputs: for each model its outputs of the images that can be read, (readable, …) float32 on the CPU.
    """

    paths: list[str]
    reasons: list[str | None]
    outputs: list[Tensor]


@dataclass(frozen=True)
class Network:
    """A model that is ready to compute.

    Attributes:
        outputs: what it computes, on the device.
        preprocessing: from an image to its views.
    """

    outputs: Outputs
    preprocessing: Preprocessing


@dataclass(frozen=True)
class _Views:
    paths: list[str]
    reasons: list[str | None]
    views: dict[Preprocessing, Tensor]


def decoding_of(config: ImageReading, trained: TrainedModel) -> Decoding:
    """Returns how images are decoded: as given, else as in the run, else as `evaluate` does."""
    knobs = trained.knobs
    # The run's own values: with another cap, large images would be other pixels than when it was evaluated.
    return Decoding(
        cap=config.cap or trained.cap,
        decoder=pick_decoder(config.decoder or knobs.get("decoder") or "auto"),
        limits=Limits(
            config.max_pixels or knobs.get("max_pixels") or MAX_PIXELS,
            config.max_scans or knobs.get("max_scans") or MAX_SCANS,
        ),
    )


def ready(
    trained: TrainedModel,
    device: torch.device,
    precision: str,
    outputs_of: Callable[[Classifier], Outputs] = lambda classifier: classifier,
) -> Network:
    """Makes a model ready: on its device, with its norms folded into its convolutions where that computes the same.

    Args:
        precision: fp32, bf16 or fp16, as `evaluate` computes.
        outputs_of: what of a classifier is computed; its logits by default.
    """
    classifier = trained.classifier.to(device)
    plain = outputs_of(classifier)
    if precision != "fp32":

        def cast(views: Tensor) -> Tensor:
            with devices.autocast(device, precision):
                return plain(views).float()

        return Network(cast, trained.preprocessing)
    native = device.type == "cpu" and any(native_group_norms(classifier.net)) and not norms.why_unavailable()
    side = trained.preprocessing.side
    # A generator of its own: drawing from torch's would change what a caller draws after this.
    probe = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.inference_mode():
        expected = plain(probe)
        try:
            folded = outputs_of(Frozen(copy.deepcopy(classifier), InferenceMode(native=native)).classifier)
            same = is_close(folded(probe), expected, NEAR)
        except Exception:  # a user's network may not allow to be copied or folded, in any way
            return Network(plain, trained.preprocessing)
    return Network(folded if same else plain, trained.preprocessing)


@torch.inference_mode()
def answer(
    networks: Sequence[Network], images: Iterable[Image], how: Decoding, batch: int, device: torch.device
) -> Iterator[Answers]:
    """Yields the outputs of networks for images, in batches and in order.

    At most two batches for each thread wait in memory, whatever the number of images.
    """
    preprocessings = list(dict.fromkeys(network.preprocessing for network in networks))

    def prepare(chunk: list[Image]) -> _Views:
        return _prepare(chunk, preprocessings, how)

    with keep_freed_memory(device):
        for each in prefetch_items(prepare, _chunks(images, batch), devices.spare_threads()):
            moved = {key: transfers.to_device(views, device) for key, views in each.views.items()}
            outputs = [network.outputs(moved[network.preprocessing]) for network in networks] if moved else []
            yield Answers(each.paths, each.reasons, [rows.float().cpu() for rows in outputs])


def _chunks(images: Iterable[Image], batch: int) -> Iterator[list[Image]]:
    waiting = iter(images)
    for size in chain([min(FIRST_BATCH, batch)], repeat(batch)):
        if not (chunk := list(islice(waiting, size))):
            return
        yield chunk


def _prepare(chunk: list[Image], preprocessings: Sequence[Preprocessing], how: Decoding) -> _Views:
    """Reads and resizes the images of a batch."""
    found: dict[Preprocessing, list[Tensor]] = {each: [] for each in preprocessings}
    reasons: list[str | None] = []
    for image in chunk:
        try:
            pixels = image.pixels(how)
            # torch warns about memory that it must not write to.
            tensor = torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy())
            views = [each.view(tensor) for each in preprocessings]
        except Exception as error:  # decoders raise many types
            if is_of_machine(error):
                raise
            reasons.append(reason_of(error))
            continue
        reasons.append(None)
        # Only now, so that all preprocessings have the same images.
        for each, view in zip(preprocessings, views, strict=True):
            found[each].append(view)
    stacked = {each: stack_views(views) for each, views in found.items() if views}
    return _Views([image.path for image in chunk], reasons, stacked)
