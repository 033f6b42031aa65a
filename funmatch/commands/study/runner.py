"""Carries out a study: its runs as processes, a few at a time, and `results.jsonl`, from which everything is drawn."""

import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from funmatch.commands.study import files as study_files
from funmatch.commands.study import spec
from funmatch.commands.study.results import result_of, results, write_results
from funmatch.commands.study.series import StudyRunner
from funmatch.commands.study.spec import RunSpec
from funmatch.config import Study, recipes
from funmatch.errors import InputError, WorkFailed
from funmatch.ops.tasks.task import task_of_metrics
from funmatch.runtime import devices, functions, signals
from funmatch.runtime.disk.files import write_atomically
from funmatch.runtime.disk.json_files import Damaged
from funmatch.runtime.disk.partials import remove, remove_partials
from funmatch.runtime.disk.records import RecordFolder, list_differences
from funmatch.runtime.log import ProgressBar, info
from funmatch.runtime.text import duration, percent
from funmatch.runtime.time_limit import TimeLimitReached, find_limit
from funmatch.training.evaluation.outcome import deciding_metric
from funmatch.training.run import folder as run_folder
from funmatch.training.teachers import recording

FORMAT = 1
"""Of `plan.json`; version 0.1.0 wrote no number, which is read as 1."""
POLL_SECONDS = 0.2
"""Between two looks at the runs."""


def run(config: Study) -> dict[str, Any]:
    """Carries out all runs of a study that are not over yet.

    Returns:
        `study` (its folder), `runs`, `finished`, `failed` (places to reasons), `seconds`.

    Raises:
        InputError: the file is wrong, or the folder holds runs with other options.
        Interrupted: by a signal, or shortly before the time limit; the runs have saved.
    """
    plan = study_files.load_spec(config)
    folder = (config.out or default_folder(config)).expanduser().resolve()
    # A process each, on its share of the cores; an accelerator has memory for one.
    jobs = config.jobs or (os.cpu_count() or 1 if devices.pick_device("auto").type == "cpu" else 1)
    series = StudyRunner(plan, folder, jobs, limit=find_limit(config.time_limit))
    place = record_folder(folder)
    place.check_place()
    with ExitStack() as stack:
        with place.beginning():
            # Held until the end: a second process would start the same runs.
            stack.enter_context(place.lock())
            _begin(series, config)
        series.tapes = shared_tapes(series) if config.tapes else {}
        try:
            _carry_out(series)
        finally:
            for process in series.at_work:
                # All first, so that they save side by side.
                process.terminate()
            for process in series.at_work:
                process.wait()  # they save first
            record(series)
    return {
        "study": str(folder),
        "runs": len(plan.entries),
        "finished": sum(map(series.done, plan.entries)),
        "failed": series.failed,
        "seconds": sum(result["figures"]["seconds"] for result in results(folder)),
    }


def record_folder(folder: Path) -> RecordFolder:
    """The folder of a study; `plan.json` holds the options of each run by its place."""
    return RecordFolder(folder, "study.toml", "study", {}, number=FORMAT, record_name="plan.json", lock_name=".lock")


def shared_tapes(series: StudyRunner) -> dict[str, Path]:
    """The tapes that runs share which show the same teachers the same views; by the runs' places.

    A run that has begun keeps what it began with, since a tape rounds.
    """
    names = {
        entry.place: (recording.shared_by(entry.knobs), entry.seed)
        for entry in series.plan.entries
        if entry.verb == "distill"
    }
    count = Counter(names.values())
    found = {}
    for place, (name, seed) in names.items():
        begun = _options_of(series.folder / "runs" / place)
        if name and (begun.get("tape") if begun else count[name, seed] > 1):
            found[place] = series.folder / "tapes" / f"{name}-seed-{seed}"
    return found


def _options_of(folder: Path) -> dict[str, Any]:
    """The options with which a run began; {} if it has not, or if its record is damaged, which the run reports."""
    try:
        return run_folder.options_of(folder)
    except InputError:
        return {}


def _remove_needless(series: StudyRunner) -> None:
    """Removes tapes whose runs are over."""
    wanted = {series.tapes.get(entry.place) for entry in (*series.waiting(), *series.at_work.values())}
    for folder in set(series.tapes.values()) - wanted:
        remove(folder)


def default_folder(config: Study) -> Path:
    """The folder of a study without --out: a folder that is one already, or studies/NAME."""
    path = Path(config.name).expanduser()
    return path if path.is_dir() else Path("studies") / path.stem


def check_all_finished(figures: Mapping[str, Any]) -> None:
    """Raises `WorkFailed` if runs failed."""
    if failed := figures["failed"]:
        why = "\n  ".join(f"{place}: {reason}" for place, reason in failed.items())
        folder = Path(figures["study"])
        raise WorkFailed(
            f"{len(failed)} of {figures['runs']} runs failed; the same command tries them again\n  {why}\n"
            f"their output is in {folder / 'logs'}, the results of the others in {folder / 'report.html'}"
        )


def _begin(series: StudyRunner, config: Study) -> None:
    """Records what is requested; an `InputError` where runs of the folder began with other options."""
    place = record_folder(series.folder)
    results(series.folder)  # of a newer format they are refused before anything is written
    now = json.loads(
        json.dumps({entry.place: {"verb": entry.verb, **entry.knobs} for entry in series.plan.entries}, default=str)
    )
    before = _earlier_plan(place)
    differences = []
    for name, options in now.items():
        # Only of runs that have begun: the file may be edited freely until then.
        if run_folder.Run(series.folder / "runs" / name).record.has_begun:
            lines = list_differences(before.get(name, options), options, "in the study")
            differences += [f"{name}: {line}" for line in lines]
    place.refuse(differences, ", or remove the folders of these runs")
    command = ["funmatch", "study", config.name]
    command += [word for name, value in _given(config) for word in (f"--{name}", *map(str, value))]
    # First of all: without it the folder would not pass for a study's at the next start.
    write_atomically(series.folder / "study.toml", series.plan.text)
    place.write(before | now)
    for name in ("runs", "logs"):
        (series.folder / name).mkdir(exist_ok=True)
    write_atomically(series.folder / "command.txt", shlex.join(command) + "\n")


def _earlier_plan(place: RecordFolder) -> dict[str, Any]:
    """The options of the runs of a study by their places, as far as they can be read."""
    try:
        found = place.read() if place.has_begun else {}
    except Damaged:
        return {}  # the record of each run says, too, what was requested of it
    return {name: options for name, options in found.items() if isinstance(options, dict)}


def _given(config: Study) -> list[tuple[str, tuple[Any, ...]]]:
    """The options that change what a study computes."""
    return [(name, value) for name in ("seeds", "only", "set") if (value := getattr(config, name))]


def _carry_out(series: StudyRunner) -> None:
    """Starts runs and waits for them until none is left that could be run."""
    total = len(series.plan.entries)
    finished = total - len(series.waiting())
    if finished:
        info(f"{finished} of {total} runs are finished already")
    series.limit.announce()
    # What a kill has left: of a tape that was being removed, and tapes whose last run had just ended.
    remove_partials(series.folder / "tapes")
    _remove_needless(series)
    with ProgressBar("study", total, finished) as bar, signals.catch_signals() as requests:
        while series.at_work or series.waiting():
            for entry in [] if series.out_of_time else series.ready()[: series.jobs - len(series.at_work)]:
                series.at_work[_started(series, entry)] = entry
            for process in [each for each in series.at_work if each.poll() is not None]:
                _ended(series, series.at_work.pop(process), process.returncode)
                _remove_needless(series)
            _skip_what_needs_failed_runs(series)
            over = total - len(series.waiting()) - len(series.at_work)
            bar.update(over, ", ".join(f"{each.name} ({each.seed})" for each in series.at_work.values()))
            saved = f"{over} of {total} runs are over, the others saved in {series.folder}"
            if requests.stop:
                raise signals.Interrupted(requests.stop, f"{saved}; run the same command again to resume")
            if series.out_of_time and not series.at_work and series.waiting():
                raise TimeLimitReached(series.limit.sentence(saved))
            time.sleep(POLL_SECONDS)


def _started(series: StudyRunner, entry: RunSpec) -> subprocess.Popen:
    """A process that carries out a run; it stops, and saves, when this one dies."""
    options = spec.resolve_references(entry, series.folder / "runs")
    words = [word for option in recipes.options(entry.verb, options) for word in shlex.split(option)]
    place = ["--seed", str(entry.seed), "--out", str(series.at(entry))]
    if shared := series.tapes.get(entry.place):
        place += ["--tape", str(shared), "--tape-full", "go-on"]
    if series.limit.end < float("inf"):
        # Counted from the start of its own process; the margin is left to this one.
        place += ["--time-limit", f"{max(1, series.limit.left):.0f}"]
    series.began[entry.place] = time.monotonic()
    # Runs side by side would otherwise each use all cores, and wait for each other.
    cores = max(1, (os.cpu_count() or 1) // series.jobs)
    with open(series.folder / "logs" / f"{entry.place}.log", "a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "funmatch", entry.verb, *words, *place],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={"OMP_NUM_THREADS": str(cores), **functions.environment_for_words_of_a_file()},
            start_new_session=True,  # else Ctrl-C would reach them as well as us, and a second signal ends at once
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )


def _die_with_parent() -> None:
    """Asks Linux for SIGTERM when the process that started this one ends, however it ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 is PR_SET_PDEATHSIG


def _ended(series: StudyRunner, entry: RunSpec, code: int) -> None:
    """Records what became of a run."""
    if series.done(entry):
        # Now, not at the end: a study that is killed keeps the results so far.
        record(series)
        result = run_folder.find_run(series.at(entry)).result or {}
        task = task_of_metrics(result)
        if result[task.score] is not None:
            figure = f"{task.shown} {percent(result[task.score])}"
        elif result["kl"] is not None:
            figure = f"KL {result['kl']:.3f}"
        else:  # of features alone
            figure = f"{(name := deciding_metric(result))} {percent(result.get(name))}"
        info(f"{entry.name}, seed {entry.seed}: {figure}, {duration(result['seconds'])}")
        series.started.add(time.monotonic() - series.began[entry.place], result["seconds"])
        return
    if code == 0:
        series.stopped += 1  # a run without a result has succeeded in stopping in time
        return
    lines = (series.folder / "logs" / f"{entry.place}.log").read_text(errors="replace").splitlines()
    # Our own last message; else the end of the output, without the frames of the parser's boxes.
    messages = [number for number, line in enumerate(lines) if line.startswith("funmatch: ")]
    words = lines[messages[-1] :] if messages else [line for line in lines[-8:] if line.strip(" ─╭╮╰╯│")]
    reason = " ".join(line.strip(" │") for line in words) or "no message"
    series.failed[entry.place] = f"exit {code}: {reason.removeprefix('funmatch: ')}"
    info(f"{entry.name}, seed {entry.seed} failed, {series.failed[entry.place]}")


def _skip_what_needs_failed_runs(series: StudyRunner) -> None:
    for entry in series.waiting():
        if bad := next((need for need in entry.needs if need in series.failed), None):
            series.failed[entry.place] = f"it needs {bad}, which failed"


def record(series: StudyRunner) -> None:
    """Writes the results of the runs that are over, in the order of the study; those of other studies stay."""
    known = {result["place"]: result for result in results(series.folder)}
    own = {entry.place: result_of(entry, series.at(entry)) for entry in series.plan.entries if series.done(entry)}
    planned = {entry.place for entry in series.plan.entries}
    left = {place: result for place, result in known.items() if place not in planned}
    write_results(series.folder, (*own.values(), *left.values()))
