"""Shards and views against TensorFlow itself.

pip install '.[tensorflow]', then pytest -m slow tests/data/test_tensorflow.py
"""

import io
from pathlib import Path

import numpy as np
import pytest
from make_images import paint
from PIL import Image

from funmatch.data.dataset import ReadOptions
from funmatch.data.decode import decode
from funmatch.data.readers.open import open_dataset

pytestmark = pytest.mark.slow


@pytest.fixture(name="tf", scope="module")
def tensorflow():
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("tensorflow")


def encode_image(tf, i: int) -> bytes:
    pixels = np.full((6, 8, 3), i * 20, np.uint8)
    pixels[:, :4] = (i * 7, 255 - i * 9, 90)
    return tf.io.encode_jpeg(pixels, quality=100, chroma_downsampling=False).numpy()


def example(tf, **values) -> bytes:
    """A serialised Example of bytes, integers and floats."""

    def feature(value):
        if isinstance(value, bytes):
            return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
        if isinstance(value, int):
            return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))
        return tf.train.Feature(float_list=tf.train.FloatList(value=value))

    features = {name: feature(value) for name, value in values.items()}
    return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()


def write_shard(tf, path: Path, records: list[bytes], compression: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tf.io.TFRecordWriter(str(path), tf.io.TFRecordOptions(compression_type=compression)) as file:
        for record in records:
            file.write(record)


@pytest.mark.parametrize("compression", ["", "GZIP", "ZLIB"])
def test_shards_written_by_tensorflow_are_read(tf, tmp_path, compression):
    rng = np.random.default_rng(0)
    images = [encode_image(tf, i) for i in range(12)]
    rows = [
        {
            "image": jpeg,
            "class": i,
            "id": rng.bytes(int(rng.integers(0, 400))),
            "score": [0.5] * int(rng.integers(0, 9)),
        }
        for i, jpeg in enumerate(images)
    ]
    for row in rows:  # any order of features
        names = list(row)
        rng.shuffle(names)
        row |= {name: row.pop(name) for name in names}
    for shard in range(3):
        part = [example(tf, **row) for row in rows[shard * 4 : shard * 4 + 4]]
        write_shard(tf, tmp_path / "train" / f"train_pets37-{shard:02}-4.tfrec", part, compression)
    source = open_dataset(f"tfrecord:{tmp_path}/*/*.tfrec")
    assert source.splits["train"].labels.tolist() == list(range(12))
    assert [source.read("train", i) for i in range(12)] == images


def test_other_names_and_unusual_values(tf, tmp_path):
    long = bytes(range(256)) * 1000
    rows = [
        {"image/encoded": encode_image(tf, 1), "image/class/label": 2**31 - 1, "image/text": long},
        {"image/encoded": encode_image(tf, 2), "image/class/label": 0, "image/text": b""},
    ]
    write_shard(tf, tmp_path / "validation-00000-of-00001", [example(tf, **row) for row in rows])
    source = open_dataset(f"tfrecord:{tmp_path}", ReadOptions(label_feature="none"))
    assert [source.read("val", i) for i in range(2)] == [encode_image(tf, 1), encode_image(tf, 2)]


@pytest.mark.parametrize("side", [None, 32])
def test_tensorflow_reads_our_shards(tf, tmp_path, funmatch, side):
    for i in range(10):
        paint(tmp_path / "p" / "train" / f"c{i % 2}" / f"{i}.{('jpg', 'png')[i % 3 == 0]}", i, (50, 40))
    options = ["--side", str(side)] if side else []
    funmatch("prepare", "p", "--to", "tfrecord", "--shard-size", "4", "--out", "shards", *options)
    files = sorted(str(path) for path in tmp_path.glob("shards/train/train_p-*.tfrec"))
    assert [Path(file).name for file in files] == ["train_p-00-4.tfrec", "train_p-01-4.tfrec", "train_p-02-2.tfrec"]
    form = {"image": tf.io.FixedLenFeature([], tf.string), "class": tf.io.FixedLenFeature([], tf.int64)}
    found = []
    for record in tf.data.TFRecordDataset(files):
        row = tf.io.parse_single_example(record, form)
        pixels = tf.io.decode_jpeg(row["image"], channels=3, dct_method="INTEGER_ACCURATE").numpy()
        assert pixels.shape == ((side, side, 3) if side else (40, 50, 3))
        ours = decode(row["image"].numpy())
        assert np.abs(pixels.astype(int) - ours).max() <= 3, "the same JPEG by another library"
        if side:
            layers = Image.open(io.BytesIO(row["image"].numpy())).layer
            assert [layer[1:3] for layer in layers] == [(1, 1)] * 3
        found.append(int(row["class"]))
    assert sorted(found) == [0] * 5 + [1] * 5


def test_committed_shards_equal_what_tensorflow_writes(tf, tmp_path):
    """test_tfrecords.py reads the committed shards without TensorFlow, so they must stay what it writes."""
    rows = [example(tf, **{"image": encode_image(tf, i), "class": i}) for i in range(3)]
    write_shard(tf, tmp_path / "a.tfrec", rows)
    committed = Path(__file__).parent / "tfrecords" / "plain" / "train" / "train_pets37-00-3.tfrec"
    theirs, ours = (
        [bytes(r.numpy()) for r in tf.data.TFRecordDataset(str(p))] for p in (tmp_path / "a.tfrec", committed)
    )
    assert list(map(tf.train.Example.FromString, theirs)) == list(map(tf.train.Example.FromString, ours))


def test_crops_have_tensorflows_distribution(tf):
    """Two-sample Kolmogorov-Smirnov on area, aspect and centre, 100,000 draws."""
    from scipy.stats import ks_2samp

    from funmatch.ops.sampling import sample_inception_boxes, step_generator

    n, height, width = 100_000, 375, 500
    ours = sample_inception_boxes(step_generator(0, 0), np.full(n, height), np.full(n, width))

    @tf.function
    def draw(_):
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            [height, width, 3], tf.zeros([0, 0, 4], tf.float32), area_range=(0.05, 1.0),
            aspect_ratio_range=(3 / 4, 4 / 3), min_object_covered=0.0, max_attempts=100,
            use_image_if_no_bounding_boxes=True,
        )  # fmt: skip
        return tf.stack([begin[0], begin[1], size[0], size[1]])

    theirs = tf.map_fn(draw, tf.zeros(n), fn_output_signature=tf.int32).numpy()
    for name, figure in {
        "area": lambda b: b[:, 2] * b[:, 3],
        "aspect": lambda b: b[:, 3] / b[:, 2],
        "centre, down": lambda b: b[:, 0] + b[:, 2] / 2,
        "centre, across": lambda b: b[:, 1] + b[:, 3] / 2,
    }.items():
        p = ks_2samp(figure(ours), figure(theirs)).pvalue
        assert p > 0.01, (name, p)


def test_crops_equal_tensorflows_crop_and_resize(tf):
    """Within 1/255; boxes are converted, because `tf.image.crop_and_resize` samples between corner pixels."""
    import torch

    from funmatch.ops.crops import crop_resize_flip

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (90, 120, 3), dtype=np.uint8)
    side = 32
    for _ in range(20):
        height, width = (int(rng.integers(33, size + 1)) for size in (90, 120))
        top, left = int(rng.integers(0, 91 - height)), int(rng.integers(0, 121 - width))
        # Half-pixel centres of the first and the last sample, over (size - 1) as crop_and_resize counts.
        first = [top + height / side / 2 - 0.5, left + width / side / 2 - 0.5]
        last = [top + height - height / side / 2 - 0.5, left + width - width / side / 2 - 0.5]
        box = [[first[0] / 89, first[1] / 119, last[0] / 89, last[1] / 119]]
        theirs = tf.image.crop_and_resize(pixels[None].astype(np.float32), box, [0], (side, side)).numpy()[0]
        at, unflipped = np.array([[top, left, height, width]]), np.array([False])
        ours = crop_resize_flip([torch.from_numpy(pixels)], at, unflipped, side)
        assert np.abs(ours[0].permute(1, 2, 0).numpy() * 255 - theirs).max() <= 1
