"""The command line: words in, words out. Heavy libraries are imported by the verb that needs them."""

import json
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from errno import EDQUOT, ENOSPC
from io import TextIOWrapper

from funmatch.argv import DistillMany, apply_recipe, merge_repeated, parse_options, split_students, split_subject
from funmatch.commands.verbs import TABLES, VERBS, find_verb, load_function, run_students, run_verb
from funmatch.config import TAUGHT, help
from funmatch.config.options import Options
from funmatch.errors import InputError, WorkFailed, is_out_of_memory
from funmatch.reports.result import Result
from funmatch.runtime import env
from funmatch.runtime.env import reported_elsewhere
from funmatch.version import __version__


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
        carry_out(arguments[0], config)
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


def carry_out(verb: str, config: Options) -> None:
    """Runs a verb, and prints its result on the first process."""
    several = isinstance(config, DistillMany)
    results = run_students(config, config.students) if several else [run_verb(verb, config)]
    if not env.is_main_process():
        return
    if config.as_json:
        objects = [each.to_json() for each in results]
        print(json.dumps({"runs": objects} if several else objects[0]))
    else:
        show(verb, results)


def show(verb: str, results: Sequence[Result]) -> None:
    """Prints the results of a verb for people."""
    for each in results:
        load_function(VERBS[verb].show)(each)


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
    known = find_verb(verb)
    if env.world_size() > 1 and verb not in TAUGHT:
        raise InputError(f"{verb} is work for one process; several can share: {', '.join(TAUGHT)}")
    words, told, taught = arguments[1:], env.is_main_process(), verb
    table = known.table
    if known.subjects:
        words, taught = split_subject(words, verb)
        table = known.subjects[taught]
    named = f"{verb} VERB|RECIPE" if known.subjects else f"{verb} [RECIPE]" if verb in TAUGHT else verb
    if help.asks_for_help(words):
        subject = verb if verb == taught else f"{verb} {taught}"
        print(help.help_of(subject, table, everything="--help-all" in words, usage=named))
        sys.exit(0)
    words, students = split_students(words) if verb == "distill" else (words, ())
    words, default = merge_repeated(words, table), None
    if taught in TAUGHT:
        words, default = apply_recipe(words, taught, table)
    config = parse_options(words, table, f"funmatch {named}", default, show=told)
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
