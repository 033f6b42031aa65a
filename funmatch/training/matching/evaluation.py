"""Evaluates features while they are matched: nearest neighbours where images have labels, and the distance."""

from typing import Any

import torch
from torch import Tensor, nn

from funmatch.data.cache.open_cache import Cache
from funmatch.data.cache.stores import CachedSplit
from funmatch.data.readers.split_names import TRAINING_IMAGES
from funmatch.models.classifier import Classifier
from funmatch.models.ensemble import EnsembleMember
from funmatch.models.inference.answers import Layout
from funmatch.models.inference.features import Features
from funmatch.ops import embeddings, metrics
from funmatch.ops.features import losses
from funmatch.ops.tasks import multiclass
from funmatch.training.evaluation import scoring
from funmatch.training.matching.losses import FeatureMatching
from funmatch.training.matching.projector import WithoutTokens
from funmatch.training.teachers.predictions import MemberAnswers

NEIGHBOURS_A_CLASS, LEAST_BANK, LARGEST_BANK = 10, 1000, 5000
"""Training images whose neighbours vote: so many a class, within these bounds."""


class FeatureEvaluation:
    """Scores features on a run's images.

    Args:
        matching: what is matched.
        cache: the images.
        view: the preprocessing of evaluation.
    """

    def __init__(self, matching: FeatureMatching, cache: Cache, view: scoring.EvalView) -> None:
        self.matching, self.cache, self.view = matching, cache, view

    @property
    def layout(self) -> Layout:
        return self.matching.layout

    def student(self, student: Classifier, split: CachedSplit, answers: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Scores a student on a split.

        Args:
            answers: the teachers' to the split, (n, judged).

        Returns:
            its logits, (n, classes), and its metrics: those of logits, None without classes; `knn`, the accuracy of
            nearest neighbours by its features, None without labels; and `cosine`, the mean over images of that of its
            projected features and the teachers'.
        """
        found = scoring.predict(WithoutTokens(student), split, self.view)
        own, rows = found.split((found.shape[1] - self.layout.judged, self.layout.judged), 1)
        parts, target = self.layout.split(rows), self.layout.split(answers)
        return parts.logits, self._scores(split, parts.logits, target.logits) | {
            "knn": self.neighbours(Features(student), own, split, self.view),
            "cosine": self.cosine(rows, answers).mean().item(),
        }

    def teacher(
        self, member: EnsembleMember, answers: Tensor, split: CachedSplit, view: scoring.EvalView
    ) -> dict[str, Any]:
        """Scores a teacher on a split.

        Args:
            answers: its own, [logits | pooled features], (n, classes + d).
            view: its preprocessing.
        """
        classes, end = self.layout.classes, answers.shape[1]
        network = MemberAnswers(member, slice(classes, end))
        neighbours = self.neighbours(network, answers[:, classes:], split, view)
        return self._scores(split, answers[:, :classes]) | {"knn": neighbours}

    def cosine(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Computes the weighted mean of the teachers' cosines with the student's projected features, (n,).

        Args:
            student, teacher: rows, (n, judged) or (n, width).
        """
        judged = self.layout.judged
        own, target = (self.layout.split(rows[:, :judged].to(self.view.device)) for rows in (student, teacher))
        target = self.matching.targets(target)
        each = [
            share * (1 - losses.cosine(one, other))
            for one, other, share in zip(own.pooled, target.pooled, self.matching.shares, strict=True)
        ]
        return torch.stack(each).sum(0).cpu()

    def neighbours(
        self, network: nn.Module, queries: Tensor, split: CachedSplit, view: scoring.EvalView
    ) -> float | None:
        """Computes the accuracy of nearest neighbours among some training images; None without labels.

        Args:
            network: gives the features of training images.
            queries: features of the split, (n, d).
        """
        bank = self.bank(split)
        if bank is None:
            return None
        known = scoring.predict(network, bank, view)
        votes = embeddings.nearest_neighbours(known, bank.labels(slice(None)), queries, len(self.cache.classes))
        return multiclass.accuracy(votes, split.labels(slice(None)))

    def bank(self, split: CachedSplit) -> CachedSplit | None:
        """Returns the training images among which a split's neighbours are sought; None where labels are missing."""
        train = self.cache.splits["train"]
        # Of several classes an image neighbours have no single one to vote for.
        if self.matching.config.task != "multiclass":
            return None
        if not (train.labelled and split.labelled and self.cache.classes):
            return None
        most = min(max(LEAST_BANK, NEIGHBOURS_A_CLASS * len(self.cache.classes)), LARGEST_BANK)
        places = torch.arange(len(train))
        if split.name in (TRAINING_IMAGES, train.name):
            # An image is its own nearest neighbour, so those that are looked up stay out.
            used = torch.from_numpy(scoring.evenly_spread(len(train), scoring.TRAIN_IMAGES_FOR_VALIDATION))
            places = places[~torch.isin(places, used)]
        if not len(places):
            return None
        return train.subset(places[scoring.evenly_spread(len(places), most)].numpy())

    def _scores(self, split: CachedSplit, logits: Tensor, teacher: Tensor | None = None) -> dict[str, Any]:
        if not self.layout.classes:
            return dict.fromkeys(metrics.METRICS)
        return scoring.score(logits, split, teacher)
