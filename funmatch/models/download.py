"""The files of weights that the paper's authors published, under short names."""

import base64
import hashlib
import shutil
import urllib.error
import urllib.request
from pathlib import Path

from funmatch.errors import InputError, first_line, unknown
from funmatch.runtime.files import cache_home, disk_errors

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
"""Teachers (`T`) and students of the paper (section 4): the side that each was made for, pixels, and its classes."""
TIMEOUT_SECONDS = 30.0


def paper_file(name: str) -> Path:
    """The `.npz` file of one of `PAPER`, fetched on first use and held against the checksum that its server names.

    Raises:
        InputError: no such name, no network, or what came is not what was sent.
    """
    if name not in PAPER_FILES:
        raise unknown("file of the paper", name, PAPER_FILES)
    path = cache_home() / "weights" / f"{name}.npz"
    if not path.is_file():
        url = f"{BASE_URL}/{name}.npz"
        try:
            download(url, path)
        except OSError as error:
            if isinstance(error, urllib.error.URLError) or not getattr(error, "filename", None):
                raise InputError(
                    f"cannot fetch {url} ({first_line(error)}); fetch it elsewhere and put it at {path}"
                ) from error
            raise
    return path


def download(url: str, path: Path) -> None:
    """Downloads a file whole or not at all.

    Raises:
        InputError: its length or its MD5 is not what the server said.
        OSError: it cannot be reached, or the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as answer:
            with disk_errors(path), open(partial, "wb") as file:
                shutil.copyfileobj(answer, file, 1 << 20)
            length, hashes = answer.headers.get("Content-Length"), answer.headers.get_all("x-goog-hash") or []
        problem = _differs(partial, length, ",".join(hashes))
        if problem:
            raise InputError(f"what came from {url} is damaged ({problem}); start the same command again")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _differs(path: Path, length: str | None, hashes: str) -> str | None:
    """How a file differs from what its server announced; `hashes` is such as `crc32c=…==,md5=…==`."""
    if length and path.stat().st_size != int(length):
        return f"{path.stat().st_size:,} bytes, wanted {int(length):,}"
    said = dict(item.strip().split("=", 1) for item in hashes.split(",") if "=" in item)
    if "md5" in said:
        with open(path, "rb") as file:
            came = base64.b64encode(hashlib.file_digest(file, "md5").digest()).decode()
        if came != said["md5"]:
            return f"its MD5 is {came}, wanted {said['md5']}"
    return None
