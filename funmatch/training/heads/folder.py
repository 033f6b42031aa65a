"""Keeps a head in a folder: a model in timm's layout, with a record of what it is of beside it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from funmatch.config import Head
from funmatch.config.metadata import OnResume
from funmatch.runtime.disk.checksums import verify_folder
from funmatch.runtime.disk.files import sync_folder, write_atomically
from funmatch.runtime.disk.json_files import RUN_SHAPE, Damaged, read_record, seal
from funmatch.runtime.disk.partials import PARTIAL, remove
from funmatch.runtime.disk.records import RecordFolder, list_differences
from funmatch.runtime.log import info
from funmatch.training.run.compare import recorded
from funmatch.training.run.folder import RESULT_FILE, finite, record_of

RECORD = "head.json"
FORMAT = 1
RESULT = {
    "top1": float | None, "split": str, "pictures": int, "held_out_of?": int, "parameters": int, "seconds": float,
    "kind": str, "chosen": float | None, "map?": float | None,
    "tried": [{"value": float, "top1?": float, "map?": float, "nll?": float}],
}  # fmt: skip
FACTS = {"data": "the data's content", "backbone": "the backbone's content"}
"""Facts that are compared when the same folder is named again."""
IN_HEAD = "in the head"
NEW = f".model{PARTIAL}"
"""The folder, inside that of the head, in which the model is written before its files are moved out of it."""
LAST = "config.json"
"""The file without which a folder is no model, so that it comes last."""


def record_folder(out: Path) -> RecordFolder:
    """Returns the folder of a head, as one that has a record."""
    return RecordFolder(out.expanduser(), RECORD, "head", RUN_SHAPE, number=FORMAT, closed=True)


def record_for(config: Head, facts: dict[str, Any]) -> dict[str, Any]:
    """Returns what `head.json` holds, as it reads back."""
    return record_of("head", config.model_dump(mode="json"), facts)


def compare(then: dict[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Lists what differs between the record of a head and what is requested, a line each."""
    # What names files is compared by their content, among the facts.
    names = Head.where(lambda opt: opt.is_compared and opt.content is None and opt.on_resume is not OnResume.DEVICE)
    # A record from before an option counts as made with its default.
    before, after = ({name: recorded(each, Head).get(name) for name in names} for each in (then, now))
    earlier, later = ({name: each["facts"].get(name) for name in FACTS} for each in (then, now))
    flags = {name: flag for name, opt in Head.opts() if (flag := opt.flag)}
    return list_differences(before, after, IN_HEAD, flags) + list_differences(earlier, later, IN_HEAD, FACTS)


def finished_result(out: Path) -> dict[str, Any] | None:
    """Returns the result of a finished head; None before, and where a file of it was damaged since."""
    try:
        found = read_record(out / RESULT_FILE, RESULT, FORMAT, "choose another --out")
        verify_folder(out)
    except FileNotFoundError:
        return None
    except (OSError, Damaged) as error:
        info(f"{error}; writing the head again")
        return None
    return found if (out / LAST).is_file() else None


def move_out(out: Path) -> None:
    """Moves the files of the model that was written to `NEW` into the folder of the head."""
    files = sorted((out / NEW).iterdir(), key=lambda path: path.name == LAST)
    for path in files:
        path.replace(out / path.name)
    sync_folder(out)
    remove(out / NEW)


def finish(out: Path, metrics: dict[str, Any]) -> dict[str, Any]:
    """Writes `result.json`, by which the head counts as finished; returns what it holds."""
    found = finite(metrics)
    write_atomically(out / RESULT_FILE, json.dumps(seal(found), indent=2))
    return found
