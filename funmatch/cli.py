"""The command line: words in, words out. Heavy libraries are imported by the verb that needs them."""

import json
import os
import signal
import sys
import warnings
from errno import EDQUOT, ENOSPC
from io import TextIOWrapper
from pathlib import Path

from funmatch.argv import (
    Command,
    default_table,
    given_options,
    merge_repeated,
    parse_options,
    split_recipe,
    split_students,
    split_subject,
    values_of,
)
from funmatch.commands import completion
from funmatch.commands.verbs import TABLES, find_verb, run_students, run_verb, show
from funmatch.config import TAUGHT, Distill, help
from funmatch.config.options import Options
from funmatch.config.sources.layers import COMMAND_LINE, layers_below
from funmatch.errors import InputError, WorkFailed, is_out_of_memory
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
        command = read_command(arguments)
        for library in ("timm", "PIL"):  # what these say is for programmers
            warnings.filterwarnings("ignore", category=UserWarning, module=library)
        carry_out(command)
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


def carry_out(command: Command) -> None:
    """Runs a verb, and prints its result on the first process."""
    verb, options, students = command.verb, command.options, command.students
    if students and isinstance(options, Distill):
        results = run_students(options, students, command.sources)
    else:
        results = [run_verb(verb, options, sources=command.sources)]
    if not env.is_main_process():
        return
    if options.as_json:
        objects = [each.to_json() for each in results]
        print(json.dumps({"runs": objects} if students else objects[0]))
    else:
        for each in results:
            show(verb, options, each)


def parse(arguments: list[str]) -> Options:
    """The verb's table from words; help, and whatever tyro finds wrong, end the program."""
    return read_command(arguments).options


def read_command(arguments: list[str]) -> Command:
    """The command that words are; help, and whatever tyro finds wrong, end the program."""
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:], "--help"]
    verb = arguments[0] if arguments else "--help"
    if verb in ("-V", "--version"):
        print(f"funmatch {__version__}")
        sys.exit(0)
    if verb in ("-h", "--help"):
        print(help.overview(TABLES))
        sys.exit(0)
    if verb == "--print-completion":
        print(completion.script(arguments[1] if len(arguments) > 1 else ""))
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
    words, recipe = split_recipe(merge_repeated(words, table)) if taught in TAUGHT else (words, None)
    given, files = given_options(words, table), values_of("--config", words)
    layers = layers_below(table, taught, given, Path(files[-1]) if files else None, recipe)
    default = default_table(table, layers.values) if files or recipe else None
    options = parse_options(words, table, f"funmatch {named}", default, show=told)
    sources = {name: layers.source_of(name, given, COMMAND_LINE) for name in table.model_fields}
    return Command(verb, options, students if len(students) > 1 else (), sources)


def _fail(error: Exception, message: str) -> None:
    _tell(error, f"funmatch: {message}")
    sys.exit(2)


def _tell(error: BaseException, message: str) -> None:
    """Says why the program ends, unless another process of the run does."""
    if not reported_elsewhere(error):
        print(message, file=sys.stderr)


def _where(error: OSError) -> str:
    return f" at {error.filename}" if error.filename else ""
