"""Many students, one teacher pass: each has its own run folder, and what they are all shown is made and asked once."""

import heapq
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from funmatch.config import Distill
from funmatch.data.loader import Loader
from funmatch.errors import InputError
from funmatch.runtime import devices, distributed, env, signals
from funmatch.runtime.log import ProgressBar, info
from funmatch.runtime.prefetch import SharedCache
from funmatch.training import distill, scoring
from funmatch.training.distill import Taught
from funmatch.training.run import folder as run_folder
from funmatch.training.setup import TrainSetup, finished_result, run_record
from funmatch.training.teachers import loading
from funmatch.training.trainer import Trainer

SHARED = (
    "seed", "batch", "side", "min_area", "crop", "resize", "mixing", "cutmix", "randaugment", "teacher_sides",
    "own_teacher_view",
)  # fmt: skip
"""What must be alike in the loaders of students that are taught beside each other."""


def split_by_student(config: Distill, students: Sequence[str]) -> list[Distill]:
    """A configuration for each student: the run in a folder of its name within `out`.

    Raises:
        InputError: two of them have the same name, or a knob is for one student alone.
    """
    names = [folder_name(student) for student in students]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"two students are called {', '.join(twice)}; each needs a folder of its own")
    given = {"--profile": config.profile, "--student-weights": config.student_weights}
    if alone := " and ".join(name for name, value in given.items() if value):
        raise InputError(f"{alone}: for one student alone; give one student, or leave it out")
    return [
        config.model_copy(update={"student": student, "out": config.out / name})
        for student, name in zip(students, names, strict=True)
    ]


def folder_name(student: str) -> str:
    """What the folder of a student is called: its name, of a path the last part."""
    return Path(student).name.replace(":", "-") or "student"


def run(configs: Sequence[Distill]) -> dict[str, Any]:
    """Distils several students of the same teacher, step by step beside each other.

    The student that is the furthest behind takes the next step, so that those that stand alike share it: its views are
    made once, and the teacher is asked once. Each comes to the same bits as it would alone.

    Returns:
        `runs`: the figures of each.

    Raises:
        Stopped: by Ctrl-C or SIGTERM, after all have saved.
        InputError: their views would differ, or one of them came to no end; the others did.
    """
    for config in configs:
        config.check()
    if env.world_size() > 1:
        raise InputError("several students are work for one process; with several processes give one --student")
    with distributed.process_group(configs[0].device), ExitStack() as stack:
        figures: dict[str, Any] = {}
        walking: dict[str, tuple[Trainer, Taught]] = {}
        lessons: list[TrainSetup] = []
        plain: list[loading.LoadedTeacher] = []
        for config in configs:
            lesson, called = distill.begun(config)
            if result := finished_result(lesson):
                figures[str(config.out)] = result
                continue
            if lessons:
                check_same_views(lessons[0], lesson)
            lessons, plain = [*lessons, lesson], plain or called
        # As many as all of them make ahead, or look at together when they are judged.
        ahead, views = configs[0].workers or devices.spare_threads(), -(-scoring.VIEWS // configs[0].batch)
        batches, said = (SharedCache(4 + 2 * ahead + views) for _ in range(2))
        first: Taught | None = None
        for lesson in lessons:
            made = distill.taught(replace(lesson, latest=batches), plain, first, said)
            made = stack.enter_context(made)
            first = first or made
            walking[str(lesson.config.out)] = stack.enter_context(begun(made)), made
        for walk, _ in walking.values():
            walk.compile()
        failed = step_together(walking, figures)
    if failed:
        lines = "\n  ".join(f"{name}: {error}" for name, error in failed.items())
        raise InputError(f"{len(failed)} of {len(configs)} students came to no end:\n  {lines}")
    return {"runs": [figures[str(config.out)] for config in configs]}


@contextmanager
def begun(made: Taught) -> Generator[Trainer]:
    """A walk in its run folder, which is locked while the block runs."""
    knobs, facts = run_record(made.lesson)
    with run_folder.open_run(made.lesson.config.out, made.lesson.verb, knobs, facts) as run:
        yield Trainer(made.lesson, run, made.judged, made.both)


def step_together(walking: dict[str, tuple[Trainer, Taught]], figures: dict[str, Any]) -> dict[str, InputError]:
    """Takes all steps of all students, and puts the figures of those that come to their end in; why others did not."""
    failed: dict[str, InputError] = {}
    stopped: signals.Interrupted | None = None
    total = sum(walk.lesson.loop.steps for walk, _ in walking.values())
    start = sum(walk.state.step for walk, _ in walking.values())
    with ProgressBar(f"distill {len(walking)}", total, start) as bar, signals.catch_signals() as caught:
        steps = {name: walk.steps(made.loss_of, made.ahead, caught) for name, (walk, made) in walking.items()}
        waiting = [(walk.state.step, number, name) for number, (name, (walk, _)) in enumerate(walking.items())]
        heapq.heapify(waiting)
        while waiting:
            _, number, name = heapq.heappop(waiting)
            walk = walking[name][0]
            try:
                step = next(steps[name], None)
                if step is None:
                    figures[name] = walk.finish()
                    info(f"{name} is finished at step {walk.state.step}")
                else:
                    heapq.heappush(waiting, (step, number, name))
            except signals.Interrupted as signal:
                stopped = signal  # the others save, too, and then it is told
            except InputError as error:
                info(f"{name} ends: {error}")
                failed[name] = error
            notes = [one.notes.get("loss", "").partition(",")[0] for one, _ in walking.values()]
            bar.update(sum(one.state.step for one, _ in walking.values()), "; ".join(filter(None, notes)))
    if stopped:
        raise signals.Interrupted(stopped.number, "all students are saved; the same command goes on from there")
    return failed


def check_same_views(one: TrainSetup, other: TrainSetup) -> None:
    """Raises `InputError` unless two students are shown the same."""
    first, second = one.loader, other.loader
    differing = [name for name in SHARED if getattr(first, name) != getattr(second, name)]
    differing += [] if same_teachers(one, other) else ["teacher"]
    if differing:
        told = ", ".join(f"{name} {_of(first, name)} and {_of(second, name)}" for name in differing)
        raise InputError(
            f"{one.config.student} and {other.config.student} would see different views: {told}; say the knob, "
            "e.g. --side, or teach them one after the other (--tape)"
        )


def same_teachers(one: TrainSetup, other: TrainSetup) -> bool:
    return all(one.provenance[name] == other.provenance[name] for name in distill.FACTS)


def _of(loader: Loader, name: str) -> Any:
    return getattr(loader, name, "")
