"""Decides between two readings of a teacher's file where the file leaves it open and the data has labels.

The layout of a BiT checkpoint says how the code that wrote such files pads the first max-pool, but not which code
trained the network in the file (`models.bit`). Accuracy does.
"""

from torch import Tensor

from funmatch.config import Distill
from funmatch.models.inference.frozen import Frozen
from funmatch.ops.metrics import alone_right, is_clearly_better
from funmatch.runtime import devices, distributed
from funmatch.runtime.log import info
from funmatch.runtime.measured import Measurement
from funmatch.runtime.text import percent
from funmatch.training.evaluation import scoring
from funmatch.training.setup import TrainSetup
from funmatch.training.teachers import loading
from funmatch.training.teachers.checks import RESAMPLED_IMAGES
from funmatch.training.teachers.loading import LoadedTeacher
from funmatch.training.teachers.predictions import MemberAnswers, member_view

BETTER = {"better": bool}


def settle(loaded: list[LoadedTeacher], setup: TrainSetup[Distill]) -> tuple[str, ...]:
    """Replaces a single teacher by the other reading of its file, if that is clearly better on the validation images.

    Several teachers share their options, so for these it is only said.

    Returns:
        the options of constructors that the run records.
    """
    options = setup.config.teacher_kwargs
    for number, teacher in enumerate(loaded):
        for option in teacher.classifier.alternatives:
            if not _settled(teacher, option, setup):
                continue
            if len(loaded) > 1:
                info(f"note: {teacher.name}: teachers share --teacher-kwargs; `funmatch import` takes {option}")
                continue
            loaded[number] = loading.read_again(teacher, option)
            options += (option,)
    return options


def _settled(teacher: LoadedTeacher, option: str, setup: TrainSetup[Distill]) -> bool:
    """Returns whether a teacher is clearly better with an option; measured once for the same weights and images."""
    split = setup.evaluation.validation
    if not split.labelled or split.task == "multilabel":  # both readings are compared by their first classes
        return False
    facts = (teacher.digest, teacher.function, option, setup.cache.key, split.name, len(split), setup.evaluation.view)
    key = repr((*facts, devices.machine_signature(setup.loop.device)))
    measured = Measurement("readings", key, f"which padding teacher {teacher.name} has")

    def compare() -> bool:
        if not (found := measured.read(BETTER)):
            found = {"better": _is_better(teacher, option, setup)}
            measured.write(found)
        return found["better"]

    return distributed.broadcast_from_main(compare)


def _is_better(teacher: LoadedTeacher, option: str, setup: TrainSetup[Distill]) -> bool:
    """Compares both readings on validation images, and says what was found."""
    split, device = setup.evaluation.validation, setup.loop.device
    some = split.subset(scoring.evenly_spread(len(split), RESAMPLED_IMAGES))
    labels = some.labels(slice(None))

    def right(*more: str) -> Tensor:
        # Loaded for this alone: the teacher's own network stays where it is, and as it is.
        member = loading.member(teacher, Frozen(teacher.load_again(*more).to(device)))
        view = member_view(member, setup.evaluation.view)
        return scoring.predict(MemberAnswers(member), some, view).argmax(-1) == labels

    here, there = right(), right(option)
    better = is_clearly_better(*alone_right(there, here))
    info(
        f"teacher {teacher.name}: top-1 {percent(here.double().mean().item())} on {len(some)} images of {split.name}, "
        f"and {percent(there.double().mean().item())} with {option}; using {option if better else 'it as it is'}"
    )
    return better
