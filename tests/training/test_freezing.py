"""A run's inference modes are judged on the views of its first steps, once."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from make_images import FEW

import funmatch
from funmatch.data.cache.open_cache import open_cache
from funmatch.data.loader import Loader
from funmatch.errors import InputError
from funmatch.models.inference import frozen
from funmatch.models.inference.reference import FurtherViews
from funmatch.ops.mixing import mixup
from funmatch.ops.view_spec import ViewSpec
from funmatch.runtime.disk.json_files import seal
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

    def freeze(make, views, allowed, further, variants):
        more = further and list(further.batches)
        found.append((views, more, further and further.share))
        return frozen.freeze(make, views, allowed, further and FurtherViews(iter(more), further.share), variants)

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


def test_equal_runs_are_judged_once(judged, tmp_path):
    """Steps of one view are judged on what those of another are not; a damaged record costs a judgement."""

    def forms(name, **options):
        run = funmatch.distill(out=tmp_path / name, steps=60, **MINI | options)
        (form,) = json.loads((run.folder / "config.json").read_text())["facts"]["teacher_forms"]
        return form

    first = forms("run")
    assert forms("again", lr=0.01) == first
    assert len(judged) == 1
    forms("seed", seed=4)
    forms("crops", crop_min_area=0.5)
    assert len(judged) == 3
    places = [*(tmp_path / "cache" / "judgements").iterdir()]
    assert len(places) == 3
    for place in places:
        place.write_text(json.dumps(json.loads(place.read_text()) | {"kl": 1.0}))
    assert forms("damaged") == first
    assert len(judged) == 4


@pytest.mark.slow
def test_code_of_the_user_is_judged_in_each_run(judged, tmp_path):
    options = MINI | {"teacher": funmatch.load("fashion-mini-teacher")}
    for name in "ab":
        funmatch.distill(out=tmp_path / name, steps=60, **options)
    assert len(judged) == 2
    assert not (tmp_path / "cache" / "judgements").exists()


def test_a_short_run_is_judged_by_its_first_batch(judged, tmp_path):
    funmatch.distill(out=tmp_path / "run", steps=25, **MINI)
    ((first, more, _),) = judged
    assert (len(first), more) == (16, None)


@pytest.mark.slow
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


@pytest.fixture(name="rescued")
def run_whose_teacher_keeps_a_layer_in_fp32(judged, tmp_path, monkeypatch):
    """Folder of a run whose teacher fails in bf16 as a whole."""
    assert judged == []
    original = frozen.try_mode

    def try_mode(make, mode, reference):
        teacher, check = original(make, mode, reference)
        fails = mode.precision == "bf16" and not mode.fp32_layers
        return teacher, replace(check, kl=1.0) if fails else check

    def variants(make, mode, reference):  # noqa: ARG001
        yield replace(mode, fp32_layers=("conv1", "layer2.0"))

    timings = {"bf16": 1.0, "fp32": 9.0}
    monkeypatch.setattr(
        frozen, "time_layouts", lambda _make, modes, *_, **_packed: {modes[0]: timings[modes[0].precision]}
    )
    monkeypatch.setattr(frozen, "try_mode", try_mode)
    monkeypatch.setattr(freezing, "modes_with_fp32_layers", variants)
    return funmatch.distill(out=tmp_path / "run", steps=30, save_every=10, **MINI).folder


def unfinished(folder):
    (folder / "result.json").unlink()
    shutil.rmtree(sorted((folder / "checkpoints").glob("step-*"))[-1])


def test_layers_in_fp32_are_recorded_remembered_and_resumed(rescued, tmp_path, monkeypatch, capsys):
    form = {
        "folded": True,
        "precision": "bf16",
        "layout": "contiguous",
        "compiled": False,
        "native": False,
    }
    facts = json.loads((rescued / "config.json").read_text())["facts"]
    found = facts["teacher_forms"][0]["form"]
    measured = {name: found[name] for name in ("layout", "packed") if name in found}
    assert found == form | measured | {"fp32_layers": ["conv1", "layer2.0"]}
    weights = (rescued / "student" / "model.safetensors").read_bytes()
    assert "conv1, layer2.0 in fp32" in (rescued / "report.html").read_text()

    unfinished(rescued)
    with monkeypatch.context() as patched:
        patched.setattr(freezing, "freeze", lambda *_: pytest.fail("judged again"))
        funmatch.distill(out=rescued, steps=30, save_every=10, **MINI)
    assert (rescued / "student" / "model.safetensors").read_bytes() == weights

    # The next run tries the remembered form first, and searches nothing.
    monkeypatch.setattr(freezing, "modes_with_fp32_layers", lambda *_: pytest.fail("searched again"))
    capsys.readouterr()
    other = funmatch.distill(out=tmp_path / "other", steps=30, **MINI).folder
    lines = [line for line in capsys.readouterr().err.splitlines() if "fashion-mini-teacher: " in line]
    assert "using folded, bf16" in lines[0]
    assert (other / "student" / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            ["conv7"],
            r"keeps layers of teacher fashion-mini-teacher in fp32, but it has no layer 'conv7', so the record",
        ),
        pytest.param([""], "it has no layer ''", marks=pytest.mark.slow),
        pytest.param(["layer2", "layer2.0"], "its layer 'layer2.0' is named twice", marks=pytest.mark.slow),
        pytest.param("conv1", r"damaged \('fp32_layers' is not a list\)", marks=pytest.mark.slow),
        ([3], r"config.json is damaged \('fp32_layers' is 3\)"),
    ],
)
def test_damaged_records_of_layers_are_refused_in_a_sentence(rescued, layers, message):
    unfinished(rescued)
    path = rescued / "config.json"
    config = json.loads(path.read_text())
    config["facts"]["teacher_forms"][0]["form"]["fp32_layers"] = layers
    path.write_text(json.dumps(seal(config)))
    with pytest.raises(InputError, match=message):
        funmatch.distill(out=rescued, steps=30, save_every=10, **MINI)


@pytest.mark.slow
def test_damaged_measurements_of_layers_are_ignored(rescued, tmp_path):
    (place,) = (tmp_path / "cache" / "forms").iterdir()
    for number, layers in enumerate((["conv7"], 3, [""])):
        place.write_text(json.dumps(json.loads(place.read_text()) | {"fp32_layers": layers}))
        other = funmatch.distill(out=tmp_path / f"{number}", steps=30, **MINI).folder
        config = json.loads((other / "config.json").read_text())
        assert config["facts"]["teacher_forms"][0]["form"]["fp32_layers"] == ["conv1", "layer2.0"]
    assert rescued.is_dir()
