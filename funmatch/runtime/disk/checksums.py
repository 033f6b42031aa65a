"""Finds damage in files that were complete when they were written: flipped bits, cut, exchanged or missing files.

A folder of ours has a manifest, `checksums.json`, with the size and the CRC-32 of each of its files. CRC-32 finds every
damage of up to 32 bits in a row and all but one in 4 billion of any other; on two cores it reads 2.6 GB a second, four
times as much as BLAKE2, and lets other threads compute meanwhile. It is no protection from people: who changes a file
can change the manifest.

Folders that earlier versions wrote, or from which the manifest was removed, are read unchecked.
"""

import json
import zlib
from pathlib import Path
from typing import Any

from funmatch.runtime.disk.json_files import FORMAT, Damaged, read_record, seal

MANIFEST = "checksums.json"
MANIFEST_FORMAT = 1
BLOCK = 1 << 20
"""Bytes that are read at a time."""


def crc_of_file(path: Path) -> int:
    """Returns the CRC-32 of a file's content.

    Raises:
        OSError: it is missing or cannot be read.
    """
    crc, block = 0, bytearray(BLOCK)
    with open(path, "rb", buffering=0) as file:
        # Into the same memory each time: fresh memory for each block would cost as much as the checksum.
        while count := file.readinto(block):
            crc = zlib.crc32(memoryview(block)[:count], crc)
    return crc


def describe(path: Path) -> dict[str, Any]:
    """Returns the size and the CRC-32 of a file, as manifests hold them."""
    return {"bytes": path.stat().st_size, "crc32": f"{crc_of_file(path):08x}"}


def write_manifest(folder: Path) -> None:
    """Writes the manifest of a folder's files, which nobody may be writing any more; folders inside are left out."""
    files = {path.name: describe(path) for path in sorted(folder.iterdir()) if path.is_file() and path.name != MANIFEST}
    (folder / MANIFEST).write_text(json.dumps(seal({FORMAT: MANIFEST_FORMAT, "files": files}), indent=1))


def verify_folder(folder: Path, only: str | None = None) -> None:
    """Compares the files of a folder with its manifest; files that the manifest does not list may be anything.

    Args:
        folder: where there is no manifest, nothing is compared.
        only: the name of a file, to compare this one alone.

    Raises:
        Damaged: a file is missing or differs, or the manifest itself is damaged. The message ends without an action.
        NewerFormat: a newer version wrote the manifest.
        OSError: a file cannot be read.
    """
    manifest = folder / MANIFEST
    shape = {"files": dict[str, dict]}
    try:
        listed = read_record(manifest, shape, MANIFEST_FORMAT, f"remove {manifest}", closed=True)["files"]
    except FileNotFoundError:
        return
    for name, expected in listed.items():
        if only not in (None, name):
            continue
        # A name alone: a manifest from elsewhere must not make us read other folders.
        path = folder / Path(name).name
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise Damaged(f"{path} is missing") from None
        if size != expected.get("bytes"):
            raise Damaged(f"{path} has {size:,} bytes, not the {expected.get('bytes')} that were written")
        if f"{crc_of_file(path):08x}" != expected.get("crc32"):
            raise Damaged(f"{path} does not match its checksum in {MANIFEST}")
