"""Refuses a command for what can be known within a second: paths, names and places, before torch is imported."""

import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from funmatch.config import TAUGHT, Distill, Head, Plan, Predict, Select
from funmatch.config.finished.benchmark import EXPORTED, NO_TEACHER, Benchmark
from funmatch.config.finished.predict import ImageFiles
from funmatch.config.metadata import Refers
from funmatch.config.options import Options, listed
from funmatch.config.teaching import CLIP
from funmatch.data.readers.open import check_named, check_spec
from funmatch.data.remote.single import check_file_named
from funmatch.errors import InputError
from funmatch.models.checkpoints import signatures
from funmatch.models.clip.class_texts import OF_DATA, read_names
from funmatch.models.clip.templates import read_templates
from funmatch.models.names import BIT, HUB, LOCAL, SAVEDMODEL, check_model_name
from funmatch.runtime import env
from funmatch.runtime.functions import NAME, check_allowed, find_function, is_function_name
from funmatch.shipping import tables
from funmatch.shipping.sources.find import check_path
from funmatch.training.heads import folder as head_folder
from funmatch.training.run import compare
from funmatch.training.run import folder as run_folder


def check(verb: str, options: Options) -> None:
    """Raises one `InputError` that holds every problem that neither torch nor the data are needed to find.

    Args:
        verb: the command, or that whose runs are searched or planned.
        options: its table, whose own checks have passed.
    """
    _refuse([*_problems_of_names(options), *_problems_of_place(verb, options)])


def function_problems(options: Options, *, reference: str) -> Iterator[str]:
    """Yields the functions and addresses that options name, but no person.

    Args:
        reference: prefix of models that are runs of the same study.
    """
    prefixes = (reference, SAVEDMODEL, BIT, HUB, LOCAL, CLIP)
    for name, opt in type(options).opts():
        names = [value for value in _each(getattr(options, name)) if opt.function or opt.refers is Refers.MODEL]
        if opt.refers is Refers.DATA:
            yield from filter(None, (_message(check_named, value) for value in _each(getattr(options, name))))
        if opt.refers is Refers.FILE:
            yield from filter(None, (_message(check_file_named, value) for value in _each(getattr(options, name))))
        for value in names:
            if NAME.fullmatch(value) and not value.startswith(prefixes):
                yield from filter(None, [_message(partial(check_allowed, purpose=name), value)])


def check_students(options: Distill, students: Sequence[str]) -> None:
    """The same for several students, each of which gets a folder in that of the options."""
    each = [options.model_copy(update={"student": student}) for student in students]
    # They share all but the student, so most problems would come once for each.
    _refuse([*dict.fromkeys(problem for one in each for problem in _problems_of_names(one))])


def _refuse(problems: list[str]) -> None:
    if problems:
        raise InputError(listed(problems))


def _problems_of_names(options: Options) -> Iterator[str]:
    """Yields what is wrong with the models, images and files that options name."""
    for name, opt in type(options).opts():
        value = getattr(options, name)
        if opt.function and value is not None and is_function_name(value):
            yield from filter(None, [_message(partial(find_function, purpose=name), value)])
        if opt.refers is None:
            continue
        test = CHECKS[opt.refers]
        yield from filter(None, (_message(test, each) for each in _each(value)))


def _each(value: Any) -> Iterable[str]:
    values = value if isinstance(value, tuple) else (value,)
    return (str(each) for each in values if each is not None)


def _message(test: Callable[[str], object], value: str) -> str | None:
    try:
        test(value)
    except InputError as error:
        return str(error)
    return None


def _check_weights(value: str) -> None:
    path = Path(value).expanduser()
    # The word for a teacher that brings its own weights.
    if value.lower() == "none":
        return
    if not path.is_file():
        raise InputError(f"no weights file {value}")
    # Zip archives, which PyTorch and NumPy write, and lists of several files are left to the reader.
    if path.suffix != ".json" and not zipfile.is_zipfile(path) and (what := signatures.describe(path)):
        raise InputError(f"{path} is {what}")


def _check_measured(value: str) -> None:
    if Path(value).suffix.lower() in EXPORTED:
        if not Path(value).expanduser().is_file():
            raise InputError(f"there is no file {value}")
    elif value != NO_TEACHER:
        check_model_name(value)


def _check_class_names(value: str) -> None:
    if value != OF_DATA:
        read_names(Path(value).expanduser())


CHECKS: dict[Refers, Callable[[str], object]] = {
    Refers.DATA: check_spec,
    Refers.IMAGES: check_path,
    Refers.MODEL: check_model_name,
    Refers.MEASURED: _check_measured,
    Refers.WEIGHTS: _check_weights,
    # Read where they are used, within the first second; a folder of these may also be made only by the run.
    Refers.CLASS_MAP: lambda _value: None,
    Refers.CLASS_NAMES: _check_class_names,
    Refers.TEMPLATES: read_templates,
    Refers.FILE: check_file_named,
}


def _problems_of_place(verb: str, options: Options) -> Iterator[str]:
    """Yields why a run cannot be written where `out` says, or is another one than the run that is there."""
    if isinstance(options, ImageFiles | Select):
        yield from _problems_of_file(options)
        return
    if isinstance(options, Benchmark):
        yield from _problems_of_report(options)
    if isinstance(options, Head):
        problem = _unwritable(options.out.expanduser())
        yield from [problem] if problem else filter(None, [_message(_check_head, str(options.out))])
    if isinstance(options, Plan) and options.plot:
        place = options.plot.expanduser()
        folder = place.parent if place.suffix and not place.is_dir() else place
        if folder.exists() and not folder.is_dir():
            yield f"cannot write --plot {options.plot}: {folder} is a file; choose another place"
        yield from filter(None, [_unwritable(folder, "--plot")])
    # A search's folder holds a record of its own, which it checks itself.
    if verb not in TAUGHT or not isinstance(options, TAUGHT[verb]):
        return
    out = options.out.expanduser()
    if problem := _unwritable(out):
        yield problem
        return
    try:
        run_folder.check_place(out)
        run = run_folder.Run(out)
        if run.record.has_begun:
            # The main process alone: of several, the others may come here when it has begun.
            if env.is_main_process():
                run.record.check_free()
            run.record.refuse(compare.early_differences(out, run.config, verb, options))
    except InputError as error:
        yield str(error)


def _check_head(out: str) -> None:
    record = head_folder.record_folder(Path(out))
    record.check_place()
    if record.has_begun:
        record.read()  # a damaged or newer one is refused now and not after an hour of decoding
        record.check_free()


def _problems_of_file(options: ImageFiles | Select) -> Iterator[str]:
    """Yields why rows cannot be written to the file of `out`, or not in their format."""
    out = options.out.expanduser() if options.out else None
    tests: list[Callable[[str], object]] = [lambda _: tables.check_out(out, overwrite=options.overwrite)]
    if isinstance(options, Predict):
        tests.append(lambda _: tables.pick_format(options.format, out))
    yield from filter(None, (_message(test, "") for test in tests))


def _problems_of_report(options: Benchmark) -> Iterator[str]:
    """Yields why a page cannot be written where `report` says, or its plot beside it."""
    if options.report:
        page = options.report.expanduser()
        for path in (page, page.with_suffix(".svg")):
            if path.exists():
                yield f"{path} exists; remove it, or choose another --report"


def _unwritable(folder: Path, option: str = "--out") -> str | None:
    """Says why the folder of an option cannot be created or written; None where it can."""
    if folder.is_symlink() and not folder.exists():
        return f"cannot create {option} {folder}: it is a link to {folder.readlink()}, which does not exist; make that"
    place = folder
    # A name that is too long, or not of this system, is refused with words of its own where the folder is made.
    with suppress(OSError):
        while not place.exists() and place != place.parent:
            place = place.parent
    if place == folder and not folder.is_dir():
        return None  # a file of this name: the check of the place names it
    if place.exists() and not place.is_dir():
        return f"cannot create {option} {folder}: {place} is a file; choose another folder"
    try:
        # Tried, since rights alone do not tell of read-only disks and of the system's own folders. It has no name.
        with tempfile.TemporaryFile(dir=place):
            return None
    except OSError as error:
        reason = f"{error.strerror} in {place}"
        return f"cannot write to {option} {folder}: {reason}; choose another folder, or make this one writable"
