"""Several teachers, at their own sides, with their own classes."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from make_images import FEW, paint
from test_distill import MINI, TEACHER, TINY, records

import funmatch
from funmatch.data.cache.open_cache import open_cache
from funmatch.data.loader import Loader
from funmatch.errors import InputError
from funmatch.models.class_map import map_classes, read_class_map
from funmatch.models.classifier import Card, Classifier
from funmatch.models.ensemble import EnsembleMember, TeacherEnsemble, mean_logits, select_classes
from funmatch.models.inference.frozen import Frozen
from funmatch.models.save import save
from funmatch.ops.crops import crop_resize_flip
from funmatch.ops.mixing import mixup
from funmatch.ops.tasks.multiclass import mean_probabilities
from funmatch.ops.view_spec import ViewSpec


class MeanColour(torch.nn.Module):
    """A linear network on the mean colour of its view."""

    def __init__(self, classes: int, seed: int) -> None:
        super().__init__()
        weight = torch.randn(classes, 3, generator=torch.Generator().manual_seed(seed))
        self.weight = torch.nn.Parameter(weight)
        self.num_classes = classes

    def forward(self, x):
        return F.linear(x.mean((2, 3)), self.weight)


def classifier(classes: int = 4, seed: int = 0, names=None, **card) -> Classifier:
    model_card = Card("fixed", 8, 1.0, card.get("mean", (0.0,) * 3), card.get("std", (1.0,) * 3), names)
    return Classifier(MeanColour(classes, seed), model_card)


def logits(count: int, classes: int = 5) -> list[torch.Tensor]:
    return list(3 * torch.randn(count, 6, classes, generator=torch.Generator().manual_seed(1)))


def test_mean_logits_equals_its_definition():
    a, b = logits(2)
    torch.testing.assert_close(mean_logits([a, b], [0.25, 0.75]), 0.25 * a + 0.75 * b)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_mean_probabilities_has_the_gradient_of_the_summed_kls(temperature):
    a, b, student = logits(3)
    combined = mean_probabilities([a, b], [0.3, 0.7], temperature)
    p, q = (each.div(temperature).softmax(-1) for each in (a, b))
    torch.testing.assert_close((combined / temperature).softmax(-1), 0.3 * p + 0.7 * q)
    one, other = student.clone().requires_grad_(), student.clone().requires_grad_()

    def kl(probabilities, s):
        return (probabilities * (probabilities.log() - (s / temperature).log_softmax(-1))).sum()

    kl((combined / temperature).softmax(-1), one).backward()
    (0.3 * kl(p, other) + 0.7 * kl(q, other)).backward()
    torch.testing.assert_close(one.grad, other.grad)


def test_each_teacher_gets_its_side_and_normalisation():
    small = classifier(mean=(0.5,) * 3, std=(0.25,) * 3)
    large = classifier(seed=1)
    teachers = TeacherEnsemble([EnsembleMember(Frozen(small), 8, 0.5), EnsembleMember(Frozen(large), 16, 0.5)])
    views = {8: torch.rand(2, 3, 8, 8), 16: torch.rand(2, 3, 16, 16)}
    expected = 0.5 * F.linear(views[8].sub(0.5).div(0.25).mean((2, 3)), small.net.weight)
    expected += 0.5 * F.linear(views[16].mean((2, 3)), large.net.weight)
    torch.testing.assert_close(teachers(views), expected)


def test_teacher_crops_are_the_same_boxes_at_other_sides(images):
    split = open_cache(str(images)).splits["train"]
    loader = Loader(split, ViewSpec(seed=1, batch=6, side=12), teacher_sides=(12, 20, 31))
    batch, drawn = loader.batch_at(3), loader.sample(3)
    assert batch.teacher_crops[0] is None, "the student's own crops"
    teacher_crops = (batch.crops, *batch.teacher_crops[1:])
    assert [each.shape[-1] for each in teacher_crops] == [12, 20, 31]
    assert torch.equal(batch.crops, Loader(split, ViewSpec(seed=1, batch=6, side=12)).batch_at(3).crops)
    rows = [-1, 0, 1, 2, 3, 4, 5]
    batch_images = [split.image(i) for i in drawn.indices[rows]]
    for crops in teacher_crops:
        assert torch.equal(crops, crop_resize_flip(batch_images, drawn.boxes[rows], drawn.flips[rows], crops.shape[-1]))
    # Views at two sides show the same crop: shrunk to 4 × 4 they are nearly equal.
    small, large = (
        F.adaptive_avg_pool2d(mixup(crops, batch.lam), 4) for crops in (batch.crops, batch.teacher_crops[2])
    )
    assert (small - large).abs().mean() < 0.03


def test_selected_classes_are_renormalised():
    (all_logits,) = logits(1)
    assert select_classes(all_logits, None) is all_logits
    assert torch.equal(select_classes(all_logits, ((3,), (0,))), all_logits[:, [3, 0]])
    selected = select_classes(all_logits, ((3, 1), (0,))).softmax(-1)
    p = all_logits.softmax(-1)
    expected = torch.stack([p[:, 3] + p[:, 1], p[:, 0]], 1)
    torch.testing.assert_close(selected, expected / expected.sum(-1, keepdim=True))


def test_classes_are_mapped_by_name():
    model = classifier(names=("Cat", "big_dog", "eel", "eel "))
    assert map_classes(model, ("big dog", "cat"), "same-names") == ((1,), (0,))
    assert map_classes(model, ("eel",), "same-names") == ((2,),)
    with pytest.raises(InputError, match="unknown class of fixed 'cta'; did you mean 'Cat'"):
        map_classes(model, ("cta",), "same-names")
    with pytest.raises(InputError, match=r"several classes 'EEL': 2, 3; use the number"):
        map_classes(model, ("EEL",), "same-names")
    with pytest.raises(InputError, match="does not know the names of its 4 classes"):
        map_classes(classifier(), ("cat",), "same-names")


def test_imagenet_names_are_known():
    model = classifier(classes=1000)
    assert map_classes(model, ("tench", "n01443537", "Egyptian cat"), "same-names") == ((0,), (1,), (285,))
    with pytest.raises(InputError, match="several classes 'crane': 134, 517"):
        map_classes(model, ("crane",), "same-names")


def test_classes_are_mapped_by_file(tmp_path):
    path = tmp_path / "map.json"
    path.write_text(json.dumps({"pet": ["cat", 3], "fish": "eel"}))
    model = classifier(names=("cat", "dog", "eel", "fox"))
    assert map_classes(model, ("fish", "pet"), str(path)) == ((2,), (0, 3))
    for expected, message in {
        ("fish", "pet", "bird"): "does not map bird",
        ("fish",): "unknown class in .* 'pet'",
    }.items():
        with pytest.raises(InputError, match=message):
            map_classes(model, expected, str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[1]", "is not a class map"),
        ('{"a": []}', "expected a name, a number, or a list"),
        ('{"a": {"b": 1}}', "expected a name, a number, or a list"),
        ('{"a": true}', "expected a name, a number, or a list"),
    ],
)
def test_invalid_class_maps_are_rejected(tmp_path, text, message):
    (tmp_path / "map.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read_class_map(tmp_path / "map.json")
    with pytest.raises(InputError, match="cannot read the class map"):
        read_class_map(tmp_path / "none.json")


def test_class_numbers_out_of_range_are_rejected(tmp_path):
    (tmp_path / "map.json").write_text('{"a": 4}')
    with pytest.raises(InputError, match="no class 4; its classes are 0 … 3"):
        map_classes(classifier(), ("a",), str(tmp_path / "map.json"))


def test_run_with_two_teachers_at_two_sides(tmp_path):
    options = {
        **MINI,
        "teacher": [TEACHER, TEACHER],
        "teacher_side": [32, 40],
        "teacher_share": [3, 1],
        "steps": 4,
    }
    run = funmatch.distill(out=tmp_path / "run", combine="mean-probabilities", save_every=2, **options)
    assert run.figures["teacher"]["name"] == f"{TEACHER} + {TEACHER}"
    assert run.figures["teacher"]["parameters"] == 2 * 109_766
    found = records(run.folder, "teacher")
    assert [each["teacher"] for each in found] == [TEACHER, TEACHER, f"{TEACHER} + {TEACHER}"]
    assert found[0]["top1"] == pytest.approx(0.93, abs=0.02)  # one image is 0.033
    mode = {"folded": True, "precision": "fp32", "layout": "channels_last"}
    mode |= dict.fromkeys(("compiled", "native"), False)
    assert found[0]["form"] == mode
    assert found[0]["beside_fp32"]["agreement"] == 1.0
    config = json.loads((run.folder / "config.json").read_text())
    assert config["knobs"]["teacher_side"] == [32, 40]
    evaluated = funmatch.evaluate(run.folder)
    assert evaluated["agreement"] == pytest.approx(run.agreement, abs=2e-3)
    assert evaluated["kl"] == pytest.approx(run.figures["kl"], rel=1e-2)


def test_teacher_of_more_classes_is_mapped_or_used_without_labels(tmp_path, images):
    """A teacher of five classes in another order is mapped to three; without labels the student gets all five."""
    torch.manual_seed(0)
    teacher = funmatch.load("resnet10t", options=("channels=(8,8,16,16)", "stem_width=8"), classes=5, pretrained=False)
    common = {**TINY, "batch": 32, "steps": 2, "teacher": teacher, "allow_weak_teacher": True}
    with pytest.raises(InputError, match=r'has 5 outputs, but .* has 3 classes .*classes="same-names"'):
        funmatch.distill(data=images, out=tmp_path / "refused", **common)
    assert not (tmp_path / "refused").exists()
    path = tmp_path / "map.json"
    path.write_text(json.dumps({"bee": 4, "ant": [0, 2], "cat": 1}))
    run = funmatch.distill(data=images, out=tmp_path / "run", classes=str(path), **common)
    assert funmatch.load(run.folder).card.classes == ("ant", "bee", "cat")
    evaluated = funmatch.evaluate(teacher, data=images, classes=str(path), side=32)
    assert evaluated["top1"] == pytest.approx(run.figures["teacher"]["top1"])
    path.write_text(json.dumps({"bee": 3, "ant": [0, 2], "cat": 1}))
    with pytest.raises(InputError, match="the teacher's content"):
        funmatch.distill(data=images, out=tmp_path / "run", classes=str(path), **common)
    free = funmatch.distill(data=images, out=tmp_path / "free", unlabelled=True, **common)
    assert funmatch.load(free.folder).num_classes == 5
    named = funmatch.distill(data=images, out=tmp_path / "named", unlabelled=True, classes=str(path), **common)
    assert funmatch.load(named.folder).card.classes == ("bee", "ant", "cat")


def test_conflicting_teachers_are_rejected(tmp_path):
    other = classifier(classes=7)
    with pytest.raises(InputError, match=r"teachers disagree on the number of classes: .* has 10, .* has 7"):
        funmatch.distill(out=tmp_path / "run", teacher=[TEACHER, other], steps=1, side=32, **MINI)
    with pytest.raises(InputError, match="teacher_side has 3 values for 2 teachers"):
        funmatch.distill(out=tmp_path / "run", teacher=[TEACHER] * 2, teacher_side=(1, 2, 3), steps=1, **MINI)
    with pytest.raises(InputError, match="give the network to match"):
        funmatch.distill(out=tmp_path / "run", teacher=[], steps=1, **MINI)


def test_teacher_below_its_recorded_accuracy_is_a_warning(tmp_path, capsys):
    """With two rows of its head swapped, the teacher is well below the accuracy that its card records."""
    broken = funmatch.load(TEACHER)
    broken.card = type(broken.card)(**{**vars(broken.card), "top1": 0.999, "classes": None})
    with torch.no_grad():
        broken.net.fc.weight[:2] = broken.net.fc.weight[:2].flip(0)
    funmatch.distill(out=tmp_path / "run", teacher=broken, steps=1, side=32, **MINI)
    assert "WARNING: teacher python:Classifier has top-1" in capsys.readouterr().err


def test_teachers_with_classes_in_another_order_are_rejected(tmp_path):
    """Without labels, accuracy cannot reveal the mismatch."""
    first = classifier(classes=3, names=("a", "b", "c"))
    second = classifier(classes=3, seed=1, names=("c", "b", "a"))
    options = {
        "data": FEW,
        "unlabelled": True,
        "student": "fashion-mini-student",
        "side": 32,
        "steps": 1,
        "batch": 32,
    }
    with pytest.raises(InputError, match="are not the same in order"):
        funmatch.distill(out=tmp_path / "run", teacher=[first, second], **options)
    run = funmatch.distill(out=tmp_path / "run", teacher=[classifier(classes=3, seed=2), second], **options)
    assert funmatch.load(run.folder).card.classes == ("c", "b", "a")


def test_class_names_of_teachers_are_compared(tmp_path):
    teacher = funmatch.load("fashion-mini-teacher")
    names = teacher.card.classes
    assert names
    folders = {"silent": None, "named": names, "reversed": names[::-1]}
    for name, classes in folders.items():
        (tmp_path / name).mkdir()
        card = replace(teacher.card, classes=classes)
        save(funmatch.load("fashion-mini-teacher"), tmp_path / name, card=card, about={})
    for i in range(4):
        paint(tmp_path / "pictures" / f"{i}.png", i)
    options = {"student": "fashion-mini-student", "steps": 1, "batch": 32}
    teachers = [tmp_path / name for name in folders]
    with pytest.raises(funmatch.InputError, match="not the same in order"):
        funmatch.distill(tmp_path / "pictures", teachers, out=tmp_path / "run", **options)
    funmatch.distill(tmp_path / "pictures", teachers, out=tmp_path / "run", trust_class_order=True, **options)


SHORTEST = {
    "data": FEW, "teacher": "fashion-mini-teacher", "student": "fashion-mini-student", "steps": 1, "batch": 32,
}  # fmt: skip


@pytest.fixture(scope="module")
def run_with_measured_mode(tmp_path_factory):
    """Folder of a run and of the cache that holds the measured mode of its teacher."""
    folder = tmp_path_factory.mktemp("form")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("FUNMATCH_CACHE", str(folder / "cache"))
        funmatch.distill(out=folder / "a", **SHORTEST)
    return folder


@pytest.mark.parametrize(
    "damage",
    [
        *(pytest.param(text, marks=pytest.mark.slow) for text in ('{"precision": ["fp32"]}', '{"layout": 3}')),
        '{"compiled": true}', '{"precision": "fp64"}', "[]", "folder",
    ],
)  # fmt: skip
def test_damaged_measurement_of_a_teacher_mode_is_ignored(tmp_path, monkeypatch, run_with_measured_mode, damage):
    monkeypatch.setenv("FUNMATCH_CACHE", str(tmp_path / "cache"))
    shutil.copytree(run_with_measured_mode, tmp_path, dirs_exist_ok=True)
    (record,) = (tmp_path / "cache" / "forms").iterdir()
    if damage == "folder":
        record.unlink()
        record.mkdir()
    else:
        record.write_text(damage)
    funmatch.distill(out=tmp_path / "b", **SHORTEST)
    modes = [json.loads((tmp_path / run / "config.json").read_text())["facts"]["teacher_forms"] for run in "ab"]
    assert modes[0][0]["form"] == modes[1][0]["form"]
