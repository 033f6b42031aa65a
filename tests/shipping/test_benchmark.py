"""`funmatch benchmark` measures every format of a run beside its teacher; of one that fails it says why."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from make_images import FEW

from funmatch.commands import benchmark, export
from funmatch.config import Export
from funmatch.config.finished.benchmark import FORMATS as NAMES
from funmatch.config.finished.benchmark import Benchmark
from funmatch.errors import InputError
from funmatch.reports import benchmark_page
from funmatch.shipping.benchmark import candidates, formats, memory
from funmatch.shipping.benchmark.formats import FORMATS, Format
from funmatch.shipping.export import formats as export_formats
from funmatch.shipping.export.formats import Job
from funmatch.shipping.export.network import ExportNet
from funmatch.training.student.trained_model import open_trained_model

pytestmark = pytest.mark.usefixtures("few_objects")
QUICK = {"max_seconds": 0.1, "spread": "90%", "images": 25, "batches": (1, 8), "memory": False, "threads": 1}
FAST = {"data": FEW, "student": "fashion-mini-student", "steps": 2}


@pytest.fixture(name="run")
def finished_student(tmp_path, finished_run):
    return finished_run(tmp_path / "student", teacher="fashion-mini-teacher", **FAST).folder


def measure(*models, **options):
    return benchmark.run(Benchmark.checked(models=[str(each) for each in models], **QUICK | options)).metrics


def test_tables_of_formats_have_the_same_names():
    assert tuple(FORMATS) == NAMES


def test_student_and_teacher_are_measured_in_pytorch_and_onnx(run):
    found = measure(run, formats="eager,onnx")
    assert [(each["model"], each["format"], each["status"]) for each in found["results"]] == [
        ("student", "eager", "ok"), ("student", "onnx", "ok"), ("teacher", "eager", "ok"), ("teacher", "onnx", "ok"),
    ]  # fmt: skip
    student, exported, teacher, _ = found["results"]
    assert exported["agreement_eager"] == 1.0
    assert exported["top1"] == student["top1"]
    assert teacher["agreement"] == 1.0
    assert teacher["top1"] > 0.8 > student["top1"]
    assert student["bytes"] > 4 * 26_888
    assert all(each["ms"] > 0 and each["images_per_second"] > 0 for each in found["results"])
    assert [each["parameters"] for each in found["models"]] == [26_888, 109_766]
    assert (found["images"], found["of_images"], found["split"], found["threads"]) == (25, 30, "test", 1)


def test_json_keys_are_those_documented(run):
    found = json.loads(json.dumps(measure(run, formats="eager", teacher="none")))
    assert set(found) == {
        "machine", "versions", "device", "precision", "threads", "batches", "spread", "max_seconds", "data", "split",
        "images", "of_images", "models", "results",
    }  # fmt: skip
    assert set(found["models"][0]) == {"label", "name", "parameters", "gflop", "side", "step"}
    assert set(found["results"][0]) == {
        "model", "format", "label", "status", "reason", "device", "bytes", "top1", "agreement", "agreement_eager",
        "ms", "ms_p90", "ms_p99", "spread", "calls", "rounds", "batch", "images_per_second",
        "images_per_second_spread", "memory_bytes",
    }  # fmt: skip
    assert len(found["results"]) == 1
    assert found["results"][0]["agreement"] is None


def _broken(_subject, _machine):
    raise RuntimeError("\nUnsupported operator: aten::odd\nmore lines")


def _wrong(subject, machine):
    """A format whose outputs are not the model's: an export that went wrong without an error."""
    right = FORMATS["eager"].make(subject, machine)
    return replace(right, predict=lambda images: np.roll(right.predict(images), 1, axis=1))


def test_format_that_fails_has_its_reason_and_the_rest_runs(run, monkeypatch, capsys):
    table = dict(FORMATS) | {"onnx": Format("ONNX Runtime", _broken)}
    monkeypatch.setattr(candidates, "FORMATS", table)
    monkeypatch.setattr("funmatch.shipping.benchmark.measure.FORMATS", table)
    options = Benchmark.checked(models=[str(run)], **QUICK | {"formats": "eager,onnx", "teacher": "none"})
    result = benchmark.run(options)
    eager, broken = result.metrics["results"]
    assert (eager["status"], broken["status"]) == ("ok", "failed")
    assert broken["reason"] == "Unsupported operator: aten::odd"
    assert broken["ms"] is broken["top1"] is None
    benchmark.show(result)
    assert "ONNX Runtime │ failed" in capsys.readouterr().out


def test_wrong_outputs_show_in_accuracy_and_agreement(monkeypatch):
    table = dict(FORMATS) | {"onnx": Format("ONNX Runtime", _wrong)}
    monkeypatch.setattr(candidates, "FORMATS", table)
    monkeypatch.setattr("funmatch.shipping.benchmark.measure.FORMATS", table)
    found = measure("fashion-mini-teacher", data=FEW, formats="eager,onnx")["results"]
    assert found[0]["top1"] > 0.8
    assert found[1]["top1"] < 0.2
    assert found[1]["agreement_eager"] < 0.2


def test_nothing_that_runs_is_an_error(run, monkeypatch):
    table = {"eager": Format("PyTorch", _broken)}
    monkeypatch.setattr(candidates, "FORMATS", table)
    monkeypatch.setattr("funmatch.shipping.benchmark.measure.FORMATS", table)
    with pytest.raises(InputError, match="no format could be measured: student, PyTorch: Unsupported operator"):
        measure(run, formats="eager", teacher="none")


def missing(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)  # by which Python refuses to import it


def test_runtime_that_is_not_installed_is_skipped_unless_it_was_chosen(run, monkeypatch):
    missing(monkeypatch, "openvino")
    monkeypatch.setattr(Benchmark, "chosen_formats", ("eager", "openvino"))
    found = measure(run, teacher="none")["results"]
    assert [(each["format"], each["status"]) for each in found] == [("eager", "ok"), ("openvino", "not installed")]
    assert "funmatch[openvino]" in found[1]["reason"]
    with pytest.raises(InputError, match=r"openvino is not installed; pip install 'funmatch\[openvino\]'"):
        measure(run, formats="openvino")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"formats": "eager,onxn"}, "unknown format 'onxn'; did you mean 'onnx'"),
        ({"spread": "500"}, "spread must be a share between 0 and 1, such as 5% or 0.05, got '500'"),
        ({"batches": ()}, "batches is empty"),
        ({"models": ()}, "give a run folder, a model, or a file"),
        ({"models": ("a", "b"), "weights": "w.pt"}, "weights belong to a single model"),
        ({"report": "page.pdf"}, "report must be an .html file, got page.pdf"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        Benchmark.checked(**{"models": ["a"]} | options)


@pytest.mark.parametrize(("text", "share"), [("5%", 0.05), ("0.05", 0.05), (0.1, 0.1)])
def test_spread_is_percent_or_a_share(text, share):
    assert Benchmark.checked(models=["a"], spread=text).largest_spread == pytest.approx(share)


@pytest.mark.slow
def test_command_line_refuses_what_cannot_be_used(funmatch, tmp_path, run):
    (tmp_path / "page.html").write_text("")
    done = funmatch("benchmark", run, "--report", "page.html", check=2)
    assert "page.html exists; remove it, or choose another --report" in done.stderr
    done = funmatch("benchmark", "runs/nowhere", "model.onnx", "--side", 32, check=2)
    assert "runs/nowhere" in done.stderr
    assert "there is no file model.onnx" in done.stderr
    torch.save(timm.create_model("test_byobnet").state_dict(), tmp_path / "weights.pt")
    teacher = "--teacher", "test_byobnet", "--teacher-weights", "weights.pt"
    done = funmatch("benchmark", run, *teacher, "--formats", "eager", check=2)
    assert "1000 outputs, but" in done.stderr


@pytest.mark.slow
def test_file_is_measured_beside_a_run(run, tmp_path, funmatch):
    path = tmp_path / "mine.onnx"
    export_formats.FORMATS["onnx"].write(formats.make_job(open_trained_model(str(run))), tmp_path)
    (tmp_path / "model.onnx").rename(path)
    done = funmatch(
        "benchmark", run, path, "--formats", "eager", "--teacher", "none", "--max-seconds", 0.5, "--images", 50,
        "--threads", 1, "--report", "out/page.html", "--json",
    )  # fmt: skip
    found = json.loads(done.stdout)
    eager, file = found["results"]
    assert (file["model"], file["label"], file["status"]) == ("", "mine.onnx", "ok")
    assert file["top1"] == eager["top1"]
    assert file["bytes"] == path.stat().st_size
    assert file["memory_bytes"] > 1e5
    assert found["report"] == "out/page.html"
    page = (tmp_path / "out/page.html").read_text()
    assert "mine.onnx" in page
    assert (tmp_path / "out/page.svg").read_text().startswith("<svg")


@pytest.mark.slow
def test_file_alone_is_seen_as_its_export_says(run, tmp_path):
    out = tmp_path / "exported"
    export.run(Export.checked(model=str(run), out=str(out), images=20))
    found = measure(out / "model.onnx", data=FEW)
    assert found["models"] == []
    assert [each["status"] for each in found["results"]] == ["ok"]
    assert found["results"][0]["top1"] is not None
    (out / "preprocessing.json").unlink()
    with pytest.raises(InputError, match=r"the image size of .*model\.onnx is not known"):
        measure(out / "model.onnx")
    assert measure(out / "model.onnx", side=32)["results"][0]["top1"] is None


@pytest.mark.slow
def test_file_that_takes_bytes_gets_them(run, tmp_path):
    model = open_trained_model(str(run))
    job = Job(model, ExportNet(model.classifier, uint8=True), {}, 18, None)
    export_formats.FORMATS["onnx"].write(job, tmp_path)
    eager, file = measure(run, tmp_path / "model.onnx", formats="eager", teacher="none", memory=True)["results"]
    assert file["status"] == "ok", file["reason"]
    assert file["top1"] == pytest.approx(eager["top1"], abs=0.05)
    assert file["memory_bytes"] > 1e5


@pytest.mark.slow
def test_all_formats_of_a_student(run):
    found = measure(run, memory=True, teacher="none")["results"]
    assert [(each["format"], each["status"]) for each in found] == [(name, "ok") for name in NAMES]
    assert all(each["agreement_eager"] > 0.95 for each in found)
    assert all(each["memory_bytes"] > 1e6 for each in found)


def test_memory_is_that_of_a_fresh_process(tmp_path):
    """A weight of 49 MB, which the process around does not hold."""
    onnx = pytest.importorskip("onnx")
    weight = np.ones((3 * 32 * 32, 4000), np.float32)
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Flatten", ["images"], ["flat"]),
            onnx.helper.make_node("MatMul", ["flat", "weight"], ["hidden"]),
        ],
        "large",
        [onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, ["n", 3, 32, 32])],
        [onnx.helper.make_tensor_value_info("hidden", onnx.TensorProto.FLOAT, ["n", 4000])],
        [onnx.numpy_helper.from_array(weight, "weight")],
    )
    model = onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 20)])
    onnx.save(model, tmp_path / "large.onnx")
    peak = memory.measure({"path": str(tmp_path / "large.onnx"), "side": 32, "threads": 1})
    assert weight.nbytes < peak < 6 * weight.nbytes


def test_process_that_fails_says_why(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"its process ended with exit code 1: .*bad\.onnx"):
        memory.measure({"path": str(tmp_path / "bad.onnx"), "side": 32, "threads": 1})


def test_process_imports_no_other_runtime():
    code = (
        "import sys, funmatch.shipping.benchmark.memory; print(sorted({'torch', 'timm', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def row(label, ms, top1, size, **others):
    """A row of a result, of a format that was measured."""
    return {
        "model": "student", "label": label, "status": "ok", "reason": None, "bytes": size, "top1": top1,
        "agreement": 0.9, "ms": ms, "ms_p90": ms, "ms_p99": None, "spread": 0.02, "calls": 150, "batch": 8,
        "images_per_second": 2000.0, "memory_bytes": 3e7,
    } | others  # fmt: skip


def test_plot_has_a_bubble_and_a_label_for_each_format():
    rows = [row("PyTorch", 4.0, 0.83, 4e6), row("ONNX Runtime", 2.0, 0.83, 4e6), row("gone", 1.0, None, 4e6)]
    svg = benchmark_page.draw(rows)
    assert svg.count(">PyTorch<") == svg.count(">ONNX Runtime<") == 1
    assert ">gone<" not in svg
    assert "latency of one image" in svg
    assert benchmark_page.draw([row("PyTorch", 4.0, None, 4e6)]) == ""


def test_labels_cover_neither_bubbles_nor_each_other():
    places = [(100.0 + 20 * i, 100.0) for i in range(5)]
    bubbles = [benchmark_page._around(place, 8) for place in places]
    labels = benchmark_page._Labels(bubbles, (0, 0, 400, 200))
    boxes = []
    for place in places:
        labels.place(place, 8, "ONNX Runtime")
        boxes.append(labels.texts[-1])
    assert len(labels.texts) == 5
    for i, box in enumerate(boxes):
        others = [*bubbles, *boxes[:i], *boxes[i + 1 :]]
        assert not any(benchmark_page._overlap(box, other) for other in others)


def test_numbers_are_shown_by_three_digits_and_unknown_ones_by_a_dash():
    shown = benchmark_page.details([row("PyTorch", 0.04712, 0.83, 4e6)])[0]
    assert shown == ["student, PyTorch", "0.0471", "0.0471", "–", "2.0 %", "150", "8", "30"]
    shown = benchmark_page.rows([row("PyTorch", 1234.5, 0.83, 94e6)])[0]
    assert shown == ["student, PyTorch", "ok", "94", "83.0 %", "90.0 %", "1,234", "2,000"]
