"""Computes the features of a frozen backbone once per image, and caches them under a digest of what they depend on."""

import hashlib
import json

import numpy as np
import torch
from torch import Tensor

from funmatch.config import Head
from funmatch.data.cache.names import image_names
from funmatch.data.cache.open_cache import Cache
from funmatch.data.cache.stores import CachedSplit
from funmatch.errors import InputError
from funmatch.models.classifier import fingerprint, function_of
from funmatch.models.inference.features import Features, count_features
from funmatch.runtime.disk.files import cache_home
from funmatch.runtime.disk.parts import compute_in_parts, read_whole
from funmatch.runtime.log import info
from funmatch.training import datasets
from funmatch.training.evaluation import scoring
from funmatch.training.evaluation.scoring import EvalView
from funmatch.training.student.trained_model import TrainedModel

PART = 1024
"""Images whose features are computed between two writes to the disk."""
FOLDER = "features"
PURPOSE = "fit a head to"
SHOWN = 3
"""Images that a message names."""


class FrozenBackbone:
    """A backbone whose features are computed once, and then read.

    Attributes:
        digest: of its weights, and of what it computes with them.
        size: number of its features.
    """

    def __init__(self, trained: TrainedModel, view: EvalView) -> None:
        """Takes over a model, whose classifier moves to the view's device.

        Raises:
            InputError: it has no features.
        """
        classifier = trained.classifier
        self.name, self.view = trained.name, view
        self.size = count_features(classifier, view.side, PURPOSE)
        self.digest = f"{fingerprint(classifier.net)}-{function_of(classifier)}"
        self.network = Features(classifier.to(view.device), PURPOSE)

    def features(self, config: Head, cache: Cache, split: CachedSplit) -> Tensor:
        """Reads the features of a split's images, or computes and caches them.

        Args:
            config: with which the images were opened.

        Returns:
            (n, `size`) float32.

        Raises:
            InputError: some are not finite; their images are named.
        """
        view = self.view
        key = {
            "data": cache.key,
            "images": split.content,
            "backbone": self.digest,
            "view": [view.side, view.short_side, view.squash, view.resample],
            "precision": view.precision,
        }
        folder = cache_home() / FOLDER / hashlib.blake2b(json.dumps(key).encode(), digest_size=12).hexdigest()
        path, shape = folder / "features.npy", (len(split), self.size)
        found = read_whole(path, shape)
        if found is None:
            info(
                f"{self.name}: computing features of {len(split):,} {split.name} images once; they are kept in {folder}"
            )
            about = key | {"model": self.name, "split": split.name}
            found = compute_in_parts(path, shape, PART, lambda rows: self._compute(split, rows), split.name, about)
        else:
            info(f"{self.name}: features of {len(split):,} {split.name} images are those of an earlier start")
        features = torch.from_numpy(found)
        try:
            self._check_finite(features, config, split)
        except InputError:
            path.unlink()  # a fault of the machine may be the reason, which is not to be kept
            raise
        return features

    def _compute(self, split: CachedSplit, rows: range) -> np.ndarray:
        return scoring.predict(self.network, split.subset(np.arange(rows.start, rows.stop)), self.view).numpy()

    def _check_finite(self, features: Tensor, config: Head, split: CachedSplit) -> None:
        bad = (~features.isfinite().all(-1)).nonzero().flatten().tolist()
        if not bad:
            return
        some = split.subset(np.array(bad[:SHOWN]))
        named = image_names(config.data, datasets.read_options(config), datasets.cache_options(config), some)
        raise InputError(
            f"{self.name} has features that are not finite for {len(bad):,} of {len(split):,} {split.name} images, "
            f"e.g. {', '.join(named)}; its weights are damaged, or {self.view.precision} is too coarse (--precision)"
        )
