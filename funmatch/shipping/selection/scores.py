"""Computes how sure a teacher is of each image of a pool, and the code by which near copies are found."""

import hashlib
import os
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from funmatch.data.limits import is_of_machine
from funmatch.models.classifier import fingerprint, function_of
from funmatch.runtime.disk.files import cache_home
from funmatch.shipping.counter import Counter
from funmatch.shipping.inference import Answers, Network, answer
from funmatch.shipping.selection.copies import code
from funmatch.shipping.selection.memory import ROW, UNREADABLE, Memory
from funmatch.shipping.sources.files import Decoding, ImageFile
from funmatch.training.student.trained_model import TrainedModel

FORMAT = 1
FOLDER = "selections"
"""Folder of the cache with what teachers said of images."""


@dataclass(frozen=True)
class Scores:
    """What a teacher says of the images of a pool.

    Attributes:
        images: each once, in the order of their paths.
        rows: `ROW` of each.
    """

    images: list[ImageFile]
    rows: np.ndarray


@dataclass
class _Coded:
    """An image whose code is computed when it is decoded.

    Attributes:
        image: the image.
        state: of `_state_of` when it was found.
        code: see `copies.code`.
    """

    image: ImageFile
    state: tuple[int, int]
    code: int = 0

    @property
    def path(self) -> str:
        return self.image.path

    def pixels(self, how: Decoding) -> np.ndarray:
        """Decodes it; see `ImageFile.pixels`."""
        pixels = self.image.pixels(how)
        self.code = code(pixels)
        return pixels


def place_of(trained: TrainedModel, how: Decoding, precision: str) -> Path:
    """Returns the folder in which what a teacher says of images, seen in this way, is kept."""
    classifier = trained.classifier
    parts = FORMAT, fingerprint(classifier), function_of(classifier), trained.preprocessing, how, precision
    return cache_home() / FOLDER / hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def score(
    images: Iterable[ImageFile],
    network: Network,
    how: Decoding,
    batch: int,
    device: torch.device,
    place: Path,
    counter: Counter,
) -> Scores:
    """Computes what a teacher says of image files, and takes what it said of the same files before from `place`.

    Args:
        images: any number; a path that comes again is left out.
        network: gives logits.
        how: how images are decoded.
        batch: images per forward pass.
        device: of the network.
        place: of `place_of`; each batch is added to it as it is computed.
        counter: counts the images.
    """
    wanted: dict[str, ImageFile] = {}
    waiting: deque[_Coded] = deque()
    with Memory(place) as memory:

        def new_ones() -> Iterator[_Coded]:
            for image in images:
                if image.path in wanted:
                    continue
                wanted[image.path] = image
                coded = _Coded(image, _state_of(image))
                known = memory.find(image.path, coded.state)
                if known is None:
                    waiting.append(coded)
                    yield coded
                else:
                    bad = memory.rows[known]["label"] == UNREADABLE
                    counter.add([image.path], ["could not be read before" if bad else None])

        for each in answer([network], new_ones(), how, batch, device):
            memory.add(each.paths, _rows_of(each, [waiting.popleft() for _ in each.paths]))
            counter.add(each.paths, each.reasons)
        paths = sorted(wanted)
        return Scores([wanted[path] for path in paths], memory.rows[[memory.places[path] for path in paths]])


def _rows_of(answers: Answers, coded: list[_Coded]) -> np.ndarray:
    rows = np.zeros(len(coded), ROW)
    rows["label"] = UNREADABLE
    for row, each in zip(rows, coded, strict=True):
        row["size"], row["changed"] = each.state
        row["code"] = each.code
    if answers.outputs:
        best = answers.outputs[0].softmax(-1).max(-1)
        readable = [reason is None for reason in answers.reasons]
        rows["label"][readable], rows["confidence"][readable] = best.indices.numpy(), best.values.numpy()
    return rows


def _state_of(image: ImageFile) -> tuple[int, int]:
    """Returns what changes with an image: size and time of its file, or size and digest of one inside a shard."""
    try:
        found = os.stat(image.path)
    except OSError:
        return _state_of_content(image)
    return found.st_size, found.st_mtime_ns


def _state_of_content(image: ImageFile) -> tuple[int, int]:
    try:
        content = image.read()
    except Exception as error:  # readers raise many types
        if is_of_machine(error):
            raise
        return -1, -1  # reading it again says why
    return len(content), int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), signed=True)
