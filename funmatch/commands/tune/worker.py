"""Runs the trials of a search: chosen by Optuna, run one after the other, compared on validation images only.

A worker holds a lock in the folder of its trial, which the operating system releases when the worker ends, however it
ends. So a trial that is running in the storage but not locked was abandoned, and the next worker resumes its runs.
"""

import gc
import shutil
import statistics
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from funmatch.commands.tune import search, summary
from funmatch.commands.tune.search import SearchSpec
from funmatch.commands.tune.space import Value
from funmatch.commands.verbs import VERBS, load_function
from funmatch.config import Search
from funmatch.errors import InputError, first_line
from funmatch.runtime import text, time_limit
from funmatch.runtime.disk.locks import FileLock, file_lock, try_lock_file
from funmatch.runtime.log import info
from funmatch.runtime.text import percent
from funmatch.runtime.time_limit import StartTime
from funmatch.training.evaluation.outcome import deciding_metric
from funmatch.training.run import intervals
from funmatch.training.setup import Trial
from funmatch.training.teachers.loading import Modules

if TYPE_CHECKING:  # Optuna is an extra
    import optuna

POLL_SECONDS = 0.5
"""Time between two looks at the trials of other workers."""
ENDED = ("COMPLETE", "PRUNED", "FAIL")


class Pruned(Exception):
    """The pruner ends a trial."""


def run(config: Search, modules: Modules | None = None) -> dict[str, Any]:
    """Searches until all trials have ended, those of other workers too, and returns what `result.json` holds.

    Args:
        modules: modules from Python, by the names that stand for them.

    Returns:
        `trials` (a row each), `best` (the number of one, None where all failed), `best_run`, `knobs` of it, `score`
        (the metric that selects), `value`, `importance`, `test` (the metrics of the best trial), `seen`, `command`,
        `study`.

    Raises:
        InputError: an option is invalid, or the storage cannot be used.
        Interrupted: by a signal, or shortly before the time limit, after saving.
    """
    try:
        from funmatch.commands.tune import optuna_storage
    except ImportError as error:
        # Another missing module would be a fault of ours, and this message would hide it.
        if error.name not in ("optuna", "sqlalchemy"):
            raise
        raise InputError("funmatch tune needs Optuna: pip install 'funmatch[tune]'") from None
    spec = search.read_spec(config)
    # Before the storage is opened: a finished search can be read without its database.
    if result := summary.finish_summary(spec):
        # Also of a finished search: the options may not be those that it was carried out with.
        search.begin_search(spec.folder, search.record_of(spec, optuna_storage.display_url(spec.place)))
        # A kill may have come between the result and this.
        shutil.rmtree(spec.tapes, ignore_errors=True)
        info(f"{spec.folder} is finished after {len(result['trials'])} trials; nothing to do")
        return result
    with optuna_storage.working_trials(spec.place):
        study = open_study(spec)
        try:
            work(study, spec, modules or {})
        finally:
            # `work` freezes what outlives a trial, and this process may go on to other things, as a notebook does.
            gc.unfreeze()
        # One worker evaluates on the test images; the others wait, and find its summary.
        with file_lock(spec.folder / ".end"):
            result = summary.finish_summary(spec) or summary.end_summary(study, spec, modules or {})
            shutil.rmtree(spec.tapes, ignore_errors=True)  # nobody needs them any more
            return result


def open_study(spec: SearchSpec) -> "optuna.Study":
    """Opens the study of a search in its storage, or creates it.

    Raises:
        InputError: another search is there, or the storage cannot be used.
    """
    import optuna

    from funmatch.commands.tune import optuna_storage

    sampler = optuna_storage.SeededSampler(spec.search.sampler, spec.search.sampler_seed, spec.space, spec.first)
    base = spec.base
    # Without --eval-every their number depends on the length of each trial, and on its batch.
    known = base.steps is not None and base.eval_every is not None
    evaluations = intervals.evaluations_until(base, base.steps or 0) if known else 0
    pruner = optuna_storage.pruner_of(spec.search.pruner, evaluations)
    # Before the folder is written: a wrong URL leaves nothing behind.
    if optuna_storage.is_url(spec.place):
        optuna_storage.check_reachable(spec.place)
    # Under the lock of the folder: two workers that start at once would both create the study.
    with search.record_folder(spec.folder).beginning():
        record = search.begin_search(spec.folder, search.record_of(spec, optuna_storage.display_url(spec.place)))
        storage, parts = optuna_storage.storage_at(spec.place), {"sampler": sampler, "pruner": pruner}
        try:
            study = optuna.load_study(study_name=spec.name, storage=storage, **parts)
        except KeyError:
            study = optuna.create_study(storage=storage, study_name=spec.name, direction="maximize", **parts)
        # The id, since a shared database may hold another search of the same name.
        known = study.user_attrs.get("id")
        # Without id and trials it is new, or the worker that created it was killed before the next line.
        if known is None and not study.get_trials(deepcopy=False):
            study.set_user_attr("id", record["id"])
        elif known != record["id"]:
            where = f"{optuna_storage.display_url(spec.place)} holds a study {spec.name!r}"
            raise InputError(
                f"{where} that is not the one of {spec.folder}; pass --study-name with a name of its own, "
                "or another --storage"
            )
    return study


def work(study: "optuna.Study", spec: SearchSpec, modules: Modules) -> None:
    """Runs trials until none is left to begin or resume, and waits for those of other workers."""
    waiting, limit, started = False, time_limit.find_limit(spec.base.time_limit), StartTime()
    while True:
        # Before a trial is taken: one that could not take a step would be begun for nothing.
        ended = sum(each.state.name in ENDED for each in study.get_trials(deepcopy=False))
        limit.check_left(started.seconds, f"{ended} of {spec.trials} trials are over in {spec.folder}")
        found, others = next_trial(study, spec)
        if found is None:
            # Trials of other workers are waited for: one of them may be killed, and its trial is then taken up here.
            if not others:
                return
            if not waiting:
                info(f"no trial is left to begin; waiting for {_listed(others)} of other workers")
            # The message once, not with every look at the others.
            waiting = True
            time.sleep(POLL_SECONDS)
            continue
        trial, lock = found
        waiting = False
        with lock:
            run_trial(trial, study, spec, modules, started)
        # Now, since networks in reference cycles would stay in memory beside those of the next trial.
        gc.collect()
        gc.freeze()  # what has outlived a trial need not be looked through after the next
        if torch.accelerator.is_available():
            # PyTorch's allocator keeps freed blocks, which the shapes of another trial may not fit into.
            torch.accelerator.empty_cache()


def next_trial(study: "optuna.Study", spec: SearchSpec) -> tuple[tuple["optuna.Trial", FileLock] | None, list[int]]:
    """A trial to run, with its lock: an abandoned one, else a new one; and those that other workers run."""
    from funmatch.commands.tune import optuna_storage

    # From here to the trial's lock no other worker may look: it could take up the same trial.
    with file_lock(spec.folder / ".lock"):
        trials = study.get_trials(deepcopy=False)
        others = []
        for number in [frozen.number for frozen in trials if frozen.state.name not in ENDED]:
            lock = hold_trial(spec, number)
            if lock is None:
                others.append(number)
            elif study.get_trials(deepcopy=False)[number].state.name in ENDED:
                lock.close()  # its worker ended it after we had read the storage
            else:
                trial = optuna_storage.resume_trial(study, number)
                # A worker that was killed while sampling has left some values; the others are sampled now, and all are
                # as they were.
                optuna_storage.suggest(trial, spec.space)
                return (trial, lock), others
        # Failed trials count: an option that never works would otherwise be tried for ever.
        if len(trials) >= spec.trials:
            return None, others
        trial = study.ask()
        lock = hold_trial(spec, trial.number)
        assert lock, "no other worker knows a new trial yet"
        optuna_storage.suggest(trial, spec.space)
        return (trial, lock), others


def hold_trial(spec: SearchSpec, number: int) -> FileLock | None:
    """The lock of a trial, None where another worker has it."""
    folder = spec.trial_folder(number)
    # The lock needs the folder, before the run makes its own inside.
    folder.mkdir(parents=True, exist_ok=True)
    return try_lock_file(folder / ".lock")


def run_trial(
    trial: "optuna.Trial", study: "optuna.Study", spec: SearchSpec, modules: Modules, started: StartTime
) -> None:
    """Runs all executions of a trial, and records how it ended.

    An error fails this trial only, except errors of the disk, which end the worker.
    """
    import optuna

    chosen: Mapping[str, Value] = trial.params
    number, scores, seconds = trial.number, [], 0.0
    values = ", ".join(f"{name} {text.format_value(value)}" for name, value in chosen.items())
    try:
        # Finished executions of a trial that is taken up return at once with their results.
        for execution in range(spec.search.executions):
            which = f", execution {execution + 1} of {spec.search.executions}" if spec.search.executions > 1 else ""
            info(f"trial {number} of {spec.trials}{which}: {values}")
            # Only the first execution reports: a pruner compares one curve a trial.
            reporter = Trial(
                lambda number, score, first=not execution: _report(trial, spec, number, score, first=first)
            )
            train = load_function(VERBS[spec.verb].run)
            began = time.monotonic()
            result = train(spec.run(number, execution, chosen), modules, reporter)
            started.add(time.monotonic() - began, result["seconds"])
            scores.append(float(result["best_score"]))
            seconds += result["seconds"]
            # Without labels there is no top-1 or mAP, and the search selects by agreement.
            trial.set_user_attr("metric", deciding_metric(result))
    except Pruned:
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        info(f"trial {number} is pruned: others were ahead at this step")
        return
    # A full disk or a missing folder would fail every trial; the worker stops, and the trial can be taken up again.
    except OSError:
        raise
    # Values that do not work are a result of the search, not a failure of it.
    except Exception as error:
        fail(trial, study, error)
        return
    # Before `tell`: a trial that has ended can no longer be written to.
    trial.set_user_attr("scores", scores)
    trial.set_user_attr("seconds", round(seconds, 1))
    value = statistics.fmean(scores)
    study.tell(trial, value)
    info(
        f"trial {number}: {percent(value)}; best so far is trial {study.best_trial.number}, {percent(study.best_value)}"
    )


def fail(trial: "optuna.Trial", study: "optuna.Study", error: Exception) -> None:
    """Records that a trial failed and why; errors of the storage are raised, since they are not the trial's."""
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    if isinstance(error, SQLAlchemyError | optuna.exceptions.OptunaError):
        raise error
    reason = first_line(error) if isinstance(error, InputError) else f"{type(error).__name__}: {first_line(error)}"
    trial.set_user_attr("error", reason[:1000])
    study.tell(trial, state=optuna.trial.TrialState.FAIL)
    info(f"trial {trial.number} failed: {reason}")


def _report(trial: "optuna.Trial", spec: SearchSpec, number: int, score: float, *, first: bool) -> None:
    """Reports the score of a trial's first execution, and ends the trial if the pruner decides so.

    Args:
        number: of the evaluation, the unit of the pruners' resources.
    """
    if not first:
        return
    frozen = trial.study.get_trials(deepcopy=False)[trial.number]
    if number not in frozen.intermediate_values:  # else the step is repeated after a stop
        trial.report(score, number)
    if spec.search.pruner != "none" and trial.should_prune():
        raise Pruned


def _listed(numbers: list[int]) -> str:
    return ("trial " if len(numbers) == 1 else "trials ") + ", ".join(map(str, numbers))
