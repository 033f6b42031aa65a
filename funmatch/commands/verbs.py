"""Runs a command by its name and writes its page, for the command line, Python and notebooks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from funmatch import config
from funmatch.commands.common.imports import no_collections
from funmatch.commands.common.neighbours import command_hint
from funmatch.config import SEARCHED, tools
from funmatch.config.options import Options
from funmatch.errors import InputError, unknown
from funmatch.reports.result import Result
from funmatch.runtime import signals


@dataclass(frozen=True)
class Verb:
    """A row of the table of commands. Functions are named as `package.module:function`, and imported when they are
    needed: torch takes seconds, and most command lines need none.

    Attributes:
        table: the class of its options.
        run: takes that table, and modules from Python where models are named; gives a `Result`, or metrics.
        show: prints the `Result` for people.
        page: takes the run folder and returns the path of its page, for commands that write one and return metrics.
        subjects: for a command that is followed by another (`tune distill`): the table for each.
        loads: the libraries that importing `run` loads and that take seconds; empty where there are none.
    """

    table: type[Options]
    run: str
    show: str
    page: str | None = None
    subjects: Mapping[str, type[Options]] = field(default_factory=dict)
    loads: str = "PyTorch and timm"


RUN_PAGE, RUN_TABLE = "reports.run_page:write_if_finished", "reports.tables:show"

VERBS: dict[str, Verb] = {
    "demo": Verb(tools.Demo, "commands.demo:run", "commands.demo:show"),
    "finetune": Verb(config.Finetune, "training.finetune:run", RUN_TABLE, page=RUN_PAGE),
    "distill": Verb(config.Distill, "training.distill:run", RUN_TABLE, page=RUN_PAGE),
    "train": Verb(config.Train, "training.train:run", RUN_TABLE, page=RUN_PAGE),
    "evaluate": Verb(config.Evaluate, "reports.evaluation.page:run", "reports.evaluation.terminal:show"),
    "predict": Verb(config.Predict, "commands.predict:run", "commands.predict:show"),
    "embed": Verb(config.Embed, "commands.embed:run", "commands.embed:show"),
    "config": Verb(tools.Config, "commands.config:run", "commands.config:show", loads=""),
    "export": Verb(config.Export, "commands.export:run", "commands.export:show"),
    "prepare": Verb(config.Prepare, "commands.images.prepare:run", "commands.images.prepare:show", loads="PyTorch"),
    "data": Verb(config.Data, "commands.images.data:run", "commands.images.prepare:show", loads="PyTorch"),
    "select": Verb(config.Select, "commands.images.select:run", "commands.images.select:show"),
    "cache": Verb(config.Cache, "commands.images.cache:run", "commands.images.cache:show", loads=""),
    "models": Verb(
        tools.Models, "commands.networks.models:list_models", "commands.networks.models:show_models", loads=""
    ),
    "benchmark": Verb(config.Benchmark, "commands.benchmark:run", "commands.benchmark:show"),
    "import": Verb(
        tools.Import, "commands.networks.import_model:import_model", "commands.networks.import_model:show_imported"
    ),
    "head": Verb(config.Head, "commands.networks.head:run", "commands.networks.head:show"),
    "recipes": Verb(tools.Recipes, "commands.recipes:run", "commands.recipes:show"),
    "plan": Verb(config.Plan, "commands.plan:run", "commands.plan:show", subjects=config.PLANNED),
    "tune": Verb(config.Search, "commands.tune.run:run", "commands.tune.run:show", subjects=SEARCHED),
    "study": Verb(tools.Study, "commands.study.run:run", "commands.study.run:show"),
    "replay": Verb(tools.Replay, "commands.replay:run", "commands.replay:show"),
    "tape": Verb(tools.Tape, "commands.tape:run", "commands.tape:show"),
    "report": Verb(tools.Report, "reports.run_page:run", "reports.run_page:show"),
}
"""Every command, in the order of `funmatch --help`. A new one: its table in `config.tools`, its file, its row here."""
DRY_RUN = Verb(config.Train, "commands.common.dry_run:run", "commands.common.dry_run:show")
"""Takes the place of a command under `--dry-run`."""
TABLES: dict[str, type[Options]] = {name: verb.table for name, verb in VERBS.items()}
"""The options of each command."""


def load_function(name: str) -> Callable[..., Any]:
    """The function that `package.module:function` names."""
    module, _, function = name.partition(":")
    return getattr(import_module(f"funmatch.{module}"), function)


def find_verb(name: str) -> Verb:
    """Looks a command up by its name.

    Raises:
        InputError: there is no such command.
    """
    if name not in VERBS:
        if name.startswith("-") and config.Distill.field_of(name):
            raise InputError(f"{name!r} is an option; the command comes first: funmatch distill {name} …")
        hint = command_hint(name)
        raise InputError(f"unknown command {name!r}; {hint}") if hint else unknown("command", name, VERBS)
    return VERBS[name]


def run_verb(
    name: str,
    options: Options,
    modules: Mapping[str, Any] | None = None,
    sources: Mapping[str, str] | None = None,
) -> Result:
    """Runs a command and writes its page.

    Args:
        options: its table.
        modules: models from Python, by the names that stand for them in `options`.
        sources: where the value of each option comes from, for a dry run to show.

    Raises:
        InputError: every problem of the options, before anything is read or written.
    """
    verb = find_verb(name)
    options.check()  # here, for all commands, from wherever they are called
    # Only where something is named or written: the readers of data take a moment to import.
    if type(options).where(lambda opt: opt.refers is not None or opt.function):
        with no_collections():
            check = load_function("commands.common.preflight:check")
        check(name, options)
    _announce(name)
    if is_dry_run(options):
        return load_function(DRY_RUN.run)(options, modules or {}, sources or {})
    with no_collections():
        run = load_function(verb.run)
    signals.raise_on_signals(options.save_signals if isinstance(options, config.Train) else ())
    # Only commands that name models take modules.
    found = run(options, modules) if modules else run(options)
    return found if isinstance(found, Result) else _with_page(verb, found, options)


def run_students(
    options: config.Distill, students: Sequence[str], sources: Mapping[str, str] | None = None
) -> list[Result]:
    """Distils several students of the same teacher side by side, and writes the page of each."""
    # Before they are split: a problem is reported once and not for every student.
    options.check()
    load_function("commands.common.preflight:check_students")(options, students)
    _announce("distill")
    from funmatch.training import distill_many

    signals.raise_on_signals(options.save_signals)
    each = distill_many.split_by_student(options, students)
    for one in each:
        load_function("commands.common.preflight:check")("distill", one)
    if is_dry_run(options):
        return [run_verb("distill", one, sources=sources) for one in each]
    metrics = distill_many.run(each)["runs"]
    return [_with_page(VERBS["distill"], found, one) for found, one in zip(metrics, each, strict=True)]


def _announce(name: str) -> None:
    """Says what is loaded, before the import that takes seconds, or a person would wait for the first word."""
    if VERBS[name].loads:
        load_function("runtime.log:info_loading")(name, VERBS[name].loads)


def is_dry_run(options: Options) -> bool:
    """Whether a run is only to be described."""
    return isinstance(options, config.Train) and options.dry_run


def show(name: str, options: Options, result: Result) -> None:
    """Prints the result of a command for people."""
    if is_dry_run(options):
        load_function(DRY_RUN.show)(result, type(options))
    else:
        load_function(VERBS[name].show)(result)


def _with_page(verb: Verb, metrics: dict[str, Any], options: Options) -> Result:
    """The metrics of a run, or of an evaluated model, with the run's folder and page."""
    if verb.page is None:
        # A model that was evaluated by its name has no run folder.
        return Result(Path(metrics["run"]) if metrics["run"] else None, metrics)
    # Not the folder of the metrics: a run that was moved and is run again keeps the metrics of its first place.
    assert isinstance(options, config.Train)
    folder = options.out.expanduser()
    return Result(folder, metrics, load_function(verb.page)(folder))
