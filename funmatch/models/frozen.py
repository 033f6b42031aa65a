"""The teacher: a classifier that never changes again."""

from typing import Self

import torch
from torch import Tensor, nn

from funmatch.models.classifier import Classifier


class Frozen(nn.Module):
    """A classifier in evaluation mode for good, also after `.train()` on a parent, and without gradients."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:  # noqa: ARG002  (the signature is nn.Module's)
        return self

    @torch.no_grad()
    def forward(self, views: Tensor) -> Tensor:
        return self.classifier(views)
