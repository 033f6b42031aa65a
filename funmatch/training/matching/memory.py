"""Keeps what matching features needs of earlier batches: a queue of the teachers' embeddings, and their statistics."""

import torch
from torch import Tensor, nn

from funmatch.models.inference.answers import Layout, Parts
from funmatch.ops.features.losses import normalize
from funmatch.runtime import distributed, env

LEAST_DEVIATION = 1e-6
"""Deviation of a dimension, as a share of the mean one, below which it counts as constant."""


class Memory(nn.Module):
    """The teachers' embeddings of the last batches, and mean and deviation of each dimension of their features.

    A batch has its place in the queue by its step, and a step reads all places but its own. So pieces of a batch see
    the same queue, and what it holds is a function of the steps, whatever became of their updates; checkpoints have it.

    Args:
        layout: of the teachers' answers.
        batch: images of a step, of all processes.
        queue: images in the queue; 0 for none.
    """

    def __init__(self, layout: Layout, batch: int, queue: int) -> None:
        super().__init__()
        self.layout, self.batch = layout, batch
        pooled, tokens = sum(layout.pooled), sum(layout.tokens)
        # One place more than it reads.
        places = -(-queue // batch) + 1 if queue else 0
        self.register_buffer("queue", torch.zeros(places, batch, pooled))
        self.register_buffer("pooled", torch.stack([torch.zeros(pooled), torch.ones(pooled)]))
        self.register_buffer("tokens", torch.stack([torch.zeros(tokens), torch.ones(tokens)]))

    def standardize(self, parts: Parts) -> Parts:
        """Returns the teachers' features with mean 0 and deviation 1 in each dimension, once `fit` was called."""
        return Parts(
            parts.logits,
            _standardized(parts.pooled, self.pooled, self.layout.pooled),
            _standardized(parts.tokens, self.tokens, self.layout.tokens),
        )

    def fit(self, rows: Tensor) -> None:
        """Measures mean and deviation of each dimension of answers, (n, width); of tokens over all of their places."""
        parts = self.layout.split(rows.double())
        self.pooled.copy_(_statistics(torch.cat(parts.pooled, 1)))
        if parts.tokens:
            self.tokens.copy_(_statistics(torch.cat(parts.tokens, 2).flatten(0, 1)))

    @torch.no_grad()
    def push(self, step: int, first_row: int, pooled: list[Tensor]) -> None:
        """Puts embeddings of some rows of a step in their place, those of all processes in each.

        Args:
            first_row: place of the first row in the global batch.
            pooled: of each teacher, (n, d).
        """
        # Each teacher's of length 1, so that the similarities of each can be told apart.
        rows = torch.cat([normalize(each) for each in pooled], 1)
        place, size = self.queue[step % len(self.queue)], self.batch // env.world_size()
        for rank, each in enumerate(distributed.all_gather(rows)):
            start = rank * size + first_row % size
            place[start : start + len(each)] = each

    def earlier(self, step: int) -> list[Tensor]:
        """Returns the embeddings of the batches before a step for each teacher, (m, d); none before the first."""
        place = step % len(self.queue)
        rows = self.queue[:step] if step < len(self.queue) else torch.cat([self.queue[:place], self.queue[place + 1 :]])
        return [*rows.flatten(0, 1).split(self.layout.pooled, 1)]


def _standardized(features: list[Tensor], statistics: Tensor, widths: tuple[int, ...]) -> list[Tensor]:
    """Returns features of each teacher less their mean, by their deviation; statistics as of `_statistics`."""
    if not features:
        return []
    means, deviations = (row.split(widths) for row in statistics)
    return [(each - mean) / deviation for each, mean, deviation in zip(features, means, deviations, strict=True)]


def _statistics(features: Tensor) -> Tensor:
    """Returns mean and deviation of each dimension of features (n, d), (2, d); 1 for a constant dimension."""
    mean, deviation = features.mean(0), features.std(0, correction=0)
    constant = deviation <= LEAST_DEVIATION * deviation.mean()
    return torch.stack([mean, deviation.masked_fill(constant, 1.0)]).float()
