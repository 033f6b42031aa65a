"""Distils several students in one process: views and teacher logits are computed once for all."""

import heapq
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from funmatch.config import Distill
from funmatch.data.cache.open_cache import Cache
from funmatch.errors import InputError
from funmatch.runtime import distributed, env, signals
from funmatch.runtime.log import ProgressBar, info
from funmatch.training import distill
from funmatch.training.distill import Distillation, DistillSetup
from funmatch.training.evaluation import scoring
from funmatch.training.run import folder as run_folder
from funmatch.training.setup import finished_result, run_record
from funmatch.training.teachers.loading import LoadedTeacher
from funmatch.training.teachers.source import SharedCache
from funmatch.training.trainer import Trainer


def split_by_student(config: Distill, students: Sequence[str]) -> list[Distill]:
    """Returns a configuration for each student; its run is a folder of the student's name in `out`.

    Raises:
        InputError: two of them have the same name, or an option is for one student only.
    """
    names = [folder_name(student) for student in students]
    # The last part of a path is not unique, and two runs in one folder would refuse each other.
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"two students have the name {', '.join(twice)}; each needs a folder of its own")
    # Both belong to a single student: a trace of one network, weights of one architecture.
    single = {"--profile": config.profile, "--student-weights": config.student_weights}
    if names_set := " and ".join(name for name, value in single.items() if value):
        raise InputError(f"{names_set} works with one --student only")
    return [
        config.model_copy(update={"student": student, "out": config.out / name})
        for student, name in zip(students, names, strict=True)
    ]


def folder_name(student: str) -> str:
    """Returns the name of a student's folder: the student's, of a path the last part."""
    return Path(student).name.replace(":", "-") or "student"


def run(configs: Sequence[Distill]) -> dict[str, Any]:
    """Distils several students of the same teacher side by side, each bitwise as it would be alone.

    Returns:
        `runs`: the metrics of each.

    Raises:
        Interrupted: by a signal, or shortly before the time limit, after all have saved.
        InputError: their views would differ, or one of them failed; the others finished.
    """
    if env.world_size() > 1:
        raise InputError("several students are trained in one process; with several processes pass one --student")
    metrics: dict[str, Any] = {}
    # The stack closes tapes and locks of all runs, whichever of them fails.
    with distributed.process_group(configs[0].device), ExitStack() as stack:
        setups, loaded = _build_setups(configs, metrics)
        training = _begin(setups, loaded, stack)
        for trainer in training.values():
            trainer.compile()
        failed = step_together(training, metrics)
    if failed:
        lines = "\n  ".join(f"{name}: {error}" for name, error in failed.items())
        raise InputError(f"{len(failed)} of {len(configs)} students failed:\n  {lines}")
    return {"runs": [metrics[str(config.out)] for config in configs]}


def _build_setups(
    configs: Sequence[Distill], metrics: dict[str, Any]
) -> tuple[list[DistillSetup], list[LoadedTeacher]]:
    """Builds the runs that are not finished, and loads their teachers; adds the others' results to `metrics`."""
    # Images and teachers are loaded once: the configurations differ in student and folder alone.
    cache, first, loaded = distill.open_inputs(configs[0])
    _check_same_images(configs, cache, first)
    setups: list[DistillSetup] = []
    for config in configs:
        run_folder.check_place(config.out)
        resolved = config.model_copy(update={"val": first.val, "keep": first.keep})
        setup = distill.build_distill_setup(resolved, cache, loaded, requested=config)
        if result := finished_result(setup):
            metrics[str(config.out)] = result
            continue
        # Against the first only: equality is transitive.
        if setups:
            check_same_views(setups[0], setup)
        setups.append(setup)
    return setups, loaded


def _check_same_images(configs: Sequence[Distill], cache: Cache, first: Distill) -> None:
    """Raises `InputError` if some of the runs began without validation images, and others would hold some out.

    Args:
        cache, first: the images and the options of the first run.
    """
    own_split = first.val is None and "val" in cache.splits
    began = {config.out.name: run_folder.began_without_validation(config.out) for config in configs}
    if len(set(began.values())) > 1 and not own_split:
        listed = ", ".join(name for name, without in began.items() if without)
        raise InputError(f"{listed} began without a validation split, which the other runs have; resume it alone")


def _begin(setups: Sequence[DistillSetup], loaded: list[LoadedTeacher], stack: ExitStack) -> dict[str, Trainer]:
    """Returns a trainer for each run by folder, all with the same frozen teachers; the stack holds the locks."""
    if not setups:
        return {}
    # Room for the batches that students prepare ahead, and for those that each is evaluated on.
    ahead, views = setups[0].workers, -(-scoring.VIEWS // setups[0].config.batch)
    batches, logits = (SharedCache(4 + 2 * ahead + views) for _ in range(2))
    training: dict[str, Trainer] = {}
    first: Distillation | None = None
    for setup in setups:
        distillation = stack.enter_context(distill.prepare(setup, loaded, first, (batches, logits)))
        first = first or distillation
        options, facts = run_record(distillation.setup)
        run = stack.enter_context(run_folder.open_run(setup.config.out, setup.inputs.verb, options, facts))
        training[str(setup.config.out)] = Trainer(distillation.setup, run, distillation.objective)
    return training


def step_together(training: dict[str, Trainer], metrics: dict[str, Any]) -> dict[str, InputError]:
    """Takes all steps of all students.

    Args:
        training: trainers by folder.
        metrics: the results of students that finish are added, by folder.

    Returns:
        the errors of those that failed, by folder.
    """
    failed: dict[str, InputError] = {}
    interrupted: signals.Interrupted | None = None
    total = sum(trainer.setup.loop.steps for trainer in training.values())
    start = sum(trainer.state.step for trainer in training.values())
    saving = {name for trainer in training.values() for name in trainer.setup.config.save_signals}
    with ProgressBar(f"distill {len(training)}", total, start) as bar, signals.catch_signals(saving) as requests:
        steps = {name: trainer.steps(requests) for name, trainer in training.items()}
        # The student furthest behind is next: those at the same step then find its batch in the shared cache.
        waiting = [(trainer.state.step, number, name) for number, (name, trainer) in enumerate(training.items())]
        heapq.heapify(waiting)
        while waiting:
            _, number, name = heapq.heappop(waiting)
            try:
                step = next(steps[name], None)
                if step is None:
                    metrics[name] = training[name].finish()
                    info(f"{name} is finished at step {training[name].state.step}")
                else:
                    heapq.heappush(waiting, (step, number, name))
            except signals.Interrupted as signal:
                interrupted = signal  # raised after the others have saved, too
            except InputError as error:
                # One student's failure, e.g. a loss that is not finite, does not end the others.
                info(f"{name} failed: {error}")
                failed[name] = error
            # Losses only: the evaluations of several students do not fit on a line.
            trainers = training.values()
            bar.update(
                sum(trainer.state.step for trainer in trainers),
                lambda trainers=trainers: "; ".join(filter(None, (trainer.losses.note for trainer in trainers))),
            )
    if interrupted:
        message = "all students are saved; run the same command again to resume"
        raise interrupted.with_message(message)
    return failed


def check_same_views(one: DistillSetup, other: DistillSetup) -> None:
    """Raises `InputError` unless two students see the same views, and their teachers have the same image sizes."""
    first, second = one.loader, other.loader
    differing = first.spec.differences(second.spec)
    if first.teacher_sides != second.teacher_sides:
        differing["teacher_sides"] = first.teacher_sides, second.teacher_sides
    if differing:
        listed = ", ".join(f"{name} {a} and {b}" for name, (a, b) in differing.items())
        raise InputError(
            f"{one.config.student} and {other.config.student} would see different views: {listed}; set the option, "
            "e.g. --side, or train them one after the other (--tape)"
        )
