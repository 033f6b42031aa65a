"""Lists the images in WebDataset shards (tars), and reads them in place."""

import tarfile
from pathlib import Path

from funmatch.data.dataset import UNLABELLED, Dataset, ReadOptions, Track, untracked
from funmatch.data.decode import EXTENSIONS
from funmatch.data.formats.tfrecord import DamagedRecord
from funmatch.data.labels import Label, parse_label
from funmatch.data.readers.shard_paths import shard_paths
from funmatch.data.readers.shards import Oddities, Record, open_shards
from funmatch.runtime.disk.json_files import parse_json

ENDINGS = r"\.tar$"
JSON_LABELS = ("label", "cls", "class_id", "class")
"""Names of the label in a sample's JSON, tried in this order."""


def open_tars(pattern: str, options: ReadOptions, track: Track = untracked) -> Dataset:
    """Lists WebDataset shards: tars in which the files of a sample share their name up to the first dot.

    The label is in `.cls`, or in `.json` under a name of `JSON_LABELS`; a `.json` without it is one of a sample without
    label, as img2dataset writes them. Samples without an image are skipped, with a note. Nothing is unpacked.

    Raises:
        InputError: lists every damaged shard, and every member with a path that leads outside.
    """
    paths = shard_paths(pattern, ENDINGS, track)
    return open_shards(
        pattern, paths, ENDINGS, lambda path, oddities: _list_tar(path, options, oddities), options, track
    )


def _list_tar(path: Path, options: ReadOptions, oddities: Oddities) -> list[Record]:
    try:
        # "r:" refuses compressed tars, in which an image has no position that could be read in place.
        with tarfile.open(path, "r:") as tar:
            samples = _list_samples(tar)
            # tarfile takes a file that ends between two members for complete, so we look for the closing block.
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise DamagedRecord("ends without a tar's closing block; it is cut off")
            endings = (options.image_feature or ";".join(ending[1:] for ending in EXTENSIONS)).split(";")
            shard_records, without = [], []
            for key, files in samples.items():
                oddities.features.update(files)
                images = [ending for ending in files if ending in endings]
                if not images:
                    without.append(key)
                    continue
                image = files[images[0]]
                if len(images) > 1:
                    oddities.take("image", images[0], images[1:])
                label, lacking = _label(tar, key, files, options, oddities)
                if lacking:
                    oddities.unlabelled.setdefault(path, lacking)
                shard_records.append(Record(image.offset_data, image.size, label, image.name))
    # tarfile passes on what it meets in headers that were made to mislead it: sizes that are no numbers, or too large.
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, AttributeError, TypeError, KeyError) as error:
        if isinstance(error, DamagedRecord):
            raise
        raise DamagedRecord(f"is not a complete tar ({error}); a compressed one must be unpacked first") from None
    # Some are common: downloads that failed, a README. All of them mean that images are called otherwise.
    if without and not shard_records:
        raise DamagedRecord(
            f"sample {without[0]!r} has no image, but: {', '.join(sorted(samples[without[0]]))} (endings begin at the "
            "first dot); pass --image-feature"
        )
    # Two underscores: WebDataset's own files about the shard, which are no samples.
    oddities.without_image.extend(f"{path.name}: {key}" for key in without if not key.startswith("__"))
    return shard_records


def _list_samples(tar: tarfile.TarFile) -> dict[str, dict[str, tarfile.TarInfo]]:
    """Returns the members of each sample by their endings in lower case."""
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
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
    return samples


def _label(
    tar: tarfile.TarFile, key: str, files: dict[str, tarfile.TarInfo], options: ReadOptions, oddities: Oddities
) -> tuple[Label, str]:
    """Returns the label of a sample, and what to say if it should have one."""
    ending = options.label_feature or next((name for name in ("cls", "json") if name in files), None)
    if ending is None or ending == "none":
        return UNLABELLED, ""
    if ending not in files:
        present = ", ".join(sorted(files))
        return UNLABELLED, f"sample {key!r} has no .{ending}, but: {present}; pass --label-feature or --unlabelled"
    oddities.take("label", ending, ())
    content = tar.extractfile(files[ending]).read()  # pyrefly: ignore[missing-attribute]
    # Test splits are published so.
    if not content.strip():
        return UNLABELLED, f"{files[ending].name} is empty; pass another --label-feature, or --unlabelled"
    try:
        if ending.endswith("json"):
            return _json_label(content, files[ending].name, required=options.label_feature is not None)
        return parse_label(content, files[ending].name), ""
    except DamagedRecord:
        if not options.unlabelled:
            raise
        return UNLABELLED, ""


def _json_label(content: bytes, name: str, *, required: bool) -> tuple[Label, str]:
    try:
        fields = parse_json(content, dict)
    except ValueError:
        raise DamagedRecord(f'{name} is not a JSON object with "label" or "cls"') from None
    value = next((fields[each] for each in JSON_LABELS if fields.get(each) not in (None, "")), None)
    if value is None:
        return UNLABELLED, f"{name} has none of {', '.join(JSON_LABELS)}, but: {', '.join(fields)}" if required else ""
    if not isinstance(value, int | float | str):
        raise DamagedRecord(f"the label in {name} is {str(value)[:40]}; expected a number, or the name of a class")
    return parse_label(str(value).encode(), name), ""
