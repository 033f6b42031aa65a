"""Folders that are called by numbers, and teachers that count: 10 comes before 2 only in text."""

import numpy as np
import pytest
import torch
from PIL import Image

import funmatch
from funmatch.data.cache.open_cache import open_cache
from funmatch.errors import InputError
from funmatch.models.class_map import map_classes, number_order
from funmatch.models.classifier import Card, Classifier
from funmatch.training.evaluation.class_order import check_number_order

CLASSES = 12


class Reds(torch.nn.Module):
    """Right on every image of `numbers`, with classes in the order of their numbers."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.classes, self.weight = classes, torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return -((x[:, 0].mean((1, 2))[:, None] * 255 / 20 - torch.arange(self.classes)) ** 2) + self.weight


@pytest.fixture(name="numbers")
def folders_of_numbers(tmp_path):
    for split, count in (("train", 2), ("val", 4)):
        for c in range(CLASSES):
            for i in range(count):
                path = tmp_path / "numbers" / split / f"{c}" / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((8, 8, 3), (20 * c, 9 * i, len(split)), np.uint8)).save(path)
    return tmp_path / "numbers"


@pytest.mark.parametrize(
    ("classes", "order"),
    [
        (("0", "1", "10", "2"), [0, 1, 3, 2]),
        (("class 1", "class 10", "class 2"), [0, 2, 1]),
        (("00", "01", "10"), [0, 1, 2]),
        (("0", "1", "cat"), None),
        (("a1", "b2"), None),
        (("1", "01", "2"), None),
    ],
)
def test_classes_are_ordered_by_their_numbers(classes, order):
    assert number_order(classes) == order


def test_teacher_that_counts_is_refused_with_the_words_that_help(numbers):
    fits = r"top-1 16\.7 % .*\(0, 1, 10, 11, 2, …\), and 100\.0 % in the order of the numbers\. "
    with pytest.raises(InputError, match=fits + ".*(--classes by-number|classes=.by-number)"):
        funmatch.evaluate(model=Reds(), data=str(numbers), side=8)
    by_number = funmatch.evaluate(model=Reds(), data=str(numbers), side=8, classes="by-number")
    assert by_number["top1"] == 1
    trusted = funmatch.evaluate(model=Reds(), data=str(numbers), side=8, trust_class_order=True)
    assert trusted["top1"] == pytest.approx(2 / 12)


def test_teacher_of_a_distillation_is_refused_too(numbers, tmp_path):
    options = {"student": "test_resnet", "side": 8, "teacher_side": 8, "steps": 1, "batch": 4}
    with pytest.raises(InputError, match="in the order of the numbers"):
        funmatch.distill(data=str(numbers), teacher=Reds(), out=tmp_path / "a", **options)


def test_orders_that_fit_alike_are_a_note_only(numbers, capfd):
    split, classes = open_cache(str(numbers)).splits["val"], open_cache(str(numbers)).classes
    labels = split.labels(slice(None))
    card = Card("counts", 8, 1.0, (0.0,) * 3, (1.0,) * 3)
    right = torch.nn.functional.one_hot(labels, CLASSES).float()
    check_number_order(card, classes, right, split, trust_order=False)
    assert "numbers sorted as text; counts has top-1 100.0 %" in capfd.readouterr().err
    # All of one class that both orders share: nothing tells them apart.
    check_number_order(card, classes, right[:1].expand(len(labels), -1), split, trust_order=False)
    named = Card("named", 8, 1.0, (0.0,) * 3, (1.0,) * 3, classes)
    capfd.readouterr()
    check_number_order(named, classes, right.flip(1), split, trust_order=False)
    assert not capfd.readouterr().err


def test_mapping_by_number_needs_numbers_and_as_many_outputs():
    card = Card("fixed", 8, 1.0, (0.0,) * 3, (1.0,) * 3)
    assert map_classes(Classifier(Reds(3), card, num_classes=3), ("1", "10", "2"), "by-number") == ((0,), (2,), (1,))
    with pytest.raises(InputError, match="needs classes that are numbers, not cat, dog"):
        map_classes(Classifier(Reds(2), card, num_classes=2), ("cat", "dog"), "by-number")
    with pytest.raises(InputError, match=r"has 5 outputs, but the data has 3 classes: .* pass a map\.json"):
        map_classes(Classifier(Reds(5), card, num_classes=5), ("1", "10", "2"), "by-number")
