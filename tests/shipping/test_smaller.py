"""`funmatch export --quantize`: the smaller file, its report, and what is said where it cannot be made."""

import json

import pytest
from make_images import FEW

import funmatch
from funmatch.errors import InputError, WorkFailed
from funmatch.shipping.export import smaller
from funmatch.shipping.runtimes import open_runtime

pytest.importorskip("onnxruntime")
NET = {"channels": (8, 16, 16, 24), "stem_width": 8}


@pytest.fixture(scope="module", name="run")
def finished_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "plain"
    funmatch.distill(
        FEW, "fashion-mini-teacher", "resnet10t", out, student_kwargs=NET, steps=30, side=28, batch=16,
        threads=1, optimizer="adamw", lr=0.01,
    )  # fmt: skip
    return out


def test_the_smaller_file_and_its_report(run, tmp_path):
    found = funmatch.export(run, out=tmp_path / "e", quantize=8, max_drop=20, calibration=64)
    report = json.loads((tmp_path / "e" / "quantize.json").read_text())
    assert report == json.loads(json.dumps(found["quantized"]))
    assert (report["calibration"], report["calibrated_on"], report["split"]) == (64, "train", "val")
    assert report["after"]["bytes"] == (tmp_path / "e" / "model-int8.onnx").stat().st_size < report["before"]["bytes"]
    # With a teacher, whose outputs decide between the ways to choose ranges.
    assert report["before"]["agreement"] is not None
    assert set(report["methods"]) == {"minmax", "percentile", "entropy"}
    assert open_runtime(tmp_path / "e" / "model-int8.onnx").batch is None
    assert (tmp_path / "e" / "preprocessing.json").is_file()
    assert report["before"]["top1"] - report["after"]["top1"] == pytest.approx(report["drop"] / 100)


@pytest.mark.slow
def test_half_precision_is_smaller_and_as_good(run, tmp_path):
    found = funmatch.export(run, out=tmp_path / "e", quantize=16, max_drop=1)["quantized"]
    assert (tmp_path / "e" / "model-fp16.onnx").stat().st_size < 0.75 * found["before"]["bytes"]
    assert found["after"]["same"] > 0.98


def test_a_model_that_loses_too_much_names_the_command_that_trains_it(run, tmp_path, monkeypatch):
    def fail(*arguments):
        raise WorkFailed(arguments[-1].advice)

    monkeypatch.setattr(smaller, "quantize_onnx", fail)
    with pytest.raises(WorkFailed, match=rf"funmatch distill {run} --quantize 8 --out {run}-int8"):
        funmatch.export(run, out=tmp_path / "e", quantize=8)
    assert not (tmp_path / "e").exists()


def test_too_few_images_write_nothing(run, tmp_path):
    with pytest.raises(InputError, match="at least 16 are needed"):
        funmatch.export(run, out=tmp_path / "e", quantize=8, calibration=3)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"quantize": 9}, "quantize takes 8 or 16, not 9"),
        ({"quantize": 8, "format": ["timm"]}, "add onnx to"),
        ({"quantize": 8, "fixed_batch": 2}, "quantize does not go with"),
        ({"max_drop": 0.5}, "belongs to quantize"),
        ({"calibration": 64}, "calibration belongs to quantize"),
    ],
)
def test_options_that_do_not_fit_together(run, tmp_path, options, said):
    with pytest.raises(InputError, match=said):
        funmatch.export(run, out=tmp_path / "e", **options)


@pytest.mark.slow
def test_ranges_that_training_found_are_tried_too(run, tmp_path):
    from funmatch.cli import parse

    words = ["distill", str(run), "--quantize", "8", "--steps", "4", "--out", str(tmp_path / "q"), "--threads", "1"]
    config = parse(words)
    funmatch.distill(**{name: getattr(config, name) for name in type(config).model_fields if config.moved(name)})
    found = funmatch.export(tmp_path / "q", quantize=8, max_drop=100, calibration=64)
    assert "trained" in found["quantized"]["methods"]
