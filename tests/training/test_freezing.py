"""A run's inference modes are judged on the views of its first steps, once."""

import json
import shutil

import pytest
import torch
from make_images import FEW

import funmatch
from funmatch.data.cache.open_cache import open_cache
from funmatch.data.loader import Loader
from funmatch.models.inference import frozen
from funmatch.models.inference.reference import FurtherViews
from funmatch.ops.mixing import mixup
from funmatch.ops.view_spec import ViewSpec
from funmatch.training.teachers import freezing

MINI = {
    "data": FEW, "teacher": "fashion-mini-teacher", "student": "fashion-mini-student", "batch": 16, "threads": 1,
    "eval_every": 100, "device": "cpu", "val": "none", "seed": 3,
}  # fmt: skip


@pytest.fixture(name="judged")
def views_on_which_modes_are_judged(monkeypatch, tmp_path):
    """Lets small networks be frozen in 16 bits; holds the first views, those that follow, and the share of them."""
    monkeypatch.setenv("FUNMATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(frozen, "SMALL_NETWORK", 0)
    monkeypatch.setattr(freezing.devices, "teacher_precisions", lambda *_: ("bf16", "fp32"))
    found: list = []

    def freeze(make, views, allowed, further):
        more = further and list(further.batches)
        found.append((views, more, further and further.share))
        return frozen.freeze(make, views, allowed, further and FurtherViews(iter(more), further.share))

    monkeypatch.setattr(freezing, "freeze", freeze)
    return found


def test_views_are_those_of_the_runs_first_steps(judged, tmp_path):
    plain = funmatch.distill(out=tmp_path / "run", steps=60, **MINI)
    ((first, more, share),) = judged
    assert share == 60 * 16 // 100
    loader = Loader(open_cache(FEW).splits["train"], ViewSpec(3, 16, 32, min_area=0.05), teacher_sides=(32,))
    for step, views in enumerate([first, *more[:5]]):
        batch = loader.batch_at(step)
        assert torch.equal(views, mixup(batch.crops, batch.lam))
    assert len(more) == 59
    record = json.loads((plain.folder / "config.json").read_text())["facts"]["teacher_forms"][0]
    assert 16 <= record["beside_fp32"]["pictures"] <= 1024

    # Judging draws nothing that the run would miss.
    other = funmatch.distill(out=tmp_path / "other", steps=60, **MINI)
    weights = [(run.folder / "student" / "model.safetensors").read_bytes() for run in (plain, other)]
    assert weights[0] == weights[1]


def test_a_short_run_is_judged_by_its_first_batch(judged, tmp_path):
    funmatch.distill(out=tmp_path / "run", steps=25, **MINI)
    ((first, more, _),) = judged
    assert (len(first), more) == (16, None)


def test_a_short_run_does_not_decide_for_longer_ones(judged, tmp_path, capsys):
    """What 16 views refused must not be the first that a longer run tries: it would be taken."""
    funmatch.distill(out=tmp_path / "run", steps=25, **MINI)
    funmatch.distill(out=tmp_path / "again", steps=25, **MINI)
    funmatch.distill(out=tmp_path / "longer", steps=26, **MINI)
    assert len(judged) == 3
    assert len(list((tmp_path / "cache" / "forms").iterdir())) == 2
    assert capsys.readouterr().err.count("using folded") == 3


def test_teacher_batch_is_the_size_of_the_parts(judged, tmp_path):
    funmatch.distill(out=tmp_path / "run", steps=30, teacher_batch=6, **MINI)
    ((first, more, _),) = judged
    assert {len(views) for views in (first, *more)} == {6}
    assert len(more) == 30 * 2 - 1


def test_a_fixed_teacher_is_judged_on_its_images(judged, tmp_path):
    funmatch.distill(out=tmp_path / "run", steps=2, strategy="fix/rs", **MINI | {"batch": 4})
    ((first, more, share),) = judged
    views = torch.cat([first, *more])
    assert len(views) == 200
    assert share == 2
    assert len({view.sum().item() for view in views}) > 190, "each image once"


def test_a_resumed_run_is_not_judged_again(judged, tmp_path, monkeypatch):
    run = funmatch.distill(out=tmp_path / "run", steps=30, save_every=10, **MINI)
    weights = (run.folder / "student" / "model.safetensors").read_bytes()
    (run.folder / "result.json").unlink()
    shutil.rmtree(sorted((run.folder / "checkpoints").glob("step-*"))[-1])
    monkeypatch.setattr(freezing, "freeze", lambda *_: pytest.fail("judged again"))
    again = funmatch.distill(out=tmp_path / "run", steps=30, save_every=10, **MINI)
    assert (again.folder / "student" / "model.safetensors").read_bytes() == weights
    assert len(judged) == 1
