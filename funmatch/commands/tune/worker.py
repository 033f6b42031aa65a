"""Searching knobs: trials chosen by Optuna, carried out one after the other, judged by validation alone.

A worker holds a lock in the folder of the trial that it is at, which the operating system takes away when the worker
ends, however that may be. So a trial that the storage calls running and nobody holds was left, and whoever comes next
goes on with it where its runs stand.
"""

import gc
import math
import shutil
import statistics
import time
from collections.abc import Mapping
from typing import IO, TYPE_CHECKING, Any

import torch

from funmatch.commands.tune import search, summary
from funmatch.commands.tune.search import SearchSpec
from funmatch.commands.tune.space import Value
from funmatch.commands.verbs import VERBS, load_function
from funmatch.config import Search
from funmatch.errors import InputError, first_line
from funmatch.runtime import text
from funmatch.runtime.files import file_lock, try_lock_file
from funmatch.runtime.log import info
from funmatch.runtime.text import percent
from funmatch.training.setup import Trial
from funmatch.training.teachers.loading import Modules

if TYPE_CHECKING:  # Optuna is an extra
    import optuna

POLL_SECONDS = 0.5
"""Between two looks at what the other workers have done."""
ENDED = ("COMPLETE", "PRUNED", "FAIL")


class Pruned(Exception):
    """The pruner has seen enough of a trial."""


def run(config: Search, given: Modules | None = None) -> dict[str, Any]:
    """Searches until all trials have ended, whoever carries them out, and returns what `result.json` holds.

    Args:
        given: modules from Python, by the names that stand for them.

    Returns:
        `trials` (a row each), `best` (the number of one, None where all failed), `best_run`, `knobs` of it, `score`
        (what was chosen by), `value`, `importance`, `test` (the figures of the best trial), `seen`, `command`, `study`.

    Raises:
        InputError: what is asked cannot be, or the storage cannot be used.
        Stopped: by Ctrl-C or SIGTERM, after saving.
    """
    try:
        from funmatch.commands.tune import optuna_storage
    except ImportError as error:
        if error.name not in ("optuna", "sqlalchemy"):
            raise
        raise InputError("funmatch tune needs Optuna: pip install 'funmatch[tune]'") from None
    asked = search.read_spec(config)
    if result := summary.finish_summary(asked):
        search.begin_search(asked.folder, search.record_of(asked, optuna_storage.display_url(asked.place)))
        info(f"{asked.folder} is finished after {len(result['trials'])} trials; nothing to do")
        return result
    with optuna_storage.working_trials(asked.place):
        study = open_study(asked)
        try:
            work(study, asked, given or {})
        finally:
            gc.unfreeze()
        with file_lock(asked.folder / ".end"):
            result = summary.finish_summary(asked) or summary.end_summary(study, asked, given or {})
            shutil.rmtree(asked.tapes, ignore_errors=True)  # nobody needs them any more
            return result


def open_study(asked: SearchSpec) -> "optuna.Study":
    """The study in its folder and storage: the one that is there if it was asked the same, or a new one.

    Raises:
        InputError: there is another, or the storage cannot be used.
    """
    import optuna

    from funmatch.commands.tune import optuna_storage

    chooser = optuna_storage.SeededSampler(asked.search.sampler, asked.search.sampler_seed, asked.space, asked.first)
    evaluations = math.ceil((asked.base.steps or 0) / asked.base.eval_every)
    pruner = optuna_storage.pruner_of(asked.search.pruner, evaluations)
    if optuna_storage.is_url(asked.place):
        optuna_storage.check_reachable(asked.place)
    with search.record_folder(asked.folder).beginning():
        record = search.begin_search(asked.folder, search.record_of(asked, optuna_storage.display_url(asked.place)))
        storage, parts = optuna_storage.storage_at(asked.place), {"sampler": chooser, "pruner": pruner}
        try:
            study = optuna.load_study(study_name=asked.name, storage=storage, **parts)
        except KeyError:
            study = optuna.create_study(storage=storage, study_name=asked.name, direction="maximize", **parts)
        known = study.user_attrs.get("id")
        if known is None and not study.get_trials(deepcopy=False):
            study.set_user_attr("id", record["id"])
        elif known != record["id"]:
            where = f"{optuna_storage.display_url(asked.place)} holds a study {asked.name!r}"
            raise InputError(
                f"{where} that is not the one of {asked.folder}; pass --study-name with a name of its own, "
                "or another --storage"
            )
    return study


def work(study: "optuna.Study", asked: SearchSpec, given: Modules) -> None:
    """Carries out trials until none is left to begin or to take up, and waits for those of other workers."""
    waiting = False
    while True:
        taken, others = next_trial(study, asked)
        if taken is None:
            if not others:
                return
            if not waiting:
                info(f"no trial is left to begin; waiting for {_listed(others)}, which other workers are at")
            waiting = True
            time.sleep(POLL_SECONDS)
            continue
        trial, lock = taken
        waiting = False
        with lock:
            run_trial(trial, study, asked, given)
        gc.collect()
        gc.freeze()  # what has outlived a trial need not be looked through after the next
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()


def next_trial(study: "optuna.Study", asked: SearchSpec) -> tuple[tuple["optuna.Trial", IO[str]] | None, list[int]]:
    """A trial to carry out, with its lock: one that was left, else a new one; and those that others are at."""
    from funmatch.commands.tune import optuna_storage

    with file_lock(asked.folder / ".lock"):
        trials = study.get_trials(deepcopy=False)
        others = []
        for number in [frozen.number for frozen in trials if frozen.state.name not in ENDED]:
            lock = hold_trial(asked, number)
            if lock is None:
                others.append(number)
            elif study.get_trials(deepcopy=False)[number].state.name in ENDED:
                lock.close()  # its worker let go of it after we had read the storage
            else:
                trial = optuna_storage.resume_trial(study, number)
                optuna_storage.suggest(trial, asked.space)
                return (trial, lock), others
        if len(trials) >= asked.trials:
            return None, others
        trial = study.ask()
        lock = hold_trial(asked, trial.number)
        assert lock, "a new trial is nobody else's"
        optuna_storage.suggest(trial, asked.space)
        return (trial, lock), others


def hold_trial(asked: SearchSpec, number: int) -> IO[str] | None:
    """The lock of a trial, None where another worker has it."""
    folder = asked.trial_folder(number)
    folder.mkdir(parents=True, exist_ok=True)
    return try_lock_file(folder / ".lock")


def run_trial(trial: "optuna.Trial", study: "optuna.Study", asked: SearchSpec, given: Modules) -> None:
    """Runs a trial, as often as executions are asked for, and records how it ended.

    What goes wrong in it is the trial's own end, unless it is the disk or a person who stops it.
    """
    import optuna

    chosen: Mapping[str, Value] = trial.params
    number, scores, seconds = trial.number, [], 0.0
    told = ", ".join(f"{name} {text.format_value(value)}" for name, value in chosen.items())
    try:
        for execution in range(asked.search.executions):
            which = f", execution {execution + 1} of {asked.search.executions}" if asked.search.executions > 1 else ""
            info(f"trial {number} of {asked.trials}{which}: {told}")
            reporter = Trial(lambda step, score, first=not execution: _report(trial, asked, step, score, first=first))
            train = load_function(VERBS[asked.verb].run)
            result = train(asked.run(number, execution, chosen), given, reporter)
            scores.append(float(result["best_score"]))
            seconds += result["seconds"]
            trial.set_user_attr("metric", "top1" if result["top1"] is not None else "agreement")
    except Pruned:
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        info(f"trial {number} is given up: others were ahead at this step")
        return
    except OSError:
        raise
    except Exception as error:
        fail(trial, study, error)
        return
    trial.set_user_attr("scores", scores)
    trial.set_user_attr("seconds", round(seconds, 1))
    value = statistics.fmean(scores)
    study.tell(trial, value)
    info(
        f"trial {number}: {percent(value)}; best so far is trial {study.best_trial.number}, {percent(study.best_value)}"
    )


def fail(trial: "optuna.Trial", study: "optuna.Study", error: Exception) -> None:
    """Records that a trial failed and why; the storage's own failing is nobody's trial."""
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    if isinstance(error, SQLAlchemyError | optuna.exceptions.OptunaError):
        raise error
    reason = first_line(error) if isinstance(error, InputError) else f"{type(error).__name__}: {first_line(error)}"
    trial.set_user_attr("error", reason[:1000])
    study.tell(trial, state=optuna.trial.TrialState.FAIL)
    info(f"trial {trial.number} failed: {reason}")


def _report(trial: "optuna.Trial", asked: SearchSpec, step: int, score: float, *, first: bool) -> None:
    """Tells the storage how a trial goes, in its first execution, and ends it if the pruner says so."""
    number = math.ceil(step / asked.base.eval_every)
    if not first:
        return
    frozen = trial.study.get_trials(deepcopy=False)[trial.number]
    if number not in frozen.intermediate_values:  # else the step is walked again after a stop
        trial.report(score, number)
    if asked.search.pruner != "none" and trial.should_prune():
        raise Pruned


def _listed(numbers: list[int]) -> str:
    return ("trial " if len(numbers) == 1 else "trials ") + ", ".join(map(str, numbers))
