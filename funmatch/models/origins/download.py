"""Downloads the weights that the paper's authors published, under short names."""

import base64
import hashlib
import shutil
import urllib.error
import urllib.request
from pathlib import Path

from funmatch.errors import InputError, first_line, unknown
from funmatch.runtime.disk.files import cache_home, disk_errors

BASE_URL = "https://storage.googleapis.com/bit_models/distill"
PAPER_FILES = {
    "R152x2_T_flowers128": (128, 102),
    "R152x2_T_pet128": (128, 37),
    "R152x2_T_food128": (128, 101),
    "R152x2_T_sun128": (128, 397),
    "R152x2_T_224": (224, 1000),
    "R152x2_T_384": (384, 1000),
    "R50x1_224": (224, 1000),
    "R50x1_160": (160, 1000),
}
"""Teachers (`T`) and students of the paper (section 4): image size in pixels, and number of classes."""
TIMEOUT_SECONDS = 30.0
"""Seconds without a byte after which a download fails; a slow one that goes on may take as long as it needs."""


def paper_file(name: str) -> Path:
    """Returns the path of one of the paper's `.npz` files, downloading it on first use.

    Args:
        name: a key of `PAPER_FILES`.

    Raises:
        InputError: there is no such file, no network, or the file arrived damaged.
        OSError: the disk is full.
    """
    if name not in PAPER_FILES:
        raise unknown("file of the paper", name, PAPER_FILES)
    path = cache_home() / "weights" / f"{name}.npz"
    # A file of this name is complete: `download` renames it last.
    if not path.is_file():
        url = f"{BASE_URL}/{name}.npz"
        try:
            download(url, path)
        except OSError as error:
            # URLError is an OSError too. One with a file name is the disk's, and its own message fits.
            if isinstance(error, urllib.error.URLError) or not getattr(error, "filename", None):
                raise InputError(
                    f"cannot download {url} ({first_line(error)}); download it elsewhere and put it at {path}"
                ) from error
            raise
    return path


def download(url: str, path: Path) -> None:
    """Downloads a file completely or not at all, and checks it against the server's length and checksum.

    Raises:
        InputError: its length or its MD5 is not what the server announced.
        OSError: the server cannot be reached, or the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:
            # Inside: only errors of writing get the file's name, by which `paper_file` tells them from the network's.
            with disk_errors(path), open(partial, "wb") as file:
                shutil.copyfileobj(response, file, 1 << 20)
            # x-goog-hash is Google Cloud Storage's own header; it may come once for each kind of checksum.
            length, hashes = response.headers.get("Content-Length"), response.headers.get_all("x-goog-hash") or []
        # A connection that breaks off ends the stream without an error; only the length shows it.
        problem = _find_damage(partial, length, ",".join(hashes))
        if problem:
            raise InputError(f"the download of {url} is damaged ({problem}); rerun the command")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _find_damage(path: Path, length: str | None, hashes: str) -> str | None:
    """Describes how a file differs from what its server announced.

    Args:
        path: the file.
        length: in bytes, if announced.
        hashes: such as `crc32c=…==,md5=…==`.

    Returns:
        the first difference, or None.
    """
    # The length first: it explains more than a wrong checksum, and costs nothing.
    if length and path.stat().st_size != int(length):
        return f"{path.stat().st_size:,} bytes, expected {int(length):,}"
    # Split at the first "=": the values are base64, which ends with some.
    announced = dict(item.strip().split("=", 1) for item in hashes.split(",") if "=" in item)
    if "md5" in announced:
        with open(path, "rb") as file:
            md5 = base64.b64encode(hashlib.file_digest(file, "md5").digest()).decode()
        if md5 != announced["md5"]:
            return f"its MD5 is {md5}, expected {announced['md5']}"
    return None
