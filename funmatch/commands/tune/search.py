"""Reads what is requested of a search and keeps its folder: `study.json`, the journal, a run folder an execution."""

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from funmatch.commands.tune import space as search_space
from funmatch.commands.tune.space import Space, Value
from funmatch.config import SEARCHED, TAUGHT, UNCOMPARED, Search, Train, recipes
from funmatch.config.data import NO_VALIDATION
from funmatch.config.optim import LR
from funmatch.config.search import TRIALS
from funmatch.errors import InputError
from funmatch.runtime.disk.records import RecordFolder, list_differences
from funmatch.runtime.log import info
from funmatch.training import datasets
from funmatch.training.teachers import recording
from funmatch.version import __version__

FORMAT = 1
"""Of `study.json`; version 0.1.0 wrote no number, which is read as 1."""
SHAPE = {
    "verb": str, "knobs": dict[str, Any], "space": dict[str, str], "search": dict[str, Any], "storage": str,
    "name": str, "data": str, "id": str,
}  # fmt: skip


@dataclass(frozen=True)
class SearchSpec:
    """A search that is ready to begin.

    Attributes:
        verb: the command of its runs.
        base: their configuration, without the searched options.
        space: the values of these.
        search: the options of the search itself.
        folder: the folder of the search.
        trials: number of trials, those that exist already among them.
        cut: whether validation images were held out of the training images by default.
        tested: whether there are test images that can be evaluated.
        data: key of the images' content.
    """

    verb: str
    base: Train
    space: Space
    search: Search
    folder: Path
    trials: int
    cut: bool = False
    tested: bool = False
    data: str = ""

    @property
    def place(self) -> str:
        """The storage: a file or a URL."""
        storage = self.search.storage
        if storage is None:
            return str(self.folder / "journal.log")
        # Absolute, since another worker may be started in another folder.
        return storage if "://" in storage else str(Path(storage).expanduser().absolute())

    @property
    def name(self) -> str:
        """The name of the search in the storage."""
        return self.search.study_name or self.folder.name

    @property
    def first(self) -> dict[str, Value] | None:
        """The configuration of the command line, which is trial 0 if it lies in the space: the one to beat."""
        # A searched option is usually not set, so its default is the value to beat; BiT-HyperRule has its own.
        known: dict[str, Any] = {"lr": LR} if self.verb != "finetune" else {}
        own = {name: getattr(self.base, name) for name in self.space}
        own = {name: known.get(name) if value is None and name in known else value for name, value in own.items()}
        # A value outside the space would be a trial that no sampler could have chosen.
        inside = all(value in self.space[name] for name, value in own.items())
        return own if inside and self.search.sampler != "grid" else None

    @property
    def tapes(self) -> Path:
        """The folder of the teachers' tapes, one a seed."""
        return self.folder / "tapes"

    @property
    def shares_tapes(self) -> bool:
        """Whether all trials show the same teachers the same views, so that one can record for all."""
        options = self.base.model_dump()
        # One trial would record for nobody, and an option that changes views or teacher gives each trial other logits.
        own = self.search.tapes and self.verb == "distill" and recording.shared_by(options) is not None
        return own and self.trials > 1 and self.space.keys() <= recording.own_of_the_student(options)

    def run_folder(self, number: int, execution: int) -> Path:
        """The run folder of an execution of a trial."""
        return self.trial_folder(number) / str(execution)

    def trial_folder(self, number: int) -> Path:
        """The folder of all executions of a trial."""
        # With leading zeros, so that folders sort as trials.
        return self.folder / "trials" / f"{number:04}"

    def run(self, number: int, execution: int, chosen: Mapping[str, Value]) -> Train:
        """The configuration of an execution of a trial.

        Raises:
            InputError: the chosen values contradict each other.
        """
        options = search_space.apply_choices(self.base, chosen)
        # The same seeds for every trial: values are compared on the same draws.
        options |= {"seed": self.base.seed + execution, "out": self.run_folder(number, execution)}
        if self.shares_tapes:
            # One a seed, since views depend on it; a full disk must not end a trial for the sake of speed.
            options |= {"tape": self.tapes / f"seed-{options['seed']}", "tape_full": "go-on"}
        # Checked here, with the other values: whether a trial contradicts itself is known only now.
        return type(self.base).checked(**options)


def read_spec(config: Search) -> SearchSpec:
    """Reads what a configuration requests: parses its space and opens its images.

    Raises:
        InputError: nothing to search, an impossible space, images that are missing, or none to choose by.
    """
    verb = next(verb for verb, table in SEARCHED.items() if isinstance(config, table))
    base = TAUGHT[verb].model_validate({name: getattr(config, name) for name in TAUGHT[verb].model_fields})
    space = search_space.read(_words(config, base), TAUGHT[verb])
    if not space:
        raise InputError("pass what to search, e.g. --space lr=log:1e-4..1e-2 temperature=1,2,5,10")
    # Before images are read: a value that no trial can have is reported in an instant.
    search_space.check(space, base)
    trials = config.trials or TRIALS
    if config.sampler == "grid":
        size = search_space.combinations(space)
        if config.trials and config.trials > size:
            info(f"the grid has {size:,} combinations, so there are no more trials than that")
        # No more than there are combinations: the same values would give the same scores.
        trials = min(size, config.trials or size)
    found = SearchSpec(verb, base, space, config, config.out.expanduser().resolve(), trials)
    place = record_folder(found.folder)
    place.check_place()
    if place.has_begun:
        # A damaged or newer one is refused before images are read.
        found = replace(found, base=_with_earlier_intervals(base, place.read()["knobs"]))
    return with_validation(found)


def _with_earlier_intervals(base: Train, recorded: Mapping[str, Any]) -> Train:
    """The options with the intervals of a search that an earlier version began: its trials are compared by them."""
    names = type(base).where(lambda opt: opt.keeps)
    names = {name for name in names if getattr(base, name) is None and recorded.get(name) is not None}
    return base.model_copy(update={name: recorded[name] for name in names})


def _words(config: Search, base: Train) -> list[str]:
    """The words of the space, with those of the recipe for options that the user does not set."""
    if base.recipe is None:
        return list(config.space)
    recipe = recipes.find(base.recipe)
    excluded = {search_space.option_name(word.partition("=")[0], type(base)) for word in config.space}
    # An option that the user sets beside the recipe is not searched: it was meant to be that value.
    excluded |= {name for name in recipe.space if getattr(base, name) != recipe.knobs.get(name, getattr(base, name))}
    return [*config.space, *(f"{name}={values}" for name, values in recipe.space.items() if name not in excluded)]


def with_validation(spec: SearchSpec) -> SearchSpec:
    """The same with images for validation, held out of the training images where there are none.

    Raises:
        InputError: there are none, and none can be held out.
    """
    base = spec.base
    if base.val == NO_VALIDATION:
        raise InputError("--val none leaves no images to choose by; leave it out")
    # `val` is part of the configuration from here on, so that every trial holds out the same images.
    cache, resolved = datasets.open_with_validation(base)
    if "train" not in cache.splits:
        raise InputError(f"{cache.name} has no split train to train on; it has: {', '.join(cache.splits)}")
    if "val" not in cache.splits:
        raise InputError(
            f"--eval-data {' '.join(base.eval_data)} has no split val, and a search must not choose by test images; "
            "give images with a split val"
        )
    cut, test = resolved.val != base.val, cache.splits.get("test")
    # Without labels, only a teacher's answers can be compared with.
    tested = test is not None and (test.labelled or spec.verb == "distill")
    # The key of the images, to refuse a resumed search on others.
    return replace(spec, base=resolved, cut=cut, tested=tested, data=cache.key)


def record_folder(folder: Path) -> RecordFolder:
    """The folder of a search."""
    return RecordFolder(
        folder, "study.json", "search", SHAPE, number=FORMAT, lock_name=".lock", leftovers=("journal.log",)
    )


def record_of(spec: SearchSpec, place: str) -> dict[str, Any]:
    """What `study.json` holds: compared when the command is run again."""
    search = spec.search
    compared = Search.where(lambda opt: opt.is_compared)
    return json.loads(
        # Through JSON and back: compared with what was read from a file, where tuples are lists and paths are text.
        json.dumps({
            "verb": spec.verb,
            "knobs": spec.base.model_dump(mode="json"),
            "space": {name: _as_words(span) for name, span in spec.space.items()},
            "search": {name: getattr(search, name) for name in sorted(compared)},
            "storage": place,
            "name": spec.name,
            "data": spec.data,
            "versions": {"funmatch": __version__},
        }, default=str)
    )  # fmt: skip


def _as_words(span: search_space.Range) -> str:
    """A range as it is written on the command line."""
    if span.choices:
        return ",".join(map(str, span.choices))
    # Ten digits: more than anybody writes, and none of the noise of binary fractions.
    return f"{'log:' if span.log else ''}{span.low:.10g}..{span.high:.10g}"


def begin_search(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """What `study.json` holds, written if it is not there; its `id` tells this search from others of its name.

    Raises:
        InputError: it is of a search with other options, damaged, or of a newer format.
    """
    # The id is made anew with every call, and only that of the first is written.
    return record_folder(folder).begin(record | {"id": uuid.uuid4().hex}, differences)


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What two records of a search do not agree on, a line each. The number of trials is in neither: it may grow."""
    where, whole = "in the search", ("verb", "storage", "name", "data")
    # Not the versions: a newer funmatch may resume a search.
    found = list_differences({name: then[name] for name in whole}, {name: now[name] for name in whole}, where)
    for part in ("knobs", "space", "search"):
        before, after = (
            {name: value for name, value in each[part].items() if name not in UNCOMPARED} for each in (then, now)
        )
        found += list_differences(before, after, where)
    return found
