"""Records what an export was made of, so that the same command, repeated, finds it done instead of in its way.

The record is a file of the export's folder, which gets its name when everything in it is written: there is no half.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from funmatch.config import Export
from funmatch.errors import InputError
from funmatch.models.classifier import fingerprint, function_of
from funmatch.runtime.disk import checksums
from funmatch.runtime.disk.json_files import FORMAT, Damaged, NewerFormat, read_record, seal
from funmatch.shipping.real_images import RealData
from funmatch.training.student.trained_model import TrainedModel
from funmatch.version import __version__

RECORD = "export.json"
RECORD_FORMAT = 1
RESULT = {"formats": dict[str, dict], "quantized": dict | None}
SHAPE = {"of": dict[str, dict], "files": dict[str, dict], "result": RESULT}
NOT_CONTENT = {"model", "out", "overwrite"}
"""Options that say from where and to where: what is written does not follow from them."""


def describe(config: Export, model: TrainedModel, about: Mapping[str, Any], data: RealData | None) -> dict[str, Any]:
    """Returns what the content of an export follows from.

    Args:
        config: the options.
        model: the model.
        about: of `sidecars.describe`.
        data: images to compare on, and to calibrate by.
    """
    own = [name for name in Export.__annotations__ if name in Export.model_fields and name not in NOT_CONTENT]
    options = config.model_dump(mode="json", include=set(own))
    weights = {"weights": fingerprint(model.classifier.net), "network": function_of(model.classifier)}
    images = {"key": data.cache.key if data else None}
    # Other libraries are the runtimes' own, and are checked each time that a file is opened.
    versions = {"funmatch": __version__, "torch": torch.__version__}
    parts = {"options": options, "model": weights, "description": about, "images": images, "versions": versions}
    return json.loads(json.dumps(parts))


def find(out: Path, of: Mapping[str, Any]) -> dict[str, Any] | None:
    """Finds the export that a command would write, already written.

    Args:
        out: folder that there may be.
        of: of `describe`.

    Returns:
        what `write` was given as its result; None where there is no record.

    Raises:
        InputError: it is an export of something else, or a file is no longer as it was written; the message says which.
    """
    advice = f"pass --overwrite to replace {out}, or another --out"
    try:
        record = read_record(out / RECORD, SHAPE, RECORD_FORMAT, advice, closed=True)
    except FileNotFoundError:
        return None
    except (Damaged, NewerFormat) as error:
        raise InputError(f"{error}; {advice}") from None
    if differs := _differences(record["of"], of):
        raise InputError(f"{out} exists, and was exported with other {', '.join(differs)}; {advice}")
    found = _list_files(out, record["files"])
    if changed := sorted(name for name, expected in record["files"].items() if found.get(name) != expected):
        raise InputError(f"{out} exists, but {changed[0]} is not as it was exported; {advice}")
    return record["result"]


def write(folder: Path, of: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Writes the record into a folder, in which everything else is written.

    Args:
        of: of `describe`.
        result: what the command returns, but for places.
    """
    record = {FORMAT: RECORD_FORMAT, "of": of, "files": _list_files(folder), "result": result}
    (folder / RECORD).write_text(json.dumps(seal(record), indent=1))


def _differences(recorded: Mapping[str, dict[str, Any]], wanted: Mapping[str, dict[str, Any]]) -> list[str]:
    """Names what differs: options as they are typed, the rest by its part."""
    names = []
    for part, values in wanted.items():
        before = recorded.get(part, {})
        if before != values:
            keys = sorted(key for key in values.keys() | before.keys() if values.get(key) != before.get(key))
            names += [f"--{key.replace('_', '-')}" for key in keys] if part == "options" else [part]
    return names


def _list_files(folder: Path, only: Mapping[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """Returns size and CRC-32 of the files in a folder and below it, by their path within it.

    Args:
        only: files to list. A listing is compared with the record, and no path that stands there is opened.
    """
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    wanted = [name for name in paths if name != RECORD and (only is None or name in only)]
    return {name: checksums.describe(paths[name]) for name in wanted}
