"""Heads that are fitted to the features of a frozen backbone: the command, its cache, its folder, what it refuses."""

import json
import shutil

import numpy as np
import pytest
import timm
import torch
import transformer_families
from make_images import FEW, paint
from safetensors.torch import save_file

import funmatch
from funmatch.config import Head
from funmatch.config.finished.head import STRENGTHS
from funmatch.data.cache.open_cache import open_cache
from funmatch.errors import InputError
from funmatch.models.inference.features import Features
from funmatch.models.load import load
from funmatch.ops.embeddings import nearest_neighbours
from funmatch.ops.view_spec import Preprocessing
from funmatch.training.evaluation.scoring import central_batches
from funmatch.training.heads import choose, features
from funmatch.training.heads.run import run

MINI = {"data": FEW, "model": "fashion-mini-teacher"}


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FUNMATCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def counted(monkeypatch):
    """The numbers of images whose features were computed, a part each."""
    done, original = [], features.FrozenBackbone._compute

    def compute(self, split, rows):
        done.append(len(rows))
        return original(self, split, rows)

    monkeypatch.setattr(features.FrozenBackbone, "_compute", compute)
    return done


def head(out, **options):
    return run(Head.checked(**{**MINI, "out": out, "C": [1e-3, 0.1], **options}))


def test_result_is_a_model_for_timm_and_for_every_command(tmp_path, funmatch):
    out = tmp_path / "head"
    found = head(out)
    assert (found["train"], found["features"], found["classes"], found["split"]) == (200, 48, 10, "test")
    assert [each["value"] for each in found["tried"]] == [1e-3, 0.1]
    best = max(each["top1"] for each in found["tried"])
    near = [each for each in found["tried"] if each["top1"] >= best - (best * (1 - best) / 30) ** 0.5]
    assert found["chosen"] == min(near, key=lambda each: each["nll"])["value"]
    net = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    ours, views = load(str(out)).eval(), torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(net(ours.normalize(views)), ours(views), atol=1e-5, rtol=1e-5)
    evaluated = funmatch("evaluate", out, "--data", FEW, "--json")
    assert json.loads(evaluated.stdout)["top1"] == pytest.approx(found["top1"])
    assert len(ours.card.classes) == 10
    assert ours.card.top1 == found["top1"]


@pytest.mark.usefixtures("own_cache")
def test_weaker_penalties_are_left_out_once_they_only_cost_time(tmp_path):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (160,), generator=generator)
    rows = torch.randn(160, 60, generator=generator) + torch.eye(3, 60)[labels]
    train, val = (choose.Labelled(rows[part], labels[part]) for part in (slice(80), slice(80, None)))

    def fitted(**options):
        config = Head.checked(**{**MINI, "out": tmp_path, **options})
        return choose.fit_head(config, train, val, 3, torch.device("cpu"))

    own, all_of_them = fitted(), fitted(C=[*STRENGTHS])
    assert len(all_of_them.tried) == len(STRENGTHS)
    # Neither the last three nor those left out are better, and so the choice is the same.
    assert 3 < len(own.tried) < len(STRENGTHS)
    assert own.tried == all_of_them.tried[: len(own.tried)]
    for name, sign in (("top1", 1), ("nll", -1)):
        best = max(sign * each[name] for each in all_of_them.tried)
        assert best == max(sign * each[name] for each in own.tried[:-3])
    assert own.chosen == all_of_them.chosen


@pytest.mark.usefixtures("own_cache")
def test_same_command_again_does_nothing_and_others_share_the_features(tmp_path, counted, capsys):
    out = tmp_path / "head"
    found = head(out)
    assert counted == [200, 30, 30]
    written = (out / "model.safetensors").stat().st_mtime_ns
    assert head(out) == found
    assert "finished; nothing to do" in capsys.readouterr().err
    head(tmp_path / "other", C=[1.0], standardise=False)
    assert len(counted) == 3
    assert (out / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(
        InputError, match=r"holds a head with other options:\n  C: \[0.001, 0.1\] in the head, \[1.0\] now"
    ):
        head(out, C=1.0)


@pytest.mark.usefixtures("own_cache")
def test_killed_in_any_part_it_goes_on_to_the_same_end(tmp_path, monkeypatch):
    whole = head(tmp_path / "whole")
    monkeypatch.setenv("FUNMATCH_CACHE", str(tmp_path / "second"))
    monkeypatch.setattr(features, "PART", 128)
    original, computed = features.FrozenBackbone._compute, []

    def interrupted(self, split, rows):
        if len(computed) in (1, 3):
            computed.append(None)
            raise KeyboardInterrupt
        computed.append((split.name, rows.start))
        return original(self, split, rows)

    monkeypatch.setattr(features.FrozenBackbone, "_compute", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            head(tmp_path / "head")
    found = head(tmp_path / "head")
    parts = [each for each in computed if each]
    assert len(parts) == len(set(parts)) == 2 + 1 + 1
    assert found["tried"] == whole["tried"]
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "head"))
    assert first == second


def test_damaged_features_and_models_are_made_again(tmp_path, own_cache, counted, capsys):
    out = tmp_path / "head"
    head(out)
    counted.clear()
    weights = out / "model.safetensors"
    sound = weights.read_bytes()
    weights.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    for path in (own_cache / "features").glob("*/features.npy"):
        content = bytearray(path.read_bytes())
        content[-3] ^= 4
        path.write_bytes(content)
    head(out)
    assert weights.read_bytes() == sound
    assert sum(counted) == 260
    said = capsys.readouterr().err
    assert "writing the head again" in said
    assert "is damaged; computing it again" in said


@pytest.mark.usefixtures("own_cache")
def test_backbones_with_another_head_or_none_have_the_same_features(tmp_path):
    torch.manual_seed(0)
    net = timm.create_model("test_convnext", num_classes=5)
    path = tmp_path / "weights.safetensors"
    save_file(net.state_dict(), path)
    each = [
        head(tmp_path / f"head-{len(options)}", model="test_convnext", weights=path, side=32, model_kwargs=options)
        for options in ([], ["num_classes=5"])
    ]
    assert each[0]["tried"] == each[1]["tried"]
    with pytest.raises(InputError, match=r"the backbone's content: .* in the head"):
        head(tmp_path / "head-0", side=32)


def known_features(out):
    """Features of the training and the test images, and their labels, by the folder of `embed`."""
    teacher = load("fashion-mini-teacher").eval()
    cache = open_cache([FEW])
    found = {}
    for name in ("train", "test"):
        split = cache.splits[name]
        views, labels = next(central_batches(split, Preprocessing(side=32, short_side=32, resample="tf"), len(split)))
        with torch.no_grad():
            found[name] = Features(teacher)(views), labels, load(str(out)).eval()(views)
    return found["train"], found["test"]


def test_neighbours_are_a_part_of_the_network(tmp_path):
    out = tmp_path / "head"
    found = head(out, C=[], kind="knn", neighbours=[7, 20], calibrate=False)
    assert [each["value"] for each in found["tried"]] == [7, 20]
    (train, labels, _), (test, _, logits) = known_features(out)
    votes = nearest_neighbours(train, labels, test, 10, k=int(found["chosen"]))
    shares = votes / votes.sum(-1, keepdim=True)
    torch.testing.assert_close(logits.softmax(-1), 0.999 * shares + 1e-4, atol=1e-4, rtol=0)


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_nearest_means_are_those_of_numpy(tmp_path, distance):
    out = tmp_path / "head"
    found = head(out, C=[], kind="means", distance=distance)
    (train, labels, _), (test, own, logits) = known_features(out)
    train, test = train.double().numpy(), test.double().numpy()
    if distance == "cosine":
        train, test = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (train, test))
    means = np.stack([train[labels.numpy() == label].mean(0) for label in range(10)])
    if distance == "cosine":
        expected = test @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
    else:
        expected = -((test[:, None] - means) ** 2).sum(-1) / 2
    assert (timm_loads := (distance == "euclidean")) == ("backbone" not in config_of(out)["model_args"])
    difference = (logits / found["chosen"]).detach().double().numpy() - expected
    # But for a number that all classes of an image share, which no probability depends on.
    assert difference - difference.mean(1, keepdims=True) * timm_loads == pytest.approx(0, abs=1e-3)
    assert found["top1"] == pytest.approx((expected.argmax(1) == own.numpy()).mean())


def config_of(out):
    return json.loads((out / "config.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linear", "knn", "means"])
def test_every_command_takes_a_head(tmp_path, funmatch, kind, images):
    out, options = tmp_path / "head", {"linear": {"C": [0.1]}}.get(kind, {"C": []})
    top1 = head(out, kind=kind, **options)["top1"]
    funmatch(
        "distill", "--data", FEW, "--teacher", out, "--student", "fashion-mini-student", "--steps", 3, "--batch", 8,
        "--eval-resample", "tf",
        "--out", tmp_path / "student",
    )  # fmt: skip
    result = json.loads((tmp_path / "student" / "result.json").read_text())
    assert result["teacher"]["top1"] == pytest.approx(top1)
    funmatch(
        "finetune", "--data", FEW, "--student", out, "--steps", 1, "--batch", 8, "--side", 32, "--resize", 32,
        "--out", tmp_path / "tuned",
    )  # fmt: skip
    assert json.loads((tmp_path / "tuned" / "result.json").read_text())["top1"] > top1 - 0.1
    rows = funmatch("predict", out, images, "--topk", 1).stdout.splitlines()
    assert len(rows) == 37
    funmatch("export", out, "--data", FEW, "--format", "onnx", "--out", tmp_path / "onnx")
    assert (tmp_path / "onnx" / "model.onnx").is_file()
    if kind == "linear":
        funmatch("export", out, "--data", FEW, "--format", "timm", "--out", tmp_path / "timm")
    funmatch("embed", out, images, "--out", tmp_path / "features.npy")
    assert np.load(tmp_path / "features.npy").shape == (36, 48)


def test_what_has_no_labels_or_too_few_classes_is_refused(tmp_path, images):
    options = {"model": "fashion-mini-teacher", "side": 24}
    with pytest.raises(InputError, match="unlabelled leaves no labels"):
        head(tmp_path / "a", data=images, unlabelled=True, **options)
    flat = tmp_path / "flat" / "train"
    flat.mkdir(parents=True)
    for path in (images / "train" / "ant").iterdir():
        (flat / path.name).write_bytes(path.read_bytes())
    with pytest.raises(InputError, match=r"4 of 4 train images of flat have no labels"):
        head(tmp_path / "b", data=flat.parent, val=1, **options)
    for path in (images / "train" / "cat").iterdir():
        path.unlink()
    with pytest.raises(InputError, match=r"1 of 3 classes of .* have no training images: cat"):
        head(tmp_path / "c", data=images, **options)
    assert not any((tmp_path / name).exists() for name in "abc")


def test_features_that_are_not_finite_are_named_and_not_kept(tmp_path, images, monkeypatch):
    monkeypatch.setenv("FUNMATCH_CACHE", str(tmp_path / "cache"))
    net = timm.create_model("test_convnext", num_classes=0)
    torch.nn.init.constant_(net.stem[0].bias, float("nan"))
    with pytest.raises(InputError, match=r"features that are not finite for 15 of 15 train images, e.g. .*ant"):
        funmatch.head(images, net, tmp_path / "head", side=32)
    assert not [*(tmp_path / "cache").rglob("features.npy")]


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("options", [{"kind": "knn"}, {"kind": "means"}])
def test_a_head_that_cannot_be_put_behind_a_network_is_refused_before_its_features(options, tmp_path, counted):
    network = transformer_families.write("vit", tmp_path / "network")
    with pytest.raises(InputError, match=r"built neither by timm nor by a function.*--kind means --distance euclidean"):
        head(tmp_path / "head", model=str(network), C=(), **options)
    assert not counted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "forest"}, "kind: wanted one of linear, knn, means, got 'forest'"),
        ({"C": [0.0]}, "^C must be above 0"),
        ({"neighbours": [3]}, "--neighbours belong to --kind knn, not linear"),
    ],
)
def test_wrong_options_are_refused(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        head(tmp_path / "head", **options)


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("funmatch.runtime.env.world_size", lambda: 2)
    with pytest.raises(InputError, match="single process; start it without torchrun"):
        head(tmp_path / "head")


def test_one_strength_needs_no_validation_images(tmp_path, images):
    shutil.rmtree(images / "val")
    options = {"data": images, "side": 24, "val": "none"}
    with pytest.raises(InputError, match=r"images has no validation images, .* pass one value of --C, or --val 10%"):
        head(tmp_path / "head", **options)
    found = head(tmp_path / "head", C=0.1, **options)
    assert found["tried"] == [{"value": 0.1}]
    assert (found["chosen"], found["split"], found["train"]) == (0.1, "test", 15)


def test_images_are_held_out_where_there_is_no_validation_split(tmp_path, images, capsys):
    for split in ("val", "test"):
        shutil.rmtree(images / split)
    for name in ("ant", "bee", "cat"):
        for i in range(10):
            paint(images / "train" / name / f"more-{i}.png", 100 * len(name) + 10 * ord(name[0]) + i)
    found = head(tmp_path / "head", data=images, side=24)
    assert "holding out 10% of the training images" in capsys.readouterr().err
    assert (found["split"], found["train"] + found["pictures"]) == ("val", 45)
    assert found["held_out_of"] == 45
    assert head(tmp_path / "head", data=images, side=24) == found
