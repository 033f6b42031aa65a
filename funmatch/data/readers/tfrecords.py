"""Lists the images in TFRecord shards by their position, and reads them in place."""

import re
from dataclasses import replace
from pathlib import Path

from funmatch.data.dataset import UNLABELLED, Dataset, ReadOptions, Track, untracked
from funmatch.data.formats.tfrecord import DamagedRecord, Features, parse_example, records
from funmatch.data.readers.shard_paths import is_noted_unlabelled, shard_paths
from funmatch.data.readers.shards import Oddities, Record, open_shards, parse_label

# Feature names of an image and its class, tried in this order: of the earlier project, of TensorFlow Datasets, of
# TensorFlow's ImageNet scripts, and WebDataset's endings.
FEATURES = (("image", "class"), ("image", "label"), ("image/encoded", "image/class/label"), ("jpg", "cls"))
COUNTED = re.compile(r"-(\d+)-(\d+)\.tfrec$")  # <split>_<name>-<shard>-<count>.tfrec


def open_tfrecords(pattern: str, options: ReadOptions, track: Track = untracked) -> Dataset:
    """Lists TFRecord shards of `tf.train.Example`s; every checksum is verified.

    Splits come from the folder's or the file's name (`train/…`, `train_…`, `…-validation.tfrecord-00000-of-00004`).
    The number of records is compared with the count in names like `train_pets37-00-128.tfrec`.

    Raises:
        InputError: lists every damaged shard with the record.
    """
    paths = shard_paths(pattern, r"\.tfrec(ord)?s?([-.]|$)|-\d{5}-of-\d{5}$")
    # Our own unlabelled shards have no feature `class`, which elsewhere would be an error.
    if is_noted_unlabelled(paths):
        options = replace(options, unlabelled=True)

    def list_shard(path: Path, oddities: Oddities) -> list[Record]:
        shard_records = []
        for number, (start, payload) in enumerate(records(path)):
            try:
                (a, b), label, lacking = _image_and_label(parse_example(payload), payload, options)
            except DamagedRecord as error:
                raise DamagedRecord(f"record {number}: {error}") from None
            if lacking:
                # No error yet: a whole split may be published without labels.
                oddities.unlabelled.setdefault(path, f"record {number}: {lacking}")
            shard_records.append(Record(start + a, b - a, label, number))
        if (counted := COUNTED.search(path.name)) and int(counted[2]) != len(shard_records):
            raise DamagedRecord(f"has {len(shard_records)} records, but its name says {int(counted[2])}")
        return shard_records

    return open_shards(pattern, paths, list_shard, options, track)


def _image_and_label(features: Features, payload: bytes, options: ReadOptions) -> tuple[tuple[int, int], int, str]:
    """Returns the bounds of the image in the payload, its label, and what to say if there should be one."""
    # As pairs: `image` alone does not say whether its label is `class` or `label`.
    pairs = [(options.image_feature or image, options.label_feature or label) for image, label in FEATURES]
    with_image = [pair for pair in pairs if pair[0] in features]
    image, label = next(
        (pair for pair in with_image if pair[1] in features or pair[1] == "none"), (with_image or pairs)[0]
    )
    present = ", ".join(sorted(features))
    if image not in features:
        raise DamagedRecord(f"has no feature {image!r}, but: {present}; pass --image-feature")
    spans, numbers = features[image], features.get(label)
    if not spans or not isinstance(spans[0], tuple):
        raise DamagedRecord(f"feature {image!r} has no image; expected encoded bytes")
    if label == "none":
        return spans[0], UNLABELLED, ""
    if label not in features:
        lacking = f"has no feature {label!r}, but: {present}; pass --label-feature or --unlabelled"
        return spans[0], UNLABELLED, lacking
    try:
        return spans[0], _parse_numbers(numbers, payload, label), ""
    except DamagedRecord:
        if not options.unlabelled:
            raise
        return spans[0], UNLABELLED, ""


def _parse_numbers(numbers: list | None, payload: bytes, label: str) -> int:
    if not numbers or len(numbers) > 1:
        raise DamagedRecord(f"feature {label!r} has {len(numbers or [])} values; expected one label")
    value = numbers[0]
    return value if isinstance(value, int) else parse_label(payload[slice(*value)], f"feature {label!r}")
