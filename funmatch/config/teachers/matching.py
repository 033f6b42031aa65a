"""The table of what a student matches of its teachers: logits, features, tokens."""

from typing import Annotated, Literal

from funmatch.config.metadata import Changes, Group, Opt
from funmatch.config.options import Options
from funmatch.config.values import Names, Numbers
from funmatch.errors import unknown

STUDENT, TEACHER = Changes.STUDENT, Changes.TEACHER
MATCHED = ("logits", "features", "tokens")
"""What of a teacher can be matched, in the order of its answers' rows."""
FEATURE_LOSSES = ("cosine", "l2", "queue-kl", "batch-kl")
RELATIONAL = ("queue-kl", "batch-kl")
"""Losses that compare how an image lies among others."""


class Matching(Options):
    """What of the teachers is matched, and how features are compared."""

    match: Annotated[Names, Opt(group=Group.TEACHER, changes=STUDENT | TEACHER, searchable=False, metavar="WHAT …")] = (
        "logits",
    )
    """What the student matches: logits; features, those before the head, for which the teacher needs no head, and of
    which alone the student becomes a backbone without classes; tokens, beside features, the map before pooling."""
    match_weights: Annotated[
        Numbers, Opt(group=Group.LOOP, changes=STUDENT, above=0, usual="1 each", metavar="WEIGHT …")
    ] = ()
    """Weights of what --match lists, in its order; the losses are added up."""
    feature_loss: Annotated[
        Names, Opt(group=Group.LOOP, changes=STUDENT, searchable=False, metavar="|".join(FEATURE_LOSSES))
    ] = ("cosine",)
    """Distances between features, projected to the teacher's width. cosine, l2: of each image. queue-kl: KL of its
    similarities to the teacher's features of earlier batches (SEED). batch-kl: of those to the other images of its
    batch, as each network sees them. Several are added up; tokens use cosine and l2."""
    feature_loss_weights: Annotated[
        Numbers, Opt(group=Group.LOOP, changes=STUDENT, above=0, usual="1 each", metavar="WEIGHT …")
    ] = ()
    """Weights of what --feature-loss lists, in its order."""
    feature_queue: Annotated[
        int, Opt(group=Group.LOOP, changes=STUDENT, at_least=1, at_most=1 << 20, metavar="IMAGES")
    ] = 4096
    """queue-kl: images in the queue, rounded up to whole batches."""
    feature_temperature: Annotated[float, Opt(group=Group.LOOP, changes=STUDENT, above=0)] = 0.07
    """queue-kl and batch-kl: temperature of the similarities."""
    standardise_features: Annotated[Literal["auto", "on", "off"], Opt(group=Group.LOOP, changes=STUDENT)] = "auto"
    """Standardise the teacher's features, each dimension to mean 0 and deviation 1 by the first batches; auto: where
    there are several teachers."""

    @property
    def matches_logits(self) -> bool:
        return "logits" in self.match

    @property
    def matches_features(self) -> bool:
        return "features" in self.match

    @property
    def matches_tokens(self) -> bool:
        return "tokens" in self.match

    @property
    def weight_of(self) -> dict[str, float]:
        """The weight of each thing that is matched."""
        return dict(zip(self.match, self.match_weights or (1.0,) * len(self.match), strict=True))

    @property
    def feature_losses(self) -> dict[str, float]:
        """The weight of each distance between features."""
        names = self.feature_loss
        return dict(zip(names, self.feature_loss_weights or (1.0,) * len(names), strict=True))

    @property
    def coupled(self) -> list[str]:
        """The losses that compare the images of a batch with each other, as messages name them."""
        matched = self.matches_features or self.matches_tokens
        return ["feature_loss batch-kl"] if matched and "batch-kl" in self.feature_loss else []

    def problems(self) -> list[str]:
        found = _list_problems("match", self.match, MATCHED, self.match_weights)
        if self.matches_tokens and not self.matches_features:
            found.append("tokens are matched beside features; pass --match features tokens")
        if not self.matches_logits:
            # Fields of the table that uses this one.
            of_logits = ("distance", "temperature", "t_squared", "standardise", "label_weight", "combine", "classes")
            found += [
                f"{name} belongs to --match logits, and only features are matched"
                for name in of_logits
                if self.moved(name)
            ]
        if self.matches_features or self.matches_tokens:
            found += self._feature_problems() + self._view_problems()
        else:
            names = ("feature_loss", "feature_loss_weights", "feature_queue", "feature_temperature")
            found += [
                f"{name} belongs to --match features" for name in (*names, "standardise_features") if self.moved(name)
            ]
        return found + super().problems()

    def _feature_problems(self) -> list[str]:
        """Options of features that contradict each other."""
        found = _list_problems("feature_loss", self.feature_loss, FEATURE_LOSSES, self.feature_loss_weights)
        if "queue-kl" not in self.feature_loss and self.moved("feature_queue"):
            found.append("feature_queue belongs to --feature-loss queue-kl")
        if not {*RELATIONAL} & {*self.feature_loss} and self.moved("feature_temperature"):
            found.append("feature_temperature belongs to --feature-loss queue-kl and batch-kl")
        if self.matches_tokens and {*self.feature_loss} <= {*RELATIONAL}:
            found.append("tokens are compared by cosine or l2; add one of them to --feature-loss")
        return found

    def _view_problems(self) -> list[str]:
        """Options of views and tapes that features do not go with."""
        found = []
        if getattr(self, "tape_top", None) is not None:
            found.append("tape_top keeps some classes of logits, and features have none; omit it")
        if getattr(self, "teacher_is_fixed", False):
            found.append(
                "features are matched on the views that the student gets, but the teacher of this strategy is fixed; "
                "use funmatch, or a strategy of same/ or ind/"
            )
        return found


def _list_problems(name: str, values: tuple[str, ...], known: tuple[str, ...], weights: tuple[float, ...]) -> list[str]:
    """What is wrong with a list of names and their weights."""
    found = [str(unknown(name, value, known)) for value in values if value not in known]
    if not values:
        found.append(f"{name} is empty; give one or more of {', '.join(known)}")
    if twice := sorted({value for value in values if values.count(value) > 1}):
        found.append(f"{name} lists {', '.join(twice)} twice")
    if weights and len(weights) != len(values):
        found.append(f"{name}_weights has {len(weights)} values for the {len(values)} of {name}; give one each")
    return found
