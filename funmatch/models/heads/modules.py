"""Defines heads that are more than a linear layer: the vote of the nearest training images, the nearest class mean."""

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funmatch.ops.embeddings import TEMPERATURE, vote

DOUBT = 1e-3
"""Probability that a vote leaves to all classes, evenly: a class without neighbours would have none."""


class NeighbourHead(nn.Module):
    """The weighted vote of the nearest training images, as of `embeddings.nearest_neighbours`.

    Its logits are the logarithms of the classes' shares in the vote, times `scale`.

    Args:
        features: number of features.
        classes: number of classes.
        images: number of training images, whose features are a part of the head.
        neighbours: that vote.
        scale: factor of the logits.
    """

    def __init__(self, features: int, classes: int, images: int, neighbours: int, scale: float = 1.0) -> None:
        super().__init__()
        self.classes, self.neighbours, self.scale = classes, neighbours, scale
        self.register_buffer("known", torch.zeros(images, features))
        self.register_buffer("labels", torch.zeros(images, dtype=torch.int64))

    def forward(self, features: Tensor) -> Tensor:
        """Computes logits (n, classes) of features (n, d)."""
        known = self.known.float()
        similarity, places = (F.normalize(features.float(), dim=-1) @ known.T).topk(min(self.neighbours, len(known)))
        return self.scale * log_shares(vote(similarity, self.labels[places], self.classes, TEMPERATURE))

    def scaled(self, factor: float) -> Self:
        """Multiplies the logits by a factor, and returns the head."""
        self.scale *= factor
        return self

    def arguments(self) -> dict[str, float]:
        """Returns the arguments with which it is built again."""
        images, features = self.known.shape
        return {
            "features": features, "classes": self.classes, "images": images, "neighbours": self.neighbours,
            "scale": self.scale,
        }  # fmt: skip


def log_shares(votes: Tensor) -> Tensor:
    """Returns the logarithms of the shares of votes (n, classes), each of which has a little of `DOUBT`."""
    shares = votes / votes.sum(-1, keepdim=True)
    return (shares * (1 - DOUBT) + DOUBT / votes.shape[-1]).log()


class CosineHead(nn.Module):
    """The cosines between features and the classes' means, times `scale`.

    Args:
        features: number of features.
        classes: number of classes.
        scale: factor of the cosines.
    """

    def __init__(self, features: int, classes: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("means", torch.zeros(classes, features))

    def forward(self, features: Tensor) -> Tensor:
        """Computes logits (n, classes) of features (n, d)."""
        return self.scale * (F.normalize(features.float(), dim=-1) @ self.means.float().T)

    def scaled(self, factor: float) -> Self:
        """Multiplies the logits by a factor, and returns the head."""
        self.scale *= factor
        return self

    def arguments(self) -> dict[str, float]:
        """Returns the arguments with which it is built again."""
        classes, features = self.means.shape
        return {"features": features, "classes": classes, "scale": self.scale}


class LinearLayer(nn.Linear):
    """A linear layer behind a network whose own last layer cannot be replaced."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__(features, classes)

    def scaled(self, factor: float) -> Self:
        """Multiplies the logits by a factor, and returns the head."""
        with torch.no_grad():
            self.weight.mul_(factor)
            self.bias.mul_(factor)
        return self

    def arguments(self) -> dict[str, float]:
        """Returns the arguments with which it is built again."""
        return {"features": self.in_features, "classes": self.out_features}


OwnHead = NeighbourHead | CosineHead | LinearLayer
HEADS: dict[str, type[OwnHead]] = {"knn": NeighbourHead, "means": CosineHead, "linear": LinearLayer}
"""Heads by the word that saved models have for them."""
