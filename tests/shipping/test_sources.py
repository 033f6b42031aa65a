"""Which images paths, patterns and lists give, in which order; and images that Python gives."""

import glob
import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from make_images import paint
from PIL import Image

import funmatch as api
from funmatch.data.dataset import ReadOptions
from funmatch.data.decode import decode
from funmatch.errors import InputError
from funmatch.shipping.sources import files
from funmatch.shipping.sources.files import Decoding, match_pattern, read_list, walk_folder
from funmatch.shipping.sources.find import find_images
from funmatch.shipping.sources.given import GivenImage

TEACHER = "fashion-mini-teacher"
NAMES = [
    "b.jpg", "a/1.png", "a/2.JPG", "a.b/3.jpg", "a-b/4.jpeg", "a0/5.webp", "a/deep/er/6.jpg", "c/test/7.jpg",
    "d/test/8.png", "c/train/9.jpg", "[x]/10.jpg",
]  # fmt: skip
OTHERS = ["notes.txt", "a/table.csv", ".hidden.jpg", "._b.jpg", ".git/x.jpg", "@eaDir/y.jpg", "c/test/7.jpg.bak"]


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    """A folder of empty files with the names above, which is the current one."""
    for name in NAMES + OTHERS:
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.chdir(tmp_path / "tree")
    return tmp_path / "tree"


def paths(images) -> list[str]:
    return [image.path for image in images]


def test_a_folder_gives_its_images_in_the_order_of_sorted_paths(tree):
    assert paths(walk_folder(str(tree))) == sorted(f"{tree}/{name}" for name in NAMES)


@pytest.mark.parametrize(
    "pattern",
    [
        "*.jpg", "**/*.jpg", "*/*.png", "a*/*", "**/test/*", "?/test/*.jpg", "c/**/*.jpg", "[ab]/*", "**/*.jp*g",
        "**/d*/*",
    ],
)  # fmt: skip
def test_patterns_match_what_the_shell_and_glob_match(pattern, tree):
    # Without the folders that systems add beside images, which are never looked into.
    matched = {path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path) and "@eaDir" not in path}
    expected = sorted(path for path in matched if Path(path).suffix.lower() in files.EXTENSIONS)
    found = paths(match_pattern(pattern))
    # A folder that matches gives all images in it, too.
    assert [path for path in found if path in matched] == expected
    assert paths(match_pattern(f"{tree}/{pattern}")) == [f"{tree}/{path}" for path in found]
    assert found == sorted(set(found))


@pytest.mark.usefixtures("tree")
def test_patterns_of_folders_endings_and_everything():
    assert paths(match_pattern("*/test")) == ["c/test/7.jpg", "d/test/8.png"]
    assert paths(match_pattern("**/*.bak")) == ["c/test/7.jpg.bak"]
    assert paths(match_pattern("**")) == sorted(NAMES)
    assert paths(match_pattern("a/**")) == ["a/1.png", "a/2.JPG", "a/deep/er/6.jpg"]
    assert paths(match_pattern("nothing*")) == []


@pytest.mark.usefixtures("tree")
def test_paths_that_look_like_patterns_are_taken_as_they_are():
    assert paths(find_images(["[x]"], ReadOptions()).images) == ["[x]/10.jpg"]
    assert paths(find_images(["[x]/10.jpg", "b.jpg", "b.jpg"], ReadOptions()).images) == [
        "[x]/10.jpg",
        "b.jpg",
        "b.jpg",
    ]


def test_links_are_followed_and_circles_are_not(tree):
    (tree / "a" / "up").symlink_to("..")
    (tree / "e").symlink_to("c")
    (tree / "f.jpg").symlink_to("b.jpg")
    found = paths(walk_folder("."))
    assert found == sorted(
        [*(f"./{name}" for name in NAMES), *(f"./e/{x}" for x in ("test/7.jpg", "train/9.jpg")), "./f.jpg"]
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_that_cannot_be_listed_is_an_image_that_cannot_be_read(tree):
    (tree / "a").chmod(0)
    found = {image.path: image for image in walk_folder(str(tree))}
    with pytest.raises(PermissionError):
        found[f"{tree}/a"].read()


def test_counts_are_known_where_nothing_is_walked(tree):
    assert find_images(["b.jpg", "a/1.png"], ReadOptions()).count == 2
    assert find_images(["b.jpg", str(tree)], ReadOptions()).count is None
    assert find_images(["fashion-mini"], ReadOptions(), "val").count == 500
    assert find_images(["fashion-mini"], ReadOptions(), "all").count == 2700
    with pytest.raises(InputError, match="known: all, test, train, val"):
        find_images(["fashion-mini"], ReadOptions(), "dev2")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\0"])
def test_lists_are_read_by_lines_or_zeros_as_they_come(end, monkeypatch):
    monkeypatch.setattr(files, "FIRST_BYTES", 7)  # so that names lie across the borders of what is read at once
    names = ["a b.jpg", "ä.jpg", "\udcff.jpg", " c.jpg"]
    stream = io.TextIOWrapper(io.BytesIO(end.join([names[0], "", *names[1:]]).encode(errors="surrogateescape")))
    if end == "\0":
        monkeypatch.setattr(files, "FIRST_BYTES", 9)
    assert paths(read_list(stream)) == names


def test_objects_are_decoded_as_files_of_them_would_be(tmp_path):
    photo = Image.open(paint(tmp_path / "photo.png", 3, (900, 700)))
    buffer = io.BytesIO()
    photo.save(buffer, "PNG")
    expected = decode(buffer.getvalue(), cap=512)
    for value in (photo, np.asarray(photo)):
        np.testing.assert_array_equal(GivenImage(value).pixels(Decoding(512)), expected)
    turned = Image.Exif()
    turned[0x0112] = 8
    photo.save(tmp_path / "turned.jpg", exif=turned, quality=95)
    opened = GivenImage(Image.open(tmp_path / "turned.jpg")).pixels(Decoding(5000))
    np.testing.assert_array_equal(opened, decode((tmp_path / "turned.jpg").read_bytes()))


def test_arrays_and_tensors_of_every_layout_are_one_image(tmp_path):
    array = np.asarray(Image.open(paint(tmp_path / "photo.png", 3, (50, 40))))
    tensor = torch.from_numpy(array.copy())
    expected = api.predict(TEACHER, tmp_path / "photo.png")
    chw = tensor.permute(2, 0, 1)
    single = [
        array, array.astype(np.float32) / 255, array.astype(np.float64) / 255, array.transpose(2, 0, 1), tensor, chw,
        chw.float() / 255, (chw.float() / 255).requires_grad_(), Image.fromarray(array),
    ]  # fmt: skip
    for value in [*single, [array], chw[None], iter([array]), (array,)]:
        found = api.predict(TEACHER, value)
        assert isinstance(found, api.Prediction) == any(value is each for each in single)
        one = found if isinstance(found, api.Prediction) else found[0]
        np.testing.assert_allclose(one.probabilities, expected.probabilities, atol=1e-6)
    grey = array[..., 0]
    np.testing.assert_allclose(
        api.predict(TEACHER, grey).probabilities, api.predict(TEACHER, np.stack([grey] * 3, 2)).probabilities, atol=1e-6
    )


def test_results_are_lists_with_labels_scores_and_probabilities(images):
    found = api.predict(
        TEACHER, [images / "val" / "ant" / "0.jpg", "missing.jpg", images / "val" / "cat"], topk=3, teacher=TEACHER
    )
    assert len(found) == 5
    assert found.labels[0] == found[0].label == found[0].top[0][0]
    assert found.scores[0] == np.float32(found[0].score) == found[0].probabilities.max()
    assert found.probabilities.shape == (5, 10)
    assert [len(one.top) for one in found] == [3, 0, 3, 3, 3]
    missing = found[1]
    assert (missing.error, missing.label, missing.score) == ("No such file or directory", None, None)
    assert np.isnan(found.probabilities[1]).all()
    assert np.isnan(found.scores[1])
    assert found[0].agreement is True
    assert found[0].kl == pytest.approx(0, abs=1e-6)
    assert found[0].teacher.label == found[0].label
    assert [type(part).__name__ for part in (found[1:3], found[-1])] == ["Predictions", "Prediction"]
    assert repr(found[0]).startswith("Prediction('")
    assert "No such file" in repr(found)
    assert "<table>" in found._repr_html_()
    assert list(api.predict(TEACHER, [])) == []


def test_the_model_may_be_a_module_a_run_or_a_folder(images, tiny_run):
    run = tiny_run
    photo = Image.open(images / "test" / "bee" / "0.jpg")
    student = run.student()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    found = [
        api.predict(model, photo).probabilities for model in (run, run.folder, str(run.folder / "student"), student)
    ]
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=1e-6)
    # The caller's module is not folded.
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (3, "images: wanted paths, PIL images"),
        ("missing.jpg", "no file or folder missing.jpg"),
        (np.zeros((4, 4, 3), np.int64), "image 0 is of int64; expected uint8"),
        (np.full((4, 4, 3), 200.0), "image 0 has values from 200 to 200; expected floats from 0 to 1"),
        (np.full((4, 4, 3), np.nan), "expected floats from 0 to 1"),
        (np.zeros((5, 4, 2), np.uint8), "image 0 has the shape (5, 4, 2)"),
        ([np.zeros((1, 2, 3, 4, 5), np.uint8)], "image 0 has the shape (1, 2, 3, 4, 5)"),
        (np.zeros((0, 4, 3), np.uint8), "which holds no pixels"),
        (["x.jpg", None], "image 1: wanted paths"),
        ({"a": 1}, "images: wanted paths"),
    ],
)
def test_what_is_not_an_image_is_refused_in_a_sentence(images, message):
    with pytest.raises(InputError) as error:
        api.predict(TEACHER, images)
    assert message in str(error.value)


def test_an_image_that_cannot_be_read_alone_is_an_error(tmp_path):
    (tmp_path / "x.jpg").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"x\.jpg cannot be read: not an image"):
        api.predict(TEACHER, tmp_path / "x.jpg")
    for options, message in (({"topk": 0}, "topk must be at least 1"), ({"side": "4"}, "side: wanted a whole number")):
        with pytest.raises(InputError, match=message):
            api.predict(TEACHER, tmp_path / "x.jpg", **options)
