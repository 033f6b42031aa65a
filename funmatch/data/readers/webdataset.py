"""Lists the images in WebDataset shards (tars), and reads them in place."""

import tarfile
from pathlib import Path

from funmatch.data.dataset import UNLABELLED, Dataset, ReadOptions, Track, untracked
from funmatch.data.decode import EXTENSIONS
from funmatch.data.formats.tfrecord import DamagedRecord
from funmatch.data.readers.shard_paths import shard_paths
from funmatch.data.readers.tfrecords import Record, open_shards, parse_label
from funmatch.runtime.json_files import parse_json


def open_tars(pattern: str, options: ReadOptions, track: Track = untracked) -> Dataset:
    """Lists WebDataset shards: tars in which the files of a sample share their name up to the first dot.

    The label is in `.cls`, or under "label" or "cls" in `.json`. Nothing is unpacked.

    Raises:
        InputError: lists every damaged shard, and every member with a path that leads outside.
    """
    paths = shard_paths(pattern, r"\.tar$")
    return open_shards(pattern, paths, lambda path: _list_tar(path, options), options, track)


def _list_tar(path: Path, options: ReadOptions) -> list[Record]:
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        # "r:" refuses compressed tars, in which an image has no position that could be read in place.
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                parts = member.name.split("/")
                if member.issym() or member.islnk() or member.name.startswith("/") or ".." in parts:
                    raise DamagedRecord(f"member {member.name!r} is a link or leads outside; pack the files themselves")
                # Hidden files are left out: macOS's tar adds a `._x.jpg` to an x.jpg with extended attributes.
                if member.isfile() and "." in parts[-1] and not parts[-1].startswith("."):
                    key, _, ending = parts[-1].partition(".")
                    # With the folder: train/1.jpg and val/1.jpg are two samples.
                    files = samples.setdefault("/".join([*parts[:-1], key]), {})
                    if ending.lower() in files:
                        raise DamagedRecord(f"member {member.name!r} appears twice")
                    files[ending.lower()] = member
            # tarfile takes a file that ends between two members for complete, so we look for the closing block.
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise DamagedRecord("ends without a tar's closing block; it is cut off")
            endings = (options.image_feature or ";".join(ending[1:] for ending in EXTENSIONS)).split(";")
            shard_records = []
            for key, files in samples.items():
                image = next((files[ending] for ending in files if ending in endings), None)
                if image is None:
                    raise DamagedRecord(
                        f"sample {key!r} has no image, but: {', '.join(sorted(files))} (endings begin at the first "
                        "dot); pass --image-feature"
                    )
                label = _label(tar, key, files, options)
                shard_records.append(Record(image.offset_data, image.size, label, image.name))
            return shard_records
    except tarfile.TarError as error:
        raise DamagedRecord(f"is not a complete tar ({error}); a compressed one must be unpacked first") from None


def _label(tar: tarfile.TarFile, key: str, files: dict[str, tarfile.TarInfo], options: ReadOptions) -> int:
    ending = options.label_feature or next((name for name in ("cls", "json") if name in files), None)
    if ending is None or ending == "none":
        return UNLABELLED
    if ending not in files and options.unlabelled:
        return UNLABELLED
    if ending not in files:
        raise DamagedRecord(f"sample {key!r} has no .{ending}, but: {', '.join(sorted(files))}")
    content = tar.extractfile(files[ending]).read()  # pyrefly: ignore[missing-attribute]
    if ending.endswith("json"):
        try:
            fields = parse_json(content, dict)
            content = str(fields["label"] if "label" in fields else fields["cls"]).encode()
        except (ValueError, KeyError):
            raise DamagedRecord(f'{files[ending].name} is not a JSON object with "label" or "cls"') from None
    return parse_label(content, files[ending].name)
