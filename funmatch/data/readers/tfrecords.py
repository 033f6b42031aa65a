"""Lists the images in TFRecord shards by their position, and reads them in place."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from funmatch.data.dataset import UNLABELLED, Dataset, ReadOptions, Track, untracked
from funmatch.data.formats.tfrecord import DamagedRecord, Features, Span, parse_example, records
from funmatch.data.labels import Label, parse_label, whole_number
from funmatch.data.readers.shard_paths import is_noted, shard_paths
from funmatch.data.readers.shards import Oddities, Record, open_shards
from funmatch.data.shard_labels import Labels, labels_of

# Feature names of an image and its class, tried in this order: of the earlier project, of TensorFlow Datasets, of
# TensorFlow's ImageNet scripts, WebDataset's endings, and of TensorFlow's own guide, where images are plain pixels.
FEATURES = (
    ("image", "class"),
    ("image", "label"),
    ("image/encoded", "image/class/label"),
    ("jpg", "cls"),
    ("image_raw", "label"),
)
# Where records say the sizes of images: as one list, or one by one.
SHAPES = ("image/shape", "shape")
SIZES = (("image/height", "image/width"), ("height", "width"), ("rows", "cols"))
CHANNELS = ("image/channels", "channels", "depth")
ENDINGS = r"\.tfrec(ord)?s?([-.]|$)|-\d{5}-of-\d{5}$"
ENCODED = (b"\xff\xd8\xff", b"\x89PNG")
COUNTED = re.compile(r"-(\d+)-(\d+)\.tfrec$")  # <split>_<name>-<shard>-<count>.tfrec


def open_tfrecords(pattern: str, options: ReadOptions, track: Track = untracked) -> Dataset:
    """Lists TFRecord shards of `tf.train.Example`s; every checksum is verified.

    Splits come from the folder's or the file's name (`train/…`, `train_…`, `…-validation.tfrecord-00000-of-00004`).
    The number of records is compared with the count in names like `train_pets37-00-128.tfrec`.

    Raises:
        InputError: lists every damaged shard with the record.
    """
    paths = shard_paths(pattern, ENDINGS, track)
    # Our own unlabelled shards have no feature `class`, which elsewhere would be an error.
    if is_noted(paths, "labelled", False):
        options = replace(options, unlabelled=True)
    # Then images of equal content stay apart, as they were, though each may have a single class.
    several = options.task == "multilabel" and is_noted(paths, "task", "multilabel")

    def list_shard(path: Path, oddities: Oddities) -> list[Record]:
        shard_records = []
        for number, (start, payload) in enumerate(records(path)):
            try:
                features = parse_example(payload)
                oddities.features.update(features)
                image, label = _choose_features(features, options, oddities)
                a, b = _image_span(features, image)
                value, lacking = _label(features, payload, label, options)
                value = labels_of(value) if several and not lacking else value
            except DamagedRecord as error:
                raise DamagedRecord(f"record {number}: {error}") from None
            if lacking:
                # No error yet: a whole split may be published without labels.
                kind = oddities.empty if value == () else oddities.unlabelled
                kind.setdefault(path, f"record {number}: {lacking}")
            # Scans are kept by the names of images: with another feature, the same record is another image.
            name = f"{number} ({image})" if options.image_feature else number
            shard_records.append(Record(start + a, b - a, value, name, _pixel_header(features, payload[a:b])))
        if (counted := COUNTED.search(path.name)) and int(counted[2]) != len(shard_records):
            raise DamagedRecord(f"has {len(shard_records)} records, but its name says {int(counted[2])}")
        return shard_records

    return open_shards(pattern, paths, ENDINGS, list_shard, options, track)


def _choose_features(features: Features, options: ReadOptions, oddities: Oddities) -> tuple[str, str]:
    """Returns the names of the features that hold the image and the label; the record may lack both."""
    # As pairs: `image` alone does not say whether its label is `class` or `label`.
    pairs = [(options.image_feature or image, options.label_feature or label) for image, label in FEATURES]
    with_image = [pair for pair in pairs if pair[0] in features]
    image, label = next(
        (pair for pair in with_image if pair[1] in features or pair[1] == "none"), (with_image or pairs)[0]
    )
    for kind, name, usual in zip(("image", "label"), (image, label), zip(*pairs, strict=True), strict=True):
        if name in features:
            oddities.take(kind, name, {each for each in usual if each in features and each != name})
    return image, label


def _image_span(features: Features, image: str) -> Span:
    """Returns the bounds of the image in a record."""
    if image not in features:
        raise DamagedRecord(f"has no feature {image!r}, but: {', '.join(sorted(features))}; pass --image-feature")
    values = features[image]
    first = values[0] if len(values) else None
    if first is None:
        raise DamagedRecord(f"feature {image!r} has no image; expected encoded bytes")
    if not isinstance(first, tuple):
        raise DamagedRecord(
            f"feature {image!r} holds {len(values):,} numbers, not an encoded image; write each image as JPEG or PNG"
        )
    # The first of several would train on a part of the data without a word.
    if len(values) > 1:
        raise DamagedRecord(
            f"feature {image!r} holds {len(values)} images; write a record for each, or pass another --image-feature"
        )
    return first


def _pixel_header(features: Features, image: bytes) -> bytes:
    """Returns what makes an image file (PNM) of plain pixels; nothing where an image is encoded.

    Pixels are those whose number of bytes is that of the sizes in their record: height × width × 1 or 3, uint8.
    """
    if image.startswith(ENCODED):
        return b""
    shapes = [_numbers(features, name) for name in SHAPES]
    for names in SIZES:
        size = [each for name in names for each in _numbers(features, name)]
        given = [each for name in CHANNELS for each in _numbers(features, name)][:1]
        shapes += [[*size, channels] for channels in given or (3, 1)]
    for shape in shapes:
        height, width, channels = (*shape, 1) if len(shape) == 2 else shape if len(shape) == 3 else (0, 0, 0)
        if min(height, width) > 0 and channels in (1, 3) and height * width * channels == len(image):
            return b"P%d\n%d %d\n255\n" % (6 if channels == 3 else 5, width, height)
    return b""


def _numbers(features: Features, name: str) -> list[int]:
    """Returns the whole numbers of a feature; none where it is missing or holds others."""
    values = features.get(name, [])
    return [int(each) for each in values if not isinstance(each, tuple) and float(each).is_integer()]


def _label(features: Features, payload: bytes, label: str, options: ReadOptions) -> tuple[Labels, str]:
    """Returns the label of a record, or with several an image all of them, and what to say if it should have one."""
    if label == "none":
        return UNLABELLED, ""
    if label not in features:
        present = ", ".join(sorted(features))
        return UNLABELLED, f"has no feature {label!r}, but: {present}; pass --label-feature or --unlabelled"
    values = features[label]
    # An empty text too: test splits are published so.
    if not len(values) or (
        isinstance(values[0], tuple) and len(values) == 1 and not payload[slice(*values[0])].strip()
    ):
        none = () if options.task == "multilabel" else UNLABELLED
        return none, f"feature {label!r} is empty; pass another --label-feature, or --unlabelled"
    try:
        if len(values) > 1 and options.task == "multilabel":
            return _parse_values(values, payload, f"feature {label!r}"), ""
        return _parse_value(values, payload, f"feature {label!r}"), ""
    except DamagedRecord:
        if not options.unlabelled:
            raise
        return UNLABELLED, ""


def _parse_values(values: list | np.ndarray, payload: bytes, where: str) -> tuple[Label, ...]:
    """Reads several labels; -1 and empty texts, which fill up lists to one length, stand for none."""
    filled = [i for i, each in enumerate(values) if not isinstance(each, tuple) or payload[slice(*each)].strip()]
    labels = [_parse_value(values[i : i + 1], payload, where) for i in filled]
    found = tuple(dict.fromkeys(label for label in labels if label != UNLABELLED))
    # Numbers come twice in a vector of 0 and 1 for each class, whose ones would be read as class 1.
    if len(found) < len(labels) - labels.count(UNLABELLED) and not isinstance(found[0], str):
        raise DamagedRecord(
            f"{where} has {len(values):,} values with repetitions; expected the numbers of the image's classes, each "
            "once (of a 0 or 1 for each class, write the positions of the ones)"
        )
    return found


def _parse_value(values: list | np.ndarray, payload: bytes, where: str) -> Label:
    if len(values) > 1:
        raise DamagedRecord(
            f"{where} has {len(values):,} values; expected one label (of one-hot vectors, write the position of the "
            "1; for several labels an image, pass --task multilabel)"
        )
    if isinstance(values, np.ndarray):
        return whole_number(float(values[0]), where)
    return values[0] if isinstance(values[0], int) else parse_label(payload[slice(*values[0])], where)
