"""A faster inference mode is judged on enough of a run's views, and on no more than decide."""

from collections.abc import Iterator

import pytest
import torch
from scipy import stats
from torch import nn

from funmatch.models.classifier import Card, Classifier
from funmatch.models.inference import frozen as frozen_models
from funmatch.models.inference import reference as reference_of
from funmatch.models.inference.frozen import Frozen, freeze
from funmatch.models.inference.modes import AllowedModes, InferenceMode
from funmatch.models.inference.parity import MAX_KL, MIN_AGREEMENT, ParityCheck, compare
from funmatch.models.inference.reference import FurtherViews, Reference

BOTH = AllowedModes(("bf16", "fp32"))
BATCH = 32


class Colours(nn.Module):
    """The mean colours of a view are its logits."""

    def forward(self, x):
        return 4 * x.mean((2, 3))


def teacher() -> Classifier:
    return Classifier(Colours(), Card("colours", 4, 1.0, (0.0,) * 3, (1.0,) * 3), num_classes=3)


def batch(number: int) -> torch.Tensor:
    """Views whose blue says which of all views each is; red comes before green by more than a tie allows."""
    views = torch.zeros(BATCH, 3, 4, 4)
    views[:, 0], views[:, 1], views[:, 2] = (
        1.0,
        0.97,
        (number * BATCH + torch.arange(BATCH).float()[:, None, None]) / 8192,
    )
    return views


def number_of(views: torch.Tensor) -> torch.Tensor:
    return (views[:, 2, 0, 0] * 8192).round().long()


class Run:
    """Further views, counting those that were made."""

    def __init__(self, share: int = 0, batches: int = 100) -> None:
        self.made = 0
        self.views = FurtherViews(self._batches(batches), share)

    def _batches(self, count: int) -> Iterator[torch.Tensor]:
        for number in range(1, count):
            self.made += 1
            yield batch(number)


@pytest.fixture(name="rounding")
def bf16_that_changes_some_views(monkeypatch):
    """Makes bf16 change the first class of the views in a set, and counts the images of each precision."""
    monkeypatch.setattr(frozen_models, "SMALL_NETWORK", 0)
    monkeypatch.setattr(
        frozen_models,
        "time_layouts",
        lambda _make, modes, *_, **_packed: {modes[0]: 9.0 * (modes[0].precision == "fp32")},
    )
    changed: set[int] = set()
    counts = {"plain": 0, "fp32": 0, "bf16": 0}

    def forward(self, views):
        counts[self.mode.precision if self.mode.folded else "plain"] += len(views)
        logits = self.classifier(views)
        if self.mode.precision == "bf16":
            logits = logits.clone()
            turned = torch.tensor([number in changed for number in number_of(views).tolist()])
            logits[turned] += torch.tensor([-0.08, 0.08, 0.0])
        return logits

    monkeypatch.setattr(frozen_models.Frozen, "forward", forward)
    return changed, counts


def chosen(run: Run | None, allowed: AllowedModes = BOTH) -> tuple[str, ParityCheck]:
    frozen, checks = freeze(teacher, batch(0), allowed, run and run.views)
    return frozen.mode.precision, checks[0]


def test_one_view_of_the_first_batch_decides_nothing_where_there_are_more(rounding):
    changed, counts = rounding
    changed.add(5)
    precision, check = chosen(None)
    assert (precision, check.images) == ("fp32", 32)
    precision, check = chosen(Run())
    assert precision == "bf16"
    assert check.images == 1024, "one in 256 is near the limit, so more views decide"
    assert check.agreement == 1 - 1 / 1024
    assert counts["plain"] == 32 + 1024, "plain fp32 is computed once for each view"


@pytest.mark.parametrize(("count", "precision", "images"), [(0, "bf16", 256), (5, "bf16", 1024), (6, "fp32", 1024)])
def test_the_promise_holds_on_the_views_that_are_compared(rounding, count, precision, images):
    """5 of 1,024 are 99.51 %, 6 are 99.41 %."""
    changed, _ = rounding
    changed.update(40 + 150 * number for number in range(count))
    found, check = chosen(Run())
    assert (found, check.images) == (precision, images)
    assert check.agreement == pytest.approx(1 - count / images)


def test_hopeless_modes_cost_one_batch(rounding):
    changed, counts = rounding
    changed.update(range(0, 8192, 4))
    assert chosen(Run())[0] == "fp32"
    assert counts["bf16"] == BATCH


def test_modes_of_fp32_are_judged_by_the_first_batch(rounding):
    _, counts = rounding
    run = Run()
    assert chosen(run, AllowedModes(("fp32",)))[1].images == BATCH
    assert (run.made, counts["plain"]) == (0, BATCH)
    # Judged so too where modes of 16 bits are tried, and refused.
    rounding[0].update(range(0, 8192, 4))
    counts["fp32"] = 0
    chosen(Run())
    assert counts["fp32"] == BATCH


@pytest.mark.parametrize(("share", "seconds", "images"), [(0, 0.0, 32), (100, 0.0, 96), (0, 100.0, 256)])
def test_views_cost_a_share_of_the_run_or_a_few_seconds(rounding, monkeypatch, share, seconds, images):  # noqa: ARG001
    monkeypatch.setattr(reference_of, "SECONDS", seconds)
    assert chosen(Run(share))[1].images == images


def test_views_end_with_the_run(rounding):
    rounding[0].add(3)
    precision, check = chosen(Run(batches=7))
    assert (precision, check.images) == ("bf16", 7 * BATCH)


def test_few_answers_of_many_numbers_are_held(monkeypatch):
    monkeypatch.setattr(reference_of, "MAX_ROW_NUMBERS", 3 * 70)
    reference = Reference(batch(0), Run().views)
    assert reference.extend(lambda: Frozen(teacher()), 256)
    assert len(reference) == 64
    assert not reference.extend(lambda: pytest.fail("nothing to compute"), 256)


@pytest.mark.parametrize("images", [32, 64, 128, 256, 1024])
def test_hopeless_is_what_chance_does_not_explain(images):
    limit = 1 - MIN_AGREEMENT
    least = next(n for n in range(images) if ParityCheck(InferenceMode(), images, 0.0, 1 - n / images).hopeless)
    assert stats.binom.sf(least - 1, images, limit) < 0.015
    assert stats.binom.sf(least - 2, images, limit) > 0.002, "nor is it stricter than needed"


def test_a_mean_kl_near_its_limit_is_neither_hopeless_nor_settled():
    torch.manual_seed(0)
    reference = torch.randn(256, 10)
    noise = torch.randn(256, 10)

    def check(size: float) -> ParityCheck:
        return compare(reference + size * noise, reference).check(InferenceMode(precision="bf16"))

    sizes = [size for size in torch.linspace(0.01, 0.1, 91).tolist() if abs(check(size).kl / MAX_KL - 1) < 0.05]
    assert sizes
    assert all(check(size).near_limit for size in sizes)
    assert check(0.1).hopeless
    assert not check(0.005).near_limit
    rows = reference + 0.03 * noise
    each = (reference.softmax(-1) * (reference.log_softmax(-1) - rows.log_softmax(-1))).sum(-1)
    assert check(0.03).kl == pytest.approx(each.mean().item(), rel=1e-4)
    assert check(0.03).kl_deviation == pytest.approx(each.std().item() / 16, rel=1e-4)


def test_changes_between_near_classes_are_reported_as_tied():
    reference = torch.tensor([[1.0, 0.98, 0.0], [3.0, 0.0, 0.0]])
    rows = torch.tensor([[0.98, 1.0, 0.0], [3.0, 0.0, 0.0]])
    check = compare(rows, reference).check(InferenceMode())
    assert (check.agreement, check.tied) == (1.0, 0.5)
    first, second, _ = reference[0].softmax(-1).tolist()
    assert check.margin == pytest.approx(first - second, rel=1e-4)
    assert check.record == {"kl": check.kl, "agreement": 1.0, "tied": 0.5, "margin": check.margin}
    assert "agreement 100.0 % (50.0 % changed, at margins up to 0.008)" in str(check)


def test_overflow_of_one_view_is_an_infinite_difference():
    reference = torch.randn(4, 3)
    rows = reference.clone()
    rows[2, 1] = torch.nan
    check = compare(rows, reference).check(InferenceMode(precision="fp16"))
    assert check.kl == float("inf")
    assert check.hopeless
