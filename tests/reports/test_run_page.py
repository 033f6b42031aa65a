"""The page of runs: needs no network, shows metrics, curves, configuration and the views of a step."""

import re
import xml.dom.minidom
from base64 import b64decode
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
from make_images import FEW
from PIL import Image

import funmatch
from funmatch.config import Report
from funmatch.data.cache.open_cache import open_cache
from funmatch.data.loader import Loader
from funmatch.ops.view_spec import ViewSpec
from funmatch.reports import run_page, run_views
from funmatch.runtime.text import percent
from funmatch.training.run import folder as run_folder


@pytest.fixture(name="runs")
def labels_and_student_runs(tmp_path, finished_run):
    options = {"data": FEW, "student": "fashion-mini-student", "batch": 16, "steps": 6, "log_every": 2}
    options |= {"eval_every": 2}
    labels = finished_run(tmp_path / "labels & <b>", "train", **options)
    student = finished_run(tmp_path / "student_$x$", teacher="fashion-mini-teacher", **options)
    return labels.folder, student.folder


def test_page_loads_nothing_from_the_network(runs, tmp_path):
    page = run_page.write_page(Report(runs=runs, out=tmp_path / "page.html")).read_text()
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:|#)""", page.replace("xlink:href", "href"))
    assert "<script" not in page
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    HTMLParser().feed(page)


def test_page_shows_several_teachers_and_the_ema(tmp_path):
    teacher = "fashion-mini-teacher"
    run = funmatch.distill(
        "fashion-mini", [teacher, teacher], "fashion-mini-student", tmp_path / "run",
        steps=4, batch=16, eval_every=2, ema=0.9, teacher_side=[32, 48],
    )  # fmt: skip
    page = run.report.read_text()
    assert "run, EMA weights" in page
    assert page.count("folded, fp32, channels last") == 2
    lines = run_page.teachers(run_page.run_folder.find_run(run.folder))
    assert [line[1] for line in lines] == [teacher, teacher, f"{teacher} + {teacher}"]
    assert float(lines[0][2].removesuffix(" %")) > 85
    average = run_page.rows(run_page.run_folder.find_run(run.folder))[1]
    assert average[3] == f"{100 * run.figures['ema']['top1']:.1f} %"


def test_page_shows_runs_curves_and_configuration(runs, tmp_path):
    page = run_page.write_page(Report(runs=runs, out=tmp_path / "page.html")).read_text()
    assert "labels &amp; &lt;b&gt;" in page
    assert "<b>" not in page.replace("<b>labels", "").replace("<b>student", "")
    svgs = re.findall(r"<svg.*?</svg>", page, re.S)
    assert len(svgs) == 6, "accuracy, agreement, KL, loss, learning rate, throughput"
    for svg in svgs:
        xml.dom.minidom.parseString(svg)
    assert "teacher fashion-mini-teacher" in svgs[0]
    assert "student_$x$" in re.sub(r"\\", "", svgs[0])
    assert "weight_decay" in page
    assert "images/s" in page


def test_contact_sheet_shows_the_views_of_the_step(runs):
    sheet = run_views.views_sheet(run_folder.find_run(runs[1]), 4)
    assert sheet["rows"] == ["teacher", "student"]
    split = open_cache(FEW).splits["train"]
    batch = Loader(split, ViewSpec(0, 16, 32)).batch_at(4)
    mixed = batch.lam * batch.crops[1:] + (1 - batch.lam) * batch.crops[:-1]
    pixels = np.asarray(Image.open(BytesIO(b64decode(sheet["png"]))))
    factor = pixels.shape[0] // 64
    small = pixels[::factor, ::factor]
    for row in range(2):
        for i in range(12):
            tile = small[row * 32 : (row + 1) * 32, i * 32 : (i + 1) * 32]
            expected = mixed[i].permute(1, 2, 0).numpy() * 255
            assert np.abs(tile - expected).max() <= 0.51


def test_page_of_an_unfinished_run(runs):
    (runs[0] / "result.json").unlink()
    page = run_page.write_page(Report(runs=(runs[0],))).read_text()
    assert "6 of 6" in page


def test_page_compares_agreement_on_training_views_and_held_out_images(runs):
    _, folder = runs
    found = run_folder.find_run(folder)
    last = {each["event"]: each for each in found.metrics.read()}
    views, held_out = run_page.agreement_rows(found)
    assert views[2:] == [
        "training views", percent(last["views"]["top1"]), percent(last["views"]["teacher_top1"]),
        percent(last["views"]["agreement"]), percent(last["views"]["agreement5"]), f"{last['views']['kl']:.3f}",
        f"{last['step']['loss']:.3f}",
    ]  # fmt: skip
    assert held_out[2] == "val"
    assert held_out[4] == percent(last["teacher"]["top1"])
    assert held_out[7] == f"{last['eval']['kl']:.3f}"
    assert run_page.agreement_rows(run_folder.find_run(runs[0])) == [], "labels have no teacher"
