"""Chooses the real images on which an exported model is compared with PyTorch."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from funmatch.config.finished.model import WithImages
from funmatch.data.cache.stores import CachedSplit
from funmatch.runtime import devices
from funmatch.training import datasets, scoring
from funmatch.training.student.trained_model import TrainedModel


@dataclass(frozen=True)
class RealImages:
    """Some images of a split, and how a model sees them.

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

    def batches(self, *, uint8: bool = False) -> Iterator[np.ndarray]:
        """Yields (n, 3, side, side) views, float32 in [0, 1] or uint8."""
        how = self.model.preprocessing
        shape = how.side, how.short_side, self.batch
        method = {"squash": how.squash, "method": how.resample}
        for views, _ in scoring.central_batches(self.split, *shape, **method, workers=devices.spare_threads()):
            plain = views.contiguous()
            yield ((plain * 255).round().to(torch.uint8) if uint8 else plain).numpy()


def choose_images(config: WithImages, model: TrainedModel, count: int, names: tuple[str, ...]) -> RealImages:
    """Returns at most so many images of the first of some splits that there is, evenly spread over it.

    Args:
        config: names other data than the run's, or how it is read.
        model: the model that they are for.
        count: most images.
        names: of the splits, in order of preference.

    Raises:
        InputError: there are no images; the message says how to name some.
    """
    verb = model.run.config["verb"] if model.run else ""
    cache, _, _ = datasets.open_evaluation_data(config, model.name, verb, model.knobs)
    split = cache.splits[next((name for name in names if name in cache.splits), next(iter(cache.splits)))]
    return RealImages(split.subset(scoring.evenly_spread(len(split), count)), model, config.batch)
