"""`funmatch predict`: the classes are those that timm and evaluate give, and every file gets its row."""

import csv
import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from make_images import paint
from PIL import Image

import funmatch as api
from funmatch import cli
from funmatch.config import Evaluate
from funmatch.runtime import devices
from funmatch.training import datasets
from funmatch.training.evaluation import scoring
from funmatch.training.student.trained_model import open_trained_model

TINY = {"student": "resnet10t", "student_kwargs": {"channels": [8, 8, 8, 8], "stem_width": 8}, "side": 32, "batch": 8}
TEACHER = "fashion-mini-teacher"


@pytest.fixture
def run(images, tmp_path, finished_run):
    """A finished run on the painted images."""
    return finished_run(tmp_path / "run", "train", data=str(images), steps=3, device="cpu", **TINY).folder


@pytest.fixture
def oddities(tmp_path) -> Path:
    """A folder of images that are not simply small RGB: large, turned by EXIF, palette, 16 bits, transparent, CMYK."""
    root = tmp_path / "odd"
    photo = Image.open(paint(root / "large.jpg", 1, (1300, 900)))
    turned = Image.Exif()
    turned[0x0112] = 6
    photo.resize((90, 60)).save(root / "exif.jpg", exif=turned)
    photo.resize((64, 50)).quantize(16).save(root / "palette.png")
    deep = np.linspace(0, 65535, 48 * 40, dtype=np.uint16).reshape(40, 48)
    Image.fromarray(deep).save(root / "deep.png")
    clear = photo.resize((40, 40)).convert("RGBA")
    clear.putalpha(100)
    clear.save(root / "clear.png")
    photo.resize((70, 44)).convert("CMYK").save(root / "cmyk.jpg")
    return root


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_probabilities_are_those_of_timms_own_model_and_transform(run, images, funmatch):
    rows = rows_of(funmatch("predict", run, images / "test", "--topk", "3").stdout)
    model = timm.create_model(f"local-dir:{run}/student", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    names = model.pretrained_cfg["label_names"]
    assert [row["path"] for row in rows] == sorted(map(str, (images / "test").rglob("*.*")))
    for row in rows:
        with torch.inference_mode():
            expected = model(transform(Image.open(row["path"]).convert("RGB"))[None]).softmax(-1)[0]
        order = expected.argsort(descending=True).tolist()
        found = [(row[f"class{end}"], float(row[f"probability{end}"])) for end in ("", "_2", "_3")]
        assert [name for name, _ in found] == [names[i] for i in order]
        assert [value for _, value in found] == pytest.approx(expected[order].tolist(), abs=1e-5)
        assert row["error"] == ""


def test_logits_are_those_of_evaluate_for_large_turned_deep_and_transparent_images(run, oddities):
    trained = open_trained_model(str(run))
    config = Evaluate(model=str(run), data=(str(oddities),))
    cache = datasets.open_data_set(config, config.data)
    device = torch.device("cpu")
    view = scoring.eval_view_of(trained.preprocessing, 4, device, devices.resolve_precision("auto", device))
    expected = scoring.predict(trained.classifier, cache.splits["train"], view).softmax(-1).numpy()
    found = api.predict(run, oddities)
    assert [one.path for one in found] == sorted(map(str, oddities.iterdir()))
    np.testing.assert_allclose(found.probabilities, expected, atol=1e-5)
    # Without the cap the large image is another: the agreement above is not for want of a difference.
    uncapped = api.predict(run, oddities, cap=5000)
    assert np.abs(uncapped.probabilities - expected).max() > 1e-5


def test_every_format_holds_the_same_predictions(images, tmp_path, funmatch):
    from pyarrow import parquet

    outs = {kind: tmp_path / f"out.{kind}" for kind in ("csv", "jsonl", "parquet")}
    for out in outs.values():
        shown = funmatch("predict", TEACHER, images / "val", "--out", out, "--topk", "2", "--teacher", TEACHER).stdout
        assert f"rows: {out}" in shown
        assert "agreement" in shown
    lines = [json.loads(line) for line in outs["jsonl"].read_text().splitlines()]
    assert parquet.read_table(outs["parquet"]).to_pylist() == [
        line
        | {key: float(np.float32(line[key])) for key in ("probability", "teacher_probability", "kl")}
        | {"probabilities": [float(np.float32(value)) for value in line["probabilities"]]}
        for line in lines
    ]
    for row, line in zip(rows_of(outs["csv"].read_text()), lines, strict=True):
        assert [row["path"], row["class"], row["class_2"]] == [line["path"], *line["classes"]]
        assert [float(row["probability"]), float(row["probability_2"])] == line["probabilities"]
        assert (row["teacher_class"], row["agreement"], float(row["kl"])) == (line["class"], "true", line["kl"])


def test_a_threshold_empties_the_class_and_keeps_the_row(images, funmatch):
    whole = rows_of(funmatch("predict", TEACHER, images / "val").stdout)
    some = rows_of(funmatch("predict", TEACHER, images / "val", "--threshold", "0.7").stdout)
    assert len(some) == len(whole)
    assert {row["class"] == "" for row in some} == {True, False}
    for row, before in zip(some, whole, strict=True):
        sure = float(before["probability"]) >= 0.7
        assert row["class"] == (before["class"] if sure else "")
        assert row["class_2"] == ""


def test_unreadable_files_get_a_row_with_the_reason_in_their_place(images, funmatch):
    broken = images / "val" / "bee" / "1.png"
    broken.write_bytes(broken.read_bytes()[:60])
    (images / "val" / "cat" / "link.png").symlink_to("nowhere")
    done = funmatch("predict", TEACHER, images / "val")
    rows = rows_of(done.stdout)
    assert [row["path"] for row in rows] == sorted(row["path"] for row in rows)
    assert len(rows) == 10
    bad = {Path(row["path"]).name: row for row in rows if row["error"]}
    assert set(bad) == {"1.png", "link.png"}
    assert bad["link.png"]["error"] == "No such file or directory"
    assert {row["class"] for row in bad.values()} == {""}
    assert "2 of 10 images cannot be read" in done.stderr
    strict = funmatch("predict", TEACHER, images / "val", "--strict", check=2)
    assert rows_of(strict.stdout) == rows
    assert "2 of 10 images cannot be read" in strict.stderr


def test_a_list_on_standard_input_may_name_missing_files(images, funmatch, monkeypatch):
    first, second = sorted(map(str, (images / "val").rglob("*.png")))[:2]
    for text in (f"{first}\r\n\nmissing.jpg\n{second}", f"{first}\0missing.jpg\0{second}\0"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        rows = rows_of(funmatch("predict", TEACHER, "-", "--topk", "1").stdout)
        assert [row["path"] for row in rows] == [first, "missing.jpg", second]
        assert [row["error"] for row in rows] == ["", "No such file or directory", ""]


def test_an_empty_list_is_a_mistake(funmatch, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    assert "the list of paths on standard input is empty" in funmatch("predict", TEACHER, "-", check=2).stderr


def test_a_data_set_gives_the_images_of_a_split_as_evaluate_does(funmatch):
    done = funmatch("predict", TEACHER, "fashion-mini", "--format", "jsonl", "--topk", "1")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 2000
    assert "the images of test" in done.stderr
    right = np.mean([row["path"].split("/")[1] == row["class"] for row in found])
    assert right == pytest.approx(json.loads(
        funmatch("evaluate", TEACHER, "--data", "fashion-mini", "--split", "test", "--json").stdout
    )["top1"])  # fmt: skip
    assert len(funmatch("predict", TEACHER, "fashion-mini", "--split", "val").stdout.splitlines()) == 501


def test_shards_are_predicted_by_the_names_of_their_records(funmatch):
    shards = Path(__file__).parents[1] / "data" / "tfrecords" / "plain"
    rows = rows_of(funmatch("predict", TEACHER, f"tfrecord:{shards}/train/*.tfrec").stdout)
    assert len(rows) == 5
    assert not {row["error"] for row in rows} - {""}


def test_each_model_sees_images_by_its_own_preprocessing(run, images, funmatch):
    (images / "map.json").write_text(json.dumps({"ant": 0, "bee": 1, "cat": [2, 3]}))
    words = ("predict", run, images / "test", "--teacher", TEACHER, "--teacher-side", "40")
    other = funmatch(*words, check=2)
    assert "has 10 classes, but" in other.stderr
    assert "--classes same-names or --classes map.json" in other.stderr
    rows = rows_of(funmatch(*words, "--classes", images / "map.json").stdout)
    teacher = api.predict(TEACHER, images / "test", side=40, topk=10).probabilities
    summed = np.stack([teacher[:, 0], teacher[:, 1], teacher[:, 2] + teacher[:, 3]], 1)
    summed /= summed.sum(1, keepdims=True)
    student = api.predict(run, images / "test").probabilities
    expected = (summed * np.log(summed / student)).sum(1)
    assert [float(row["kl"]) for row in rows] == pytest.approx(expected.tolist(), abs=1e-4)
    assert [float(row["teacher_probability"]) for row in rows] == pytest.approx(summed.max(1).tolist(), abs=1e-5)


def test_an_unfinished_run_is_predicted_by_its_newest_checkpoint(run, images, funmatch):
    for path in (run / "student").iterdir():
        path.unlink()
    (run / "student").rmdir()
    (run / "result.json").unlink()
    done = funmatch("predict", run, images / "test")
    assert "is not finished: using its newest checkpoint" in done.stderr
    assert len(rows_of(done.stdout)) == 12


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give the images: files, folders, patterns in quotes"),
        (["nothing.jpg"], "no file or folder nothing.jpg"),
        (["*.jpg"], "no image matches *.jpg"),
        (["empty"], "empty has no images"),
        (["-", "-"], "can be read only once"),
        (["there.png", "--format", "parquet"], "--format parquet needs --out FILE"),
        (["there.png", "--out", "there.png", "--format", "csv"], "there.png exists; pass --overwrite"),
        (["there.png", "--out", "rows.txt"], "ends in none of .csv"),
        (["there.png", "--out", "there.png/rows.csv"], "there.png is a file; choose another folder"),
        (["there.png", "--out", "empty"], "empty is a folder; name a file in it"),
        (["there.png", "--json"], "pass --out FILE"),
        (["there.png", "--classes", "same-names"], "--classes belongs to --teacher"),
        (["shards"], "pass tfrecord:"),
        (["https://example.org/photos"], "web servers have no listing of a folder's files"),
    ],
)
def test_what_cannot_be_predicted_is_refused_in_a_sentence(words, message, tmp_path, funmatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "a.tfrec").write_bytes(b"")
    paint(tmp_path / "there.png", 0)
    done = funmatch("predict", TEACHER, *words, check=2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "shards", "there.png"}


def test_parquet_without_its_library_names_the_extra(images, funmatch, monkeypatch):
    monkeypatch.setattr("funmatch.shipping.tables.find_spec", lambda _: None)
    done = funmatch("predict", TEACHER, images, "--out", "rows.parquet", check=2)
    assert "pip install 'funmatch[ship]'" in done.stderr


def test_a_pipe_that_nobody_reads_ends_quietly(images, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    # Closing the pipe flushes it once more, as Python does at its exit.
    with open(writer, "w") as pipe, redirect_stdout(pipe), pytest.raises(SystemExit) as end:
        cli.main(["predict", TEACHER, str(images / "val")])
    assert end.value.code == 1
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_a_closed_pipe_ends_quietly(images):
    for i in range(300):
        paint(images / "more" / f"{i}.png", i)
    command = f"{sys.executable} -m funmatch predict {TEACHER} {images}/more --batch 8 | head -2"
    environment = os.environ | {"PYTHONPATH": str(Path(api.__file__).parents[1])}
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment)
    assert len(done.stdout.splitlines()) == 2
    assert done.stderr.strip() == "predict: loading PyTorch and timm …"


def test_a_large_set_needs_no_more_threads_batches_or_rows_in_memory(images, monkeypatch):
    """At most two batches for each thread are read ahead of the network."""
    from funmatch.shipping import inference

    ahead, most = 0, 0

    class Counted:
        path = ""

        def pixels(self, how):  # noqa: ARG002
            return np.zeros((32, 32, 3), np.uint8)

    def endless():
        nonlocal ahead, most
        while True:
            ahead += 1
            most = max(most, ahead)
            yield Counted()

    monkeypatch.setattr(inference.devices, "spare_threads", lambda: 2)
    trained = open_trained_model(TEACHER)
    network = inference.ready(trained, torch.device("cpu"), "fp32")
    stream = inference.answer([network], endless(), inference.Decoding(512), 4, torch.device("cpu"))
    for _, each in zip(range(50), stream, strict=False):
        ahead -= len(each.paths)
    assert most <= (2 * 2 + 1) * 4
    assert images
