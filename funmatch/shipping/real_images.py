"""Chooses the real images on which an exported model is compared with PyTorch, and calibrated."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from funmatch.config.finished.model import WithImages
from funmatch.data.cache.open_cache import Cache
from funmatch.data.cache.stores import CachedSplit
from funmatch.runtime import devices
from funmatch.shipping.runtimes import to_bytes
from funmatch.training import datasets
from funmatch.training.evaluation import scoring, subject
from funmatch.training.student.trained_model import TrainedModel


@dataclass(frozen=True)
class RealImages:
    """Some images of a split, and how a model sees them; iterated, their views in batches, in [0, 1].

    Attributes:
        split: the images.
        model: the model.
        batch: images at a time.
    """

    split: CachedSplit
    model: TrainedModel
    batch: int

    def __len__(self) -> int:
        return len(self.split)

    def __iter__(self) -> Iterator[np.ndarray]:
        return self.batches()

    def batches(self, *, uint8: bool = False) -> Iterator[np.ndarray]:
        """Yields (n, 3, side, side) views, float32 in [0, 1] or uint8."""
        how, workers = self.model.preprocessing, devices.spare_threads()
        for views, _ in scoring.central_batches(self.split, how, self.batch, workers=workers):
            plain = views.contiguous().numpy()
            yield to_bytes(plain) if uint8 else plain


@dataclass(frozen=True)
class RealData:
    """A data set from which images are chosen for a model.

    Attributes:
        cache: the data set.
        model: the model.
        batch: images at a time.
    """

    cache: Cache
    model: TrainedModel
    batch: int

    def choose(self, count: int, *names: str) -> RealImages:
        """Returns at most so many images of the first of the named splits that there is, evenly spread over it."""
        splits = self.cache.splits
        split = splits[next((name for name in names if name in splits), next(iter(splits)))]
        return RealImages(split.subset(scoring.evenly_spread(len(split), count)), self.model, self.batch)


def open_real_data(config: WithImages, model: TrainedModel) -> RealData:
    """Opens the images that options name, else those of the model's run.

    Raises:
        InputError: there are no images; the message says how to name some.
    """
    verb = model.run.config["verb"] if model.run else ""
    config = subject.with_own_task(config, model)
    cache, _, _ = datasets.open_evaluation_data(config, model.name, verb, model.knobs)
    return RealData(cache, model, config.batch)
