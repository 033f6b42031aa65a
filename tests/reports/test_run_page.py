"""The page of runs: needs no network, shows metrics, curves, configuration and the views of a step."""

import errno
import json
import re
import xml.dom.minidom
from base64 import b64decode
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
from make_images import FEW
from matplotlib.figure import Figure
from PIL import Image

import funmatch
from funmatch.config import Report
from funmatch.data.cache.open_cache import open_cache
from funmatch.data.loader import Loader
from funmatch.errors import InputError
from funmatch.ops.view_spec import ViewSpec
from funmatch.reports import html, run_page, run_plots, run_tables, run_views
from funmatch.runtime.disk.json_files import seal
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
        FEW, [teacher, teacher], "fashion-mini-student", tmp_path / "run",
        steps=4, batch=16, eval_every=2, ema=0.9, teacher_side=[32, 48],
    )  # fmt: skip
    page = run.report.read_text()
    assert "run, EMA weights" in page
    assert page.count("folded, fp32, channels last") == 2
    lines = run_tables.teachers(run_folder.find_run(run.folder))
    assert [line[1] for line in lines] == [teacher, teacher, f"{teacher} + {teacher}"]
    assert float(lines[0][2].removesuffix(" %")) == pytest.approx(93, abs=2)  # one image is 3.3 %
    average = run_tables.rows(run_folder.find_run(run.folder))[1]
    assert average[1] == f"{100 * run.figures['ema']['top1']:.1f} %"


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


def page_of(*runs, out=None):
    return run_page.write_page(Report(runs=runs, out=out)).read_text()


def test_page_of_an_unfinished_run_says_where_it_stands(runs):
    """Its metrics are those of its latest evaluation."""
    (runs[0] / "result.json").unlink()
    config = json.loads((runs[0] / "config.json").read_text())
    (runs[0] / "config.json").write_text(json.dumps(seal(config | {"knobs": config["knobs"] | {"steps": 24}})))
    page = page_of(runs[0])
    assert "is not finished: 6 of 24 steps (25.0\N{NO-BREAK SPACE}%). Its metrics are those of step 6 on val." in page
    row = dict(zip(run_tables.COLUMNS, run_tables.row(run_folder.find_run(runs[0])), strict=True))
    latest = [each for each in run_folder.find_run(runs[0]).metrics.read() if each["event"] == "eval"][-1]
    assert row["steps"] == "6 of 24"
    assert row["split"] == "val, step 6"
    assert row["top-1"] == percent(latest["top1"])
    # Stopped between two records of the loss: how far it came stands in the name of its checkpoint.
    (runs[0] / "checkpoints" / "step-000000010").mkdir()
    assert "is not finished: 10 of 24 steps" in page_of(runs[0])
    assert row["teacher top-1"] == "–"
    (runs[1] / "result.json").unlink()
    unfinished = run_folder.find_run(runs[1])
    starts = next(each for each in unfinished.metrics.read() if each["event"] == "teacher")
    assert run_tables.row(unfinished)[run_tables.COLUMNS.index("teacher top-1")] == percent(starts["top1"])


def test_page_warns_of_a_diverged_run(runs):
    result = json.loads((runs[1] / "result.json").read_text())
    (runs[1] / "result.json").write_text(json.dumps(seal(result | {"kl": 40094978554082739036017261828636672.0})))
    page = page_of(runs[1])
    assert "4.01e+34, diverged" in page
    assert "has diverged: its student is further from its teacher than a uniform guess" in page
    assert "400949785540" not in page


@pytest.mark.parametrize("key", ["loss", "kl", "top1", "images_per_second"])
def test_values_that_no_axis_can_show_are_left_out(runs, key):
    log = runs[1] / "metrics.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()]
    last = [each for each in records if each.get(key) is not None][-1]
    last[key] = 1.75e308
    log.write_text("".join(json.dumps(each) + "\n" for each in records))
    (panel,) = (each for each in (*run_plots.MEASURED, *run_plots.OTHERS) if each.name == key)
    drawn = run_plots.plot([run_folder.find_run(runs[1])], panel)
    assert "<svg" in drawn
    assert "<path" in drawn


def test_lead_of_a_comparison_names_the_best_run_and_the_next(runs):
    """Of the runs whose students are shown, not of the first."""
    for folder, top1 in zip(runs, (0.25, 0.75), strict=True):
        result = json.loads((folder / "result.json").read_text())
        (folder / "result.json").write_text(json.dumps(seal(result | {"top1": top1})))
    found = [run_folder.find_run(folder) for folder in runs]
    assert run_page.lead(found) == (
        "student_$x$ (distilled from fashion-mini-teacher) has the highest top-1 accuracy, 75.0 %; labels & <b> "
        "(trained on labels) has 25.0 %."
    )
    assert "A student distilled from fashion-mini-teacher: 75.0 % top-1 accuracy on" in run_page.lead(found[1:])
    config = json.loads((runs[0] / "config.json").read_text())
    (runs[0] / "config.json").write_text(json.dumps(seal(config | {"verb": "finetune"})))
    assert run_page.lead([run_folder.find_run(runs[0])]).startswith("A model fine-tuned on labels: 25.0 % top-1")
    (runs[0] / "config.json").write_text(json.dumps(seal(config)))
    result = json.loads((runs[0] / "result.json").read_text())
    (runs[0] / "result.json").write_text(json.dumps(seal(result | {"split": "val"})))
    assert run_page.lead(found).endswith("evaluated on different images: do not compare them.")


@pytest.mark.parametrize(
    ("name", "label"), [("runs/teacher", "teacher"), ("runs/bit", "teacher bit"), ("teacher-pets", "teacher-pets")]
)
def test_legend_says_teacher_once(runs, name, label, monkeypatch):
    found, records = run_folder.find_run(runs[1]), []
    for each in found.metrics.read():
        records.append(each | ({"teacher": name} if each["event"] == "teacher" else {}))
    monkeypatch.setattr(type(found.metrics), "read", lambda _self: records)
    (legend,) = run_plots._figure([found], run_plots.ACCURACY).legends
    assert label in [text.get_text().strip("\u200b") for text in legend.get_texts()]


def test_page_fits_a_phone_and_a_dark_screen(runs, tmp_path):
    """Nothing is wider than a phone's 390 pixels, rows become cards, and plots have the page's colours only."""
    page = page_of(*runs, out=tmp_path / "page.html")
    assert "color-scheme: light dark" in page
    assert "prefers-color-scheme: dark" in page
    for width in re.findall(r"minmax\((?!min\()([^,]*),", page):
        assert not width.endswith("rem"), "a column of a grid that cannot shrink"
    assert 'data-column="top-1"' in page
    for svg in re.findall(r"<svg.*?</svg>", page, re.S):
        styles = " ".join(re.findall(r'style="([^"]*)"', svg))
        assert not re.findall(r"#[0-9a-f]{6}", styles), "a colour that does not follow the theme"
        # matplotlib writes no fill for black: text would be black on a dark page.
        for text in re.findall(r"<text [^>]*>", svg):
            assert "fill: var(--ink)" in text
    style = page[page.index("<style>") : page.index("</style>")]
    for name in ("c0", "c1", "c7", "ink", "paper", "line"):
        assert style.count(f"--{name}: ") == 2, "light and dark"


def test_theme_leaves_names_alone():
    svg = '<text style="fill: #1f2328; stroke: #1f6feb">#1f6feb</text>'
    assert html.themed(svg) == '<text style="fill: var(--ink); stroke: var(--c0)">#1f6feb</text>'


def test_page_shows_what_is_not_at_its_default_and_folds_the_rest(runs):
    page = page_of(runs[1])
    assert "<details open" not in page
    rows = {name: values for name, *values in run_tables.settings([run_folder.find_run(folder) for folder in runs])}
    assert list(rows)[:1] == ["data"]
    assert rows["batch"] == ["16", "16", "128"]
    assert rows["teacher"] == ["–", "fashion-mini-teacher", "–"]
    assert "weight_decay" not in rows
    assert "threads" not in rows
    assert dict(run_tables.flat(run_folder.find_run(runs[0]).config))["patience"] == "none"


def test_selection_is_what_had_a_consequence(runs):
    found = run_folder.find_run(runs[0])
    assert {row[-1] for row in run_tables.evaluation_counts(found)} == {"nothing"}
    config = json.loads((runs[0] / "config.json").read_text())
    config["knobs"] |= {"keep": "best", "patience": 3}
    (runs[0] / "config.json").write_text(json.dumps(seal(config)))
    by_split = {row[1]: row[-1] for row in run_tables.evaluation_counts(found)}
    assert by_split == {"val": "exported student, early stopping", "test": "nothing"}


def test_axes_of_a_few_points_begin_at_zero_and_show_the_warm_up(runs):
    """A point alone is not enlarged to a plot, and the learning rate is drawn from its schedule."""
    log = runs[1] / "metrics.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()]
    log.write_text("".join(json.dumps(each) + "\n" for each in records if each["step"] in (0, 6)))
    found = run_folder.find_run(runs[1])
    for panel in (run_plots.ACCURACY, run_plots.KL, run_plots.LR):
        ticks = re.findall(r"<text [^>]*>([\d.]+)</text>", run_plots.plot([found], panel))
        assert ticks[0] == "0", panel.heading
    steps, rates = run_plots._planned_lr(found)
    assert steps == [1, 2, 3, 4, 5, 6]
    setup = found.config["knobs"]
    assert rates[-1] == pytest.approx(records[-1].get("lr") or next(r["lr"] for r in records[::-1] if "lr" in r))
    assert max(rates) <= setup["lr"]


def test_page_compares_agreement_on_training_views_and_held_out_images(runs):
    _, folder = runs
    found = run_folder.find_run(folder)
    last = {each["event"]: each for each in found.metrics.read()}
    views, held_out = run_tables.agreement_rows(found)
    assert views[2:] == [
        "training views", percent(last["views"]["top1"]), percent(last["views"]["teacher_top1"]),
        percent(last["views"]["agreement"]), percent(last["views"]["agreement5"]), f"{last['views']['kl']:.3f}",
        f"{last['step']['loss']:.3f}",
    ]  # fmt: skip
    assert held_out[2] == "val"
    assert held_out[4] == percent(last["teacher"]["top1"])
    assert held_out[7] == f"{last['eval']['kl']:.3f}"
    assert run_tables.agreement_rows(run_folder.find_run(runs[0])) == [], "labels have no teacher"


def test_names_in_scripts_that_the_font_lacks_are_drawn_without_a_warning():
    with html.drawing():
        figure = Figure()
        figure.suptitle("日本語")
        assert "日本語" in html.to_svg(figure)


def test_a_page_that_cannot_be_written_is_said_before_anything_is_drawn(finished_run, tmp_path, monkeypatch):
    run = finished_run(tmp_path / "run", data=FEW, student="fashion-mini-student", steps=1, verb="train", batch=8)

    def read_only(**_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("funmatch.reports.run_page.tempfile.TemporaryFile", read_only)
    with pytest.raises(InputError, match=r"report.html: Read-only file system; pass --out FILE elsewhere"):
        run_page.write_page(Report(runs=(run.folder,)))
