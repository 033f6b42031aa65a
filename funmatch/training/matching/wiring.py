"""Prepares student and teachers for matching features: what is read of each, and the student's projector."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from funmatch.config import Distill
from funmatch.errors import InputError
from funmatch.models.classifier import TRAINING_ONLY, Classifier
from funmatch.models.ensemble import TeacherEnsemble
from funmatch.models.inference import answers
from funmatch.models.inference.answers import Layout
from funmatch.models.inference.features import is_in_halves
from funmatch.runtime import distributed, env
from funmatch.training.matching.losses import FeatureMatching
from funmatch.training.matching.memory import Memory
from funmatch.training.matching.projector import Projector, StudentReadout
from funmatch.training.setup import TrainSetup
from funmatch.training.teachers.loading import LoadedTeacher

STATISTICS_IMAGES = 1024
"""Images of the first batches, at least, by which features are standardised."""


@dataclass(frozen=True)
class Preparation:
    """Prepares a student while its run is set up: called with the network and the resolved options.

    Attributes:
        loaded: the teachers.
    """

    loaded: Sequence[LoadedTeacher]

    def __call__(self, student: Classifier, config: Distill) -> nn.Module:
        """Gives a student its projector and its readout; returns its memory."""
        assert config.side
        pooled, token, own_grid = _measure_student(student, config.side, tokens=config.matches_tokens)
        measured = [
            answers.measure(each.classifier, each.side or config.side, tokens=config.matches_tokens)
            for each in self.loaded
        ]
        # The coarsest of all: a finer one would have nothing to match in the coarser networks' maps.
        rows, columns = zip(own_grid, *(grid for _, _, grid in measured), strict=True)
        layout = Layout(
            student.num_classes,
            tuple(each for each, _, _ in measured),
            tuple(each for _, each, _ in measured) if config.matches_tokens else (),
            (min(rows), min(columns)),
        )
        head_last = bool(layout.classes) and _head_is_last(student, config.side)
        student.net.add_module(TRAINING_ONLY, Projector(layout, pooled, token, config.seed))
        student.readout = StudentReadout(layout, head_last)
        return Memory(layout, config.batch, config.feature_queue if "queue-kl" in config.feature_loss else 0)


def _measure_student(student: Classifier, side: int, *, tokens: bool) -> tuple[int, int, answers.Grid]:
    """Measures a student's features as `answers.measure` does; raises `InputError` for one that is not timm's."""
    if not is_in_halves(student.net):
        raise InputError(
            f"student {student.card.name} is not a timm network, and only their features can be matched; choose one "
            "of timm's, or leave out --match features"
        )
    return answers.measure(student, side, tokens=tokens)


@torch.no_grad()
def _head_is_last(student: Classifier, side: int) -> bool:
    """Returns whether the last layer alone makes logits of pooled features, so that the head need not run twice."""
    was_training = student.training
    with torch.random.fork_rng(devices=[]):
        probe = student.eval().normalize(torch.rand(2, 3, side, side))
    try:
        found, *_ = answers.read(student.net, probe, logits=True, tokens=False, head_last=True)
        return found is not None and torch.equal(found, student.net(probe))
    except (RuntimeError, AttributeError, TypeError):  # a head of another kind: of convolutions, or of two layers
        return False
    finally:
        student.train(was_training)


def layout_of(setup: TrainSetup[Distill]) -> Layout | None:
    """Returns the layout of a run's answers; None where logits alone are matched."""
    readout = setup.student.classifier.readout
    return readout.layout if isinstance(readout, StudentReadout) else None


def with_readout(teacher: LoadedTeacher, setup: TrainSetup[Distill]) -> LoadedTeacher:
    """Returns a teacher that answers with rows of the run's layout; as it is where logits alone are matched."""
    layout = layout_of(setup)
    if layout is None:
        return teacher

    def read_out(classifier: Classifier) -> Classifier:
        grid = layout.grid if layout.tokens else None
        readout = answers.teacher_readout(classifier, logits=layout.classes > 0, grid=grid)
        return answers.read_out(classifier, readout)

    return replace(
        teacher,
        load_again=lambda *more: read_out(teacher.load_again(*more)),
        classifier=read_out(teacher.classifier),
    )


def matching_of(setup: TrainSetup[Distill], teachers: TeacherEnsemble) -> FeatureMatching | None:
    """Returns what a run matches besides logits, or None."""
    layout, config, memory = layout_of(setup), setup.config, setup.student.memory
    if layout is None or not isinstance(memory, Memory):
        return None
    shares = tuple(member.weight for member in teachers.members)
    wanted = config.standardise_features
    standardised = wanted == "on" or (wanted == "auto" and len(shares) > 1)
    return FeatureMatching(config, layout, shares, memory.to(setup.loop.device), standardised)


def fit_statistics(matching: FeatureMatching, batch: int, answers_of: Callable[[int], Tensor]) -> None:
    """Measures by which mean and deviation the teachers' features are standardised, on the first batches.

    A run that resumes measures them again, and then has those of its checkpoint.

    Args:
        batch: images of a step.
        answers_of: computes the teachers' answers to the whole batch of a step, (batch, width).
    """
    if not matching.standardised:
        return
    # By one process, on whole batches: the others' would be rounded otherwise.
    if env.is_main_process():
        steps = range(-(-STATISTICS_IMAGES // batch))
        matching.memory.fit(torch.cat([answers_of(step).cpu() for step in steps]))
    distributed.broadcast_([matching.memory.pooled, matching.memory.tokens])
