"""WebDataset shards: tars of samples, read in place and never unpacked."""

import json
import tarfile
from pathlib import Path

from funmatch.data.dataset import UNLABELLED, Dataset, ReadOptions, Track, untracked
from funmatch.data.decode import EXTENSIONS
from funmatch.data.formats.tfrecord import DamagedRecord
from funmatch.data.readers.shard_paths import shard_paths
from funmatch.data.readers.tfrecords import Record, number, open_shards


def open_tars(pattern: str, reading: ReadOptions, track: Track = untracked) -> Dataset:
    """WebDataset shards: tars in which the files of a sample share all of their name up to the first dot.

    A label is in `.cls`, or under "label" or "cls" in `.json`. Nothing is unpacked.

    Raises:
        InputError: naming every damaged shard, and every member that leads outside.
    """
    paths = shard_paths(pattern, r"\.tar$")
    return open_shards(pattern, paths, lambda path: _list_tar(path, reading), reading, track)


def _list_tar(path: Path, reading: ReadOptions) -> list[Record]:
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                parts = member.name.split("/")
                if member.issym() or member.islnk() or member.name.startswith("/") or ".." in parts:
                    raise DamagedRecord(f"member {member.name!r} is a link or leads outside; pack the files themselves")
                if member.isfile() and "." in parts[-1] and not parts[-1].startswith("."):
                    key, _, ending = parts[-1].partition(".")
                    files = samples.setdefault("/".join([*parts[:-1], key]), {})
                    if ending.lower() in files:
                        raise DamagedRecord(f"member {member.name!r} is there twice")
                    files[ending.lower()] = member
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise DamagedRecord("ends without the mark that closes a tar; it is cut off")
            wanted = (reading.image_feature or ";".join(ending[1:] for ending in EXTENSIONS)).split(";")
            found = []
            for key, files in samples.items():
                image = next((files[ending] for ending in files if ending in wanted), None)
                if image is None:
                    raise DamagedRecord(
                        f"sample {key!r} has no image, but: {', '.join(sorted(files))} (endings begin at the first "
                        "dot); choose by --image-feature"
                    )
                label = _tar_label(tar, key, files, reading)
                found.append(Record(image.offset_data, image.size, label, image.name))
            return found
    except tarfile.TarError as error:
        raise DamagedRecord(f"is no whole tar ({error}); a compressed one must be unpacked first") from None


def _tar_label(tar: tarfile.TarFile, key: str, files: dict[str, tarfile.TarInfo], reading: ReadOptions) -> int:
    ending = reading.label_feature or next((name for name in ("cls", "json") if name in files), None)
    if ending is None or ending == "none":
        return UNLABELLED
    if ending not in files and reading.unlabelled:
        return UNLABELLED
    if ending not in files:
        raise DamagedRecord(f"sample {key!r} has no .{ending}, but: {', '.join(sorted(files))}")
    content = tar.extractfile(files[ending]).read()  # pyrefly: ignore[missing-attribute]
    if ending.endswith("json"):
        try:
            about = json.loads(content)
            content = str(about["label"] if "label" in about else about["cls"]).encode()
        except (ValueError, KeyError, TypeError):
            raise DamagedRecord(f'{files[ending].name} is no JSON object with a "label" or "cls"') from None
    return number(content, files[ending].name)
