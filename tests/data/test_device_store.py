"""With pixels on the device, which crops the views itself, views and runs are equal up to rounding."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from make_images import FEW, paint
from safetensors.torch import load_file

import funmatch
from funmatch.data.cache import device_store
from funmatch.data.cache.device_store import device_bytes, move_data_to_device, move_to_device
from funmatch.data.cache.open_cache import open_cache
from funmatch.data.cache.storing import CacheOptions
from funmatch.data.loader import Loader
from funmatch.ops import resample
from funmatch.ops.view_spec import Preprocessing, ViewSpec
from funmatch.training.evaluation.scoring import central_batches
from funmatch.training.run.checkpoints import CheckpointWriter
from funmatch.training.run.folder import Run

CPU = torch.device("cpu")
CLOSE = 0.01 / 255  # the gather sums in another order than the host's resampling
OPTIONS = {
    "data": FEW, "teacher": "fashion-mini-teacher", "student": "fashion-mini-student", "batch": 8,
    "steps": 9, "save_every": 4, "eval_every": 3, "log_every": 2,
}  # fmt: skip


@pytest.fixture(name="cache")
def images_of_many_sizes(tmp_path):
    for split in ("train", "val"):
        for number, size in enumerate([(40, 31), (90, 70), (33, 200), (70, 70), (64, 80), (128, 65), (31, 31)]):
            paint(tmp_path / "p" / split / "ab"[number % 2] / f"{number}.png", number, size)
    return open_cache(str(tmp_path / "p"), cache_options=CacheOptions(home=tmp_path / "kept"))


@pytest.mark.parametrize("crop", ["inception", "mild", "squash", "uninterrupted"])
def test_batches_from_the_device_equal_those_from_the_host(cache, crop):
    host = Loader(cache.splits["train"], ViewSpec(3, 8, 24, crop=crop, resize=30), teacher_sides=(24, 32))
    on_device = replace(host, split=move_to_device(host.split, CPU)[0])
    for step in (0, 1, 7):
        one, other = host.batch_at(step), on_device.batch_at(step)
        torch.testing.assert_close(other.crops, one.crops, atol=CLOSE, rtol=0)
        assert torch.equal(other.labels, one.labels)
        assert other.lam == one.lam
        assert other.teacher_crops[0] is None, "crops of the same side are shared"
        torch.testing.assert_close(other.teacher_crops[1], one.teacher_crops[1], atol=CLOSE, rtol=0)


@pytest.mark.parametrize(("squash", "resample"), [(False, "tf"), (True, "tf"), (False, "lanczos")])
def test_evaluation_views_are_equal_for_any_subset(cache, squash, resample):
    host = cache.splits["val"]
    on_device, _ = move_to_device(host, CPU)
    some, how = (
        np.array([5, 0, 0, 3]),
        Preprocessing(side=24, short_side=30, squash=squash, floor=True, resample=resample),
    )
    for one, other in ((host, on_device), (host.subset(some), on_device.subset(some))):
        views = [torch.cat([v for v, _ in central_batches(split, how, 3)]) for split in (one, other)]
        torch.testing.assert_close(views[1], views[0], atol=CLOSE, rtol=0)


def test_pixels_are_stored_once_on_the_device(cache):
    split = cache.splits["train"]
    first, _ = move_to_device(split, CPU)
    second, _ = move_to_device(replace(split, name="other"), CPU)
    assert first.store is second.store
    twice = split.subset(np.array([0, 0, 1]))
    lone, _ = move_to_device(twice, CPU)
    rows = split.index[[0, 1]]
    assert device_bytes(twice) == len(lone.store.flat) == int((rows["height"] * rows["width"] * 3).sum())


def test_splits_that_do_not_fit_stay_on_the_host(cache, capsys, monkeypatch):
    size = device_bytes(cache.splits["train"])
    some = move_data_to_device(cache, CPU, (size + 10) / 1e9)
    assert some.splits["train"].store is not cache.splits["train"].store
    assert some.splits["val"].store is cache.splits["val"].store
    assert "val: 0.0 GB of pixels stay on the host; --device-gb allows" in capsys.readouterr().err

    def out_of_memory(*_):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr("funmatch.data.cache.device_store.move_to_device", out_of_memory)
    assert move_data_to_device(cache, CPU, 1).splits == cache.splits
    assert "has no room for" in capsys.readouterr().err


def test_crop_kernel_that_fails_or_differs_is_not_used(monkeypatch):
    flat = torch.zeros(
        10, dtype=torch.uint8, device="meta"
    )  # stands for an accelerator: the check runs on any device but the CPU
    monkeypatch.setattr(
        torch, "arange", lambda *args, original=torch.arange, **options: original(*args, **options | {"device": CPU})
    )
    kernels = pytest.importorskip("funmatch.ops.native.triton_crops")
    monkeypatch.setattr(kernels, "sample", resample.sample_by_torch)
    assert device_store.fastest_crop_kernel(flat) == (resample.sample_by_torch, "")
    monkeypatch.setattr(kernels, "sample", lambda *args: resample.sample_by_torch(*args) + 0.1)
    assert "its results differ" in device_store.fastest_crop_kernel(flat)[1]

    def fails(*_):
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(kernels, "sample", fails)
    kernel, note = device_store.fastest_crop_kernel(flat)
    assert kernel is resample.sample_by_torch
    assert "does not work on this device (no compiler)" in note


def losses(folder):
    return [record["loss"] for record in Run(folder).metrics.read() if record["event"] == "step"]


def test_run_with_pixels_on_the_device_matches_one_without(tmp_path, capsys):
    host = funmatch.distill(out=tmp_path / "host", **OPTIONS)
    on_device = funmatch.distill(out=tmp_path / "there", device_gb=1, **OPTIONS)
    assert "GB of pixels moved to cpu, which crops the views itself" in capsys.readouterr().err
    one, other = losses(host.folder), losses(on_device.folder)
    assert other[0] == pytest.approx(one[0], rel=1e-5)
    np.testing.assert_allclose(other, one, rtol=0.01)  # Adam's first updates amplify a difference in the last bit
    assert on_device.figures["top1"] == pytest.approx(host.figures["top1"], abs=0.03)


def test_run_resumes_with_pixels_on_the_device_as_it_started(tmp_path, monkeypatch):
    uninterrupted = funmatch.distill(out=tmp_path / "whole", device_gb=1, **OPTIONS)

    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("timm.models.save_for_hf", interrupted)
    with pytest.raises(KeyboardInterrupt):
        funmatch.distill(out=tmp_path / "run", device_gb=1, **OPTIONS)
    monkeypatch.undo()
    monkeypatch.setenv("FUNMATCH_CACHE", str(tmp_path / "cache"))
    checkpoints = tmp_path / "run" / "checkpoints"
    for path in (checkpoints / "step-000000009", checkpoints / "step-000000008"):
        path.rename(tmp_path / path.name)
    (tmp_path / "step-000000008").rename(checkpoints / "step-000000008")
    resumed = funmatch.distill(
        out=tmp_path / "run", **OPTIONS
    )  # resumes with device_gb=1 although it is not given again
    assert losses(resumed.folder) == losses(uninterrupted.folder)
    assert json.loads((resumed.folder / "config.json").read_text())["knobs"]["device_gb"] == 1
    first, second = (load_file(run.folder / "student" / "model.safetensors") for run in (uninterrupted, resumed))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_checkpoint_writer_keeps_the_order_and_writes_nothing_after_a_failure():
    done = []

    def write(name):
        if name == "bad":
            raise OSError("disk")
        done.append(name)

    def submit_all(*names):
        with CheckpointWriter() as keeper:
            for name in names:
                if name == "stop":
                    raise ValueError("of the block")
                keeper.submit(lambda name=name: write(name))

    with pytest.raises(OSError, match="disk"):
        submit_all("a", "b", "bad", "c", "d", "e")
    assert done == ["a", "b"]
    with pytest.raises(ValueError, match="of the block"):
        submit_all("f", "stop")
    assert done == ["a", "b", "f"], "submitted files are written even if the training fails"
