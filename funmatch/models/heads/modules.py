"""Defines heads that are more than a linear layer: the vote of the nearest training images, the nearest class mean."""

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funmatch.ops.embeddings import TEMPERATURE, share_out, vote

DOUBT = 1e-3
"""Probability that a vote leaves to all classes, evenly: a class without neighbours would have none. Where an image may
have several classes, it is left to both outcomes of each class."""


class NeighbourHead(nn.Module):
    """The weighted vote of the nearest training images, as of `embeddings.nearest_neighbours`.

    Its logits are the logarithms of the classes' shares in the vote, times `scale`; where an image may have several
    classes, and votes for all of them, the log-odds of the shares.

    Args:
        features: number of features.
        classes: number of classes.
        images: number of training images, whose features are a part of the head.
        neighbours: that vote.
        scale: factor of the logits.
        several: whether an image may have several classes: `labels` are then (images, classes) in {0, 1}.
    """

    def __init__(
        self, features: int, classes: int, images: int, neighbours: int, scale: float = 1.0, *, several: bool = False
    ) -> None:
        super().__init__()
        self.classes, self.neighbours, self.scale, self.several = classes, neighbours, scale, several
        self.register_buffer("known", torch.zeros(images, features))
        empty = torch.zeros(images, classes, dtype=torch.uint8) if several else torch.zeros(images, dtype=torch.int64)
        self.register_buffer("labels", empty)

    def forward(self, features: Tensor) -> Tensor:
        """Computes logits (n, classes) of features (n, d)."""
        known = self.known.float()
        similarity, places = (F.normalize(features.float(), dim=-1) @ known.T).topk(min(self.neighbours, len(known)))
        if self.several:
            return self.scale * log_odds(share_out((similarity / TEMPERATURE).softmax(-1), places, self.labels))
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
        } | ({"several": True} if self.several else {})  # fmt: skip


def log_shares(votes: Tensor) -> Tensor:
    """Returns the logarithms of the shares of votes (n, classes), each of which has a little of `DOUBT`."""
    shares = votes / votes.sum(-1, keepdim=True)
    return (shares * (1 - DOUBT) + DOUBT / votes.shape[-1]).log()


def log_odds(shares: Tensor) -> Tensor:
    """Returns the log-odds of shares (n, classes) in [0, 1] with a little of `DOUBT`, by which 0 and 1 are finite."""
    # σ of them is the share again, moved this little of the way to 1/2.
    return (shares * (1 - DOUBT) + DOUBT / 2).clamp(DOUBT / 2, 1 - DOUBT / 2).logit()


class CosineHead(nn.Module):
    """The cosines between features and the classes' means, times `scale`.

    Where an image may have several classes, `means` are the differences between the directions of a class's images and
    of all others, and `bias` the log-odds of the class's share of the images.

    Args:
        features: number of features.
        classes: number of classes.
        scale: factor of the cosines.
        several: whether an image may have several classes.
    """

    def __init__(self, features: int, classes: int, scale: float = 1.0, *, several: bool = False) -> None:
        super().__init__()
        self.scale, self.several = scale, several
        self.register_buffer("means", torch.zeros(classes, features))
        if several:
            self.register_buffer("bias", torch.zeros(classes))

    def forward(self, features: Tensor) -> Tensor:
        """Computes logits (n, classes) of features (n, d)."""
        logits = self.scale * (F.normalize(features.float(), dim=-1) @ self.means.float().T)
        return logits + self.bias.float() if self.several else logits

    def scaled(self, factor: float) -> Self:
        """Multiplies the logits by a factor, and returns the head."""
        self.scale *= factor
        if self.several:
            self.bias *= factor
        return self

    def arguments(self) -> dict[str, float]:
        """Returns the arguments with which it is built again."""
        classes, features = self.means.shape
        found = {"features": features, "classes": classes, "scale": self.scale}
        return found | ({"several": True} if self.several else {})


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
