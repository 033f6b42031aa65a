"""The page and the table of an evaluation: complete, offline, and safe for any name of a class or an image."""

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from test_evaluation import classifier, paint_class

import funmatch
from funmatch.config import Evaluate, Report
from funmatch.errors import InputError
from funmatch.reports.evaluation import plots, rows, terminal
from funmatch.reports.evaluation.page import run
from funmatch.reports.run_page import write_page

NAMES = ('=1+1,"x"', "<b>[red]cat\n& dog", "a_$b$ 猫")


@pytest.fixture
def data(tmp_path):
    for s, (split, count) in enumerate((("train", 4), ("test", 5))):
        for c, name in enumerate(NAMES):
            for i in range(count):
                paint_class(tmp_path / "images" / split / name / f"-{i}, {split}.png", c, 1000 * s + 100 * c + i)
    return tmp_path / "images"


def test_lines_per_image_survive_readers_of_csv(data, tmp_path):
    metrics = funmatch.evaluate(
        classifier(), data=data, side=16, teacher=classifier(seed=1), per_image=tmp_path / "all.csv",
        others=[classifier(seed=2)],
    )  # fmt: skip
    assert metrics["per_image"] == str(tmp_path / "all.csv")
    with open(tmp_path / "all.csv", newline="") as file:
        found = [*csv.DictReader(file)]
    assert len(found) == metrics["pictures"] == 15
    assert {row["label"] for row in found} == {"'" + NAMES[0], *NAMES[1:]}
    names = sorted(path.relative_to(data).as_posix() for path in (data / "test").rglob("*.png"))
    assert sorted(row["image"] for row in found) == names
    assert all(row["image"].split("/")[1] == row["label"].removeprefix("'") for row in found)
    assert sum(row["correct"] == "true" for row in found) / 15 == pytest.approx(metrics["top1"])
    assert sum(row["agreement"] == "true" for row in found) / 15 == pytest.approx(metrics["agreement"])
    assert np.mean([float(row["kl"]) for row in found]) == pytest.approx(metrics["kl"], rel=1e-5)
    assert sum(key.startswith("predicted of ") for key in found[0]) == 1
    # The images that the JSON names are those of these lines.
    worst = max(found, key=lambda row: float(row["kl"]))
    assert metrics["differing"]["images"][0]["image"] == worst["image"]


def test_pandas_reads_numbers_and_truths(data, tmp_path):
    pandas = pytest.importorskip("pandas")
    path = tmp_path / "all.csv"
    metrics = funmatch.evaluate(classifier(), data=data, side=16, per_image=path)
    frame = pandas.read_csv(path)
    assert frame["correct"].mean() == pytest.approx(metrics["top1"])
    assert frame["confidence"].between(0, 1).all()


class Tags(HTMLParser):
    """Collects the texts of cells, and checks that tags are closed."""

    def __init__(self):
        super().__init__()
        self.open, self.texts = [], []

    def handle_starttag(self, tag, attrs):  # noqa: ARG002
        if tag not in ("meta", "img", "br", "path", "use", "rect", "image"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("path", "use", "rect", "image"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_page_shows_everything_and_escapes_names(data, tmp_path):
    page = tmp_path / "page.html"
    metrics = funmatch.evaluate(
        classifier(), data=data, side=16, teacher=classifier(seed=1), corruptions=["noise", "jpeg"], report=page
    )
    assert metrics["report"] == str(page)
    text = page.read_text()
    parser = Tags()
    parser.feed(text)
    assert not parser.open
    assert "<b>[red]cat" not in text
    for name in NAMES:
        assert any(name in found for found in parser.texts), "class names stand in the page as they are"
    # Self-contained: nothing is loaded from elsewhere.
    assert not re.search(r'(?:src|href)="(?!data:|#)', text.replace("xlink:href", "x"))
    assert text.count("<svg") == 5
    assert text.count("data:image/png") == len(metrics["differing"]["images"])
    for heading in ("Metrics", "Most frequent confusions", "Classes", "Corrupted images", "What was evaluated"):
        assert f"<h2>{heading}</h2>" in text


def test_run_has_its_page_in_its_folder_and_its_report_links_it(data, tmp_path):
    out = tmp_path / "run"
    funmatch.train(data, "fashion-mini-student", out, steps=2, batch=8, side=16, val="none")
    metrics = funmatch.evaluate(out)
    assert Path(metrics["report"]) == out / "evaluation.html"
    assert (out / "evaluation.html").is_file()
    before = (out / "evaluation.html").stat().st_mtime_ns
    assert "report" not in funmatch.evaluate(out, report="none")
    assert (out / "evaluation.html").stat().st_mtime_ns == before
    assert "report" in funmatch.evaluate(out)
    assert (out / "evaluation.html").stat().st_mtime_ns == before, "the same page is not written again"
    page = (out / "evaluation.html").read_text()
    (out / "evaluation.html").write_text("of another evaluation")
    assert "report" in funmatch.evaluate(out), "the run's own page is replaced"
    assert (out / "evaluation.html").read_text() == page
    write_page(Report(runs=(out,)))
    assert '<a href="evaluation.html">' in (out / "report.html").read_text()


def test_page_and_table_of_unlabelled_images_have_what_is_known(data, tmp_path, capsys):
    page = tmp_path / "page.html"
    options = {"data": str(data), "side": 16, "unlabelled": True, "corruptions": ["noise"], "report": page}
    found = run(
        Evaluate.checked(model="one", teacher=["two"], **options), {"one": classifier(), "two": classifier(seed=1)}
    )
    terminal.show(found)
    printed = capsys.readouterr().out
    for text in (printed, page.read_text()):
        assert "agreement with the teacher" in text
        assert "top-1" not in text.replace("of top-1", "")
    assert "Most frequent confusions" not in printed


def test_page_and_table_of_models_without_classes_have_their_features(data, tmp_path, capsys):
    nets = {}
    for name in ("one", "two"):
        nets[name] = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())
        nets[name].num_classes = 0
    page = tmp_path / "page.html"
    options = Evaluate.checked(model="one", others=["two"], data=str(data), side=16, report=page)
    found = run(options, {name: classifier(12, net=net) for name, net in nets.items()})
    terminal.show(found)
    printed = capsys.readouterr().out
    assert printed.count("20 nearest neighbours") == 2
    assert "linear probe" in page.read_text()
    with pytest.raises(InputError, match="has no classes, so there is nothing to write with --per-image"):
        run(options.model_copy(update={"per_image": tmp_path / "a.csv", "overwrite": True}),
            {name: classifier(12, net=net) for name, net in nets.items()})  # fmt: skip


def test_files_that_exist_are_kept(data, tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("mine")
    for option in ("per_image", "report"):
        with pytest.raises(InputError, match=r"mine.csv exists; pass .*overwrite"):
            funmatch.evaluate(classifier(), data=data, side=16, **{option: path})
        with pytest.raises(InputError, match="is a folder; name a file in it"):
            funmatch.evaluate(classifier(), data=data, side=16, **{option: tmp_path})
        with pytest.raises(InputError, match="its folder does not exist"):
            funmatch.evaluate(classifier(), data=data, side=16, **{option: tmp_path / "no" / "file"})
    assert path.read_text() == "mine"
    funmatch.evaluate(classifier(), data=data, side=16, per_image=path, overwrite=True)
    assert path.read_text().startswith("image,label,predicted")


def test_terminal_prints_names_as_they_are(data, tmp_path, funmatch):
    torch.save(classifier().net.state_dict(), tmp_path / "weights.pt")
    result = funmatch(
        "evaluate", "test_evaluation:Net", "--weights", tmp_path / "weights.pt", "--data", data, "--side", 16
    )
    assert "[red]cat" in result.stdout
    assert "Most frequent confusions" in result.stdout
    assert '=1+1,"x"' in result.stdout


def test_matrix_of_many_classes_is_a_picture_and_of_few_has_numbers():
    metrics = {"pictures": 90}
    few, many = np.eye(4, dtype=int), np.eye(60, dtype=int)
    (heading, svg, _), *_ = plots.draw_all(metrics, few, tuple("abcd"))
    assert "Confusions" in heading
    assert "data:image/png" not in svg
    (_, svg, _), *_ = plots.draw_all(metrics, many, tuple(map(str, range(60))))
    assert "data:image/png" in svg
    assert plots.draw_all(metrics, np.ones((1, 1), int), ("a",)) == []


def test_values_are_formatted():
    assert rows.bounds((0.8123, 0.8491)) == "81.2–84.9 %"
    assert rows.p_value(0.0004) == "< 0.001"
    assert rows.p_value(0.25) == "0.250"
    assert rows.short_name("runs/a/student") == "student"
    assert rows.used_columns(["a", "b"], [["1", "–"], ["2", ""]]) == (["a"], [["1"], ["2"]])
    assert json.dumps(rows.points({"mean": 0, "low": -0.012, "high": 0.03})) == '"-1.2 to +3.0"'
