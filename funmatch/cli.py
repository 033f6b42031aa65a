"""Runs the command line: parses the arguments, runs the command, prints its result, and sets the exit code.

Heavy libraries are imported by the commands that need them, so that help and mistakes take no seconds.
"""

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
    flag_problems,
    given_options,
    merge_repeated,
    parse_options,
    split_first,
    split_students,
    split_subject,
    values_of,
)
from funmatch.commands.common import completion
from funmatch.commands.verbs import TABLES, find_verb, run_students, run_verb, show
from funmatch.config import TAUGHT, Distill, help
from funmatch.config.options import Options, listed
from funmatch.config.sources.layers import COMMAND_LINE, layers_below
from funmatch.errors import InputError, WorkFailed, is_out_of_memory, printable
from funmatch.runtime import env, signals
from funmatch.runtime.env import reported_elsewhere
from funmatch.runtime.functions import allow_words
from funmatch.version import __version__


def main(arguments: list[str] | None = None) -> None:
    """Runs one command and exits: 0 after success, 1 after a failure, 2 for invalid input, 128 + n after signal n.

    Args:
        arguments: those of the command; None: of this program, whose signals are then handled.
    """
    if arguments is None:
        signals.exit_on_signals()
    arguments = sys.argv[1:] if arguments is None else arguments
    allow_words(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names can be any bytes
    try:
        command = read_command(arguments)
        for library in ("timm", "PIL"):  # their warnings address programmers
            warnings.filterwarnings("ignore", category=UserWarning, module=library)
        carry_out(command)
        # Here, so that a full disk or a closed pipe is an error of this block and not of Python's exit.
        sys.stdout.flush()
    except InputError as error:
        _fail(error, str(error))
    except WorkFailed as error:
        _tell(error, f"funmatch: {error}")
        sys.exit(1)
    except KeyboardInterrupt as stopped:
        _tell(stopped, str(stopped) or "stopped")
        # Our own `Interrupted` knows its signal; a plain KeyboardInterrupt comes from Ctrl-C.
        sys.exit(getattr(stopped, "exit_code", 128 + signal.SIGINT))
    except BrokenPipeError:
        # As Python's documentation advises: flushing at exit would raise the error once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (RuntimeError, MemoryError) as error:
        # torch reports it as a RuntimeError, among which it must be found first.
        if is_out_of_memory(error):
            _fail(error, "out of memory; reduce it with --micro-batch, --teacher-batch or --grad-checkpointing")
        if "home directory" not in str(error):  # pathlib's message for ~user if the user does not exist
            raise
        _fail(error, f"a path starts with ~ and a user name that does not exist on this machine: {error}")
    except OSError as error:
        # A quota that is used up is the same to the user as a full disk.
        if error.errno in (ENOSPC, EDQUOT):
            _fail(error, f"the disk is full{_where(error)}; free some space, then rerun the same command")
        _fail(error, f"{error.strerror or error}{_where(error)}; choose another path, or fix the cause")
    sys.exit(0)


def carry_out(command: Command) -> None:
    """Runs a command, and prints its result on the main process."""
    verb, options, students = command.verb, command.options, command.students
    if students and isinstance(options, Distill):
        results = run_students(options, students, command.sources)
    else:
        results = [run_verb(verb, options, sources=command.sources)]
    # Under torchrun every process has the result, and one prints it.
    if not env.is_main_process():
        return
    if options.as_json:
        objects = [each.to_json() for each in results]
        print(json.dumps({"runs": objects} if students else objects[0]))
    else:
        for each in results:
            show(verb, options, each)


def parse(arguments: list[str]) -> Options:
    """Parses arguments into the command's options; help and parsing errors end the program."""
    return read_command(arguments).options


def read_command(arguments: list[str]) -> Command:
    """Parses arguments into a command; help and parsing errors end the program.

    Raises:
        InputError: the command, recipe or file of options is unknown or invalid.
    """
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
        raise InputError(f"{verb} runs in a single process; only {', '.join(TAUGHT)} support torchrun")
    words, subject, table = arguments[1:], verb, known.table
    if known.subjects:
        words, subject = split_subject(words, verb)
        table = known.subjects[subject]
    first = " [RECIPE|RUN]" if verb == "distill" else " [RECIPE]" if verb in TAUGHT else ""
    usage = f"{verb} COMMAND|RECIPE" if known.subjects else f"{verb}{first}"
    name = verb if verb == subject else f"{verb} {subject}"
    # Before the parser, which would report other mistakes instead of helping with them.
    if help.asks_for_help(words):
        print(help.help_of(name, table, everything="--help-all" in words, usage=usage))
        sys.exit(0)
    words, students = split_students(words) if verb == "distill" else (words, ())
    words, recipe, run = split_first(merge_repeated(words, table), verb) if subject in TAUGHT else (words, None, None)
    names, files = given_options(words, table), values_of("--config", words)
    # The last of several files, as the parser takes the last of any option.
    layers = layers_below(table, subject, names, Path(files[-1]) if files else None, recipe, run)
    if problems := flag_problems(words, table, name, {*names, *layers.values}):
        raise InputError(listed(problems))
    # None without a file, a recipe or a run: the parser then takes the table's own defaults.
    default = default_table(table, layers.values) if files or recipe or run else None
    options = parse_options(words, table, f"funmatch {usage}", default, show=env.is_main_process())
    sources = {name: layers.source_of(name, names, COMMAND_LINE) for name in table.model_fields}
    return Command(verb, options, students if len(students) > 1 else (), sources)


def _fail(error: Exception, message: str) -> None:
    _tell(error, f"funmatch: {message}")
    sys.exit(2)


def _tell(error: BaseException, message: str) -> None:
    """Prints why the program ends, unless another process of the run prints it."""
    if not reported_elsewhere(error):
        print(printable(message), file=sys.stderr)


def _where(error: OSError) -> str:
    return f" at {error.filename}" if error.filename else ""
