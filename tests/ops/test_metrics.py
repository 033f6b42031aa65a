"""Metrics against values computed by hand."""

import math

import numpy as np
import pytest
import torch

from funmatch.ops.calibration import calibration_error
from funmatch.ops.metrics import (
    class_means,
    confusion,
    has_diverged,
    largest_confusions,
    macro_f1,
    per_image,
    summarize,
)


def test_accuracy_agreement_and_kl_equal_hand_computed_values():
    student = torch.tensor([[3.0, 1, 0, 0, 0, 0], [0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [0, 9, 0, 0, 0, 0]])
    teacher = torch.tensor([[3.0, 1, 0, 0, 0, 0], [5, 4, 3, 2, 1, 0], [9, 4, 3, 2, 1, 0], [0, 0, 9, 0, 0, 0]])
    labels = torch.tensor([0, 0, 5, 1])
    metrics = summarize(per_image(student, labels, teacher))
    assert metrics["top1"] == 0.5
    assert metrics["top5"] == 0.5, "image 1's label is its last of six, image 2's too"
    assert metrics["agreement"] == 0.5
    p, q = torch.softmax(teacher.double(), -1), torch.softmax(student.double(), -1)
    assert metrics["kl"] == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-5)


def test_metrics_without_labels_or_teacher_are_none():
    metrics = summarize(per_image(torch.randn(3, 4)))
    assert set(metrics.values()) == {None}
    metrics = summarize(per_image(torch.randn(3, 4), teacher_logits=torch.randn(3, 4)))
    assert metrics["top1"] is None
    assert metrics["agreement"] is not None


def test_top5_is_1_with_fewer_than_five_classes():
    assert summarize(per_image(torch.randn(9, 3), torch.zeros(9, dtype=torch.long)))["top5"] == 1.0


def test_balanced_accuracy_does_not_reward_a_constant_prediction():
    logits = torch.tensor([[1.0, 0.0]]).expand(10, 2)
    labels = torch.tensor([0] * 9 + [1])
    metrics = summarize(per_image(logits, labels))
    assert metrics["top1"] == pytest.approx(0.9)
    assert metrics["balanced"] == 0.5


def test_calibration_error_equals_its_definition():
    rng = np.random.default_rng(0)
    confidence, correct = rng.random(500), rng.integers(0, 2, 500)
    expected = 0.0
    for b in range(15):
        inside = [i for i in range(500) if b / 15 < confidence[i] <= (b + 1) / 15]
        if inside:
            gap = sum(correct[i] for i in inside) / len(inside) - sum(confidence[i] for i in inside) / len(inside)
            expected += len(inside) / 500 * abs(gap)
    found = calibration_error(torch.tensor(confidence), torch.tensor(correct))
    assert found == pytest.approx(expected, abs=1e-9)
    assert calibration_error(torch.ones(4), torch.ones(4)) == 0
    assert math.isclose(calibration_error(torch.full((4,), 0.9), torch.tensor([1, 1, 0, 0])), 0.4, abs_tol=1e-6)


def test_a_student_that_is_further_from_its_teacher_than_a_guess_has_diverged():
    teacher = torch.tensor([[9.0, 0.0, 0.0], [0.0, 9.0, 0.0]])
    uniform = summarize(per_image(torch.zeros(2, 3), teacher_logits=teacher))["kl"]
    wrong = summarize(per_image(-100 * teacher, teacher_logits=teacher))["kl"]
    assert not has_diverged(uniform, 3)
    assert has_diverged(wrong, 3)
    assert not has_diverged(None, 3)


def test_confusions_and_class_figures_equal_those_of_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(0)
    labels, predicted = torch.randint(6, (2, 200), generator=generator)
    labels[labels == 3] = 2  # a class without images
    matrix = confusion(predicted, labels, 7)
    assert matrix.numpy() == pytest.approx(sklearn.confusion_matrix(labels, predicted, labels=range(7)))
    recalls = class_means((predicted == labels).float(), labels, 7)
    present = matrix.sum(1) > 0
    expected = sklearn.recall_score(labels, predicted, labels=range(7), average=None, zero_division=0)
    assert recalls[present].numpy() == pytest.approx(expected[present.numpy()])
    assert recalls[~present].isnan().all()
    assert macro_f1(predicted, labels, 7) == pytest.approx(
        sklearn.f1_score(labels, predicted, average="macro", zero_division=0)
    )


def test_largest_confusions_leave_out_what_is_right_and_what_never_happens():
    matrix = torch.tensor([[9, 2, 0], [5, 1, 0], [2, 0, 0]])
    labels, predicted = matrix.nonzero().repeat_interleave(matrix[matrix > 0], 0).T
    assert largest_confusions(predicted, labels, 10) == [(1, 0, 5), (0, 1, 2), (2, 0, 2)]
    assert largest_confusions(predicted, labels, 1) == [(1, 0, 5)]
    assert largest_confusions(labels, labels, 3) == []
    assert torch.equal(confusion(predicted, labels, 3), matrix)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_accuracies_equal_those_of_torchmetrics(scale):
    torchmetrics = pytest.importorskip("torchmetrics.functional.classification")
    generator = torch.Generator().manual_seed(0)
    logits, labels = scale * torch.randn(300, 9, generator=generator), torch.randint(9, (300,), generator=generator)
    metrics = summarize(per_image(logits, labels))
    for name, options in (("top1", {}), ("top5", {"top_k": 5}), ("balanced", {"average": "macro"})):
        wanted = torchmetrics.multiclass_accuracy(logits, labels, 9, **({"average": "micro"} | options))
        assert metrics[name] == pytest.approx(wanted.item(), abs=1e-6)
    wanted = torchmetrics.multiclass_calibration_error(logits.double(), labels, 9, n_bins=15, norm="l1")
    # In other libraries a confidence of exactly 1 is in a bin of its own, or in the last one; the sum is the same.
    assert metrics["ece"] == pytest.approx(wanted.item(), abs=1e-6)


def test_predicted_class_is_that_which_top1_counts_where_classes_are_tied():
    logits, labels = torch.zeros(40, 7), torch.arange(40) % 7
    columns = per_image(logits, labels)
    assert torch.equal(columns["predicted"] == labels, columns["top1"] > 0)
