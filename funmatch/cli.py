"""The command line: words in, words out. Heavy libraries are imported by the verb that needs them."""

import json
import os
import signal
import sys
import warnings
from collections.abc import Callable
from errno import EDQUOT, ENOSPC
from io import TextIOWrapper
from typing import Any

from funmatch.argv import DistillMany, apply_recipe, merge_repeated, parse_options, split_students, split_subject
from funmatch.config import (
    SEARCHED,
    TAUGHT,
    Data,
    Demo,
    Distill,
    Evaluate,
    Finetune,
    Import,
    Models,
    Plan,
    Prepare,
    Recipes,
    Report,
    Search,
    Study,
    Tape,
    Train,
    help,
)
from funmatch.config.options import Options
from funmatch.errors import InputError, WorkFailed, is_out_of_memory, unknown
from funmatch.runtime import env
from funmatch.runtime.env import reported_elsewhere
from funmatch.version import __version__

TABLES: dict[str, type[Options]] = {
    "demo": Demo,
    "finetune": Finetune,
    "distill": Distill,
    "train": Train,
    "evaluate": Evaluate,
    "prepare": Prepare,
    "data": Data,
    "models": Models,
    "import": Import,
    "recipes": Recipes,
    "plan": Plan,
    "tune": Search,
    "study": Study,
    "tape": Tape,
    "report": Report,
}


def main(arguments: list[str] | None = None) -> None:
    """Runs one verb and exits: 0 when it is done, 1 when nothing came of it, 2 for input that cannot be used, 128 + n
    after signal n."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files are whatever bytes they are
    try:
        config = parse(arguments)
        for library in ("timm", "PIL"):  # what these say is for programmers
            warnings.filterwarnings("ignore", category=UserWarning, module=library)
        figures, show = VERBS[arguments[0]](config)
        if env.is_main_process() and config.as_json:
            print(json.dumps(figures))
        elif env.is_main_process():
            show(figures)
        sys.stdout.flush()
    except InputError as error:
        _fail(error, str(error))
    except WorkFailed as error:
        _tell(error, f"funmatch: {error}")
        sys.exit(1)
    except KeyboardInterrupt as stopped:
        _tell(stopped, str(stopped) or "stopped")
        sys.exit(128 + getattr(stopped, "number", signal.SIGINT))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            _fail(error, "out of memory; --micro-batch, --teacher-batch or --grad-checkpointing needs less")
        if "home directory" not in str(error):  # as Python says that there is no such user
            raise
        _fail(error, f"a path begins with ~ and the name of a user that does not exist here: {error}")
    except OSError as error:
        if error.errno in (ENOSPC, EDQUOT):
            _fail(error, f"the disk is full{_where(error)}; make room, then start the same command again")
        _fail(error, f"{error.strerror or error}{_where(error)}; choose another place, or put it right")
    sys.exit(0)


def parse(arguments: list[str]) -> Options:
    """The verb's table from words; help, and whatever tyro finds wrong, end the program."""
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:], "--help"]
    verb = arguments[0] if arguments else "--help"
    if verb in ("-V", "--version"):
        print(f"funmatch {__version__}")
        sys.exit(0)
    if verb in ("-h", "--help"):
        print(help.overview(TABLES))
        sys.exit(0)
    if verb not in TABLES:
        raise unknown("verb", verb, TABLES)
    if env.world_size() > 1 and verb not in TAUGHT:
        raise InputError(f"{verb} is work for one process; several can share: {', '.join(TAUGHT)}")
    words, told, taught = arguments[1:], env.is_main_process(), verb
    table: Any = TABLES[verb]
    if verb in ("tune", "plan"):
        words, taught = split_subject(words, verb)
        table = (SEARCHED if verb == "tune" else TAUGHT)[taught]
    named = f"{verb} VERB|RECIPE" if verb in ("tune", "plan") else f"{verb} [RECIPE]" if verb in TAUGHT else verb
    if help.asks_for_help(words):
        print(
            help.help_of(
                verb if verb == taught else f"{verb} {taught}", table, everything="--help-all" in words, usage=named
            )
        )
        sys.exit(0)
    words, students = split_students(words) if verb == "distill" else (words, ())
    words, default = merge_repeated(words, table), None
    if taught in TAUGHT:
        words, default = apply_recipe(words, taught, table)
    config = parse_options(words, table, f"funmatch {named}", default, show=told)
    config.check()
    return DistillMany(**config.model_dump(), students=students) if len(students) > 1 else config


def _fail(error: Exception, message: str) -> None:
    _tell(error, f"funmatch: {message}")
    sys.exit(2)


def _tell(error: BaseException, message: str) -> None:
    """Says why the program ends, unless another process of the run does."""
    if not reported_elsewhere(error):
        print(message, file=sys.stderr)


def _where(error: OSError) -> str:
    return f" at {error.filename}" if error.filename else ""


def _demo(config: Demo):
    from funmatch.commands import demo

    figures = demo.run(config)

    def show(figures: dict[str, Any]) -> None:
        demo.show(figures)
        print(f"report: {figures['report']}")

    return figures, show


def _distill(config: Distill):
    from funmatch.training import distill, distill_many

    if isinstance(config, DistillMany):
        configs = distill_many.split_by_student(config, config.students)
        told = distill_many.run(configs)["runs"]
        made = [_taught(figures, each) for figures, each in zip(told, configs, strict=True)]

        def show(_: dict[str, Any]) -> None:
            for figures, show_one in made:
                show_one(figures)

        return {"runs": [figures for figures, _ in made]}, show

    return _taught(distill.run(config), config)


def _train(config: Train):
    from funmatch.training import train

    return _taught(train.run(config), config)


def _finetune(config: Finetune):
    from funmatch.training import finetune

    return _taught(finetune.run(config), config)


def _taught(figures: dict[str, Any], config: Train):
    from funmatch.reports import run_page, tables

    page = run_page.write_if_finished(config.out.expanduser())
    return figures | {"report": str(page)}, lambda figures: tables.show(figures, f"{figures['run']}")


def _plan(config: Train):
    from funmatch.commands import plan
    from funmatch.reports import run_page  # noqa: F401  (a run draws one in the end, so what its import takes is planned)

    return plan.run(config, loading=env.seconds_since_start()), plan.show


def _tune(config: Search):
    from funmatch.commands.tune import run as tune_run
    from funmatch.commands.tune import worker

    figures = worker.run(config)
    return figures | {"report": str(tune_run.write_page(figures))}, tune_run.show


def _study(config: Study):
    from funmatch.commands.study import run as study_run

    if not config.name:
        return study_run.list_studies(), study_run.show_studies
    return study_run.run(config), study_run.show


def _tape(config: Tape):
    from funmatch.commands import tape as tape_command

    return tape_command.run(config), tape_command.show


def _evaluate(config: Evaluate):
    from funmatch.reports import tables
    from funmatch.training import evaluate

    return evaluate.run(config), lambda figures: tables.show(figures, figures["model"])


def _import(config: Import):
    from funmatch.commands import models

    figures = models.import_model(config)
    return figures, models.show_imported


def _models(config: Models):
    from funmatch.commands import models

    return models.list_models(config), models.show_models


def _recipes(config: Recipes):
    from funmatch.commands import recipes

    return recipes.run(config), recipes.show


def _report(config: Report):
    from funmatch.reports import run_page

    page = run_page.run(config)
    return {"report": str(page), "runs": [str(run) for run in config.runs]}, lambda figures: print(figures["report"])


def _prepare(config: Prepare):
    from funmatch.commands import prepare

    return prepare.run(config), prepare.show


def _data(config: Data):
    from funmatch.commands import data as data_command
    from funmatch.commands import prepare

    return data_command.run(config), prepare.show


VERBS: dict[str, Callable[[Any], tuple[dict[str, Any], Callable[[dict[str, Any]], None]]]] = {
    "demo": _demo,
    "distill": _distill,
    "train": _train,
    "finetune": _finetune,
    "plan": _plan,
    "tune": _tune,
    "study": _study,
    "tape": _tape,
    "evaluate": _evaluate,
    "report": _report,
    "prepare": _prepare,
    "data": _data,
    "import": _import,
    "models": _models,
    "recipes": _recipes,
}
"""Each takes its table and gives the figures, and a function that shows them to people."""
