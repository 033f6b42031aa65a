"""Shampoo against pytorch-optimizer's ScalableShampoo, and with ill-conditioned and non-finite numbers."""

import copy

import pytest
import torch
from pytorch_optimizer import ScalableShampoo
from pytorch_optimizer.optimizer.utils import preconditioner
from pytorch_optimizer.optimizer.utils.graft import LayerWiseGrafting
from torch import nn

from funmatch.ops.optim import shampoo_blocks
from funmatch.ops.optim.shampoo import GRAFTS, Shampoo
from funmatch.ops.optim.shampoo_blocks import block_grids, inverse_roots, merge_axes

EPS = 1e-6
SHAPES = {
    "convolution": (6, 4, 3, 3),
    "linear": (8, 7),
    "bias": (5,),
    "larger than a block": (20, 17),
    "large convolution": (16, 9, 3, 3),
    "point-wise": (19, 3, 1, 1),
    "small": (3, 2),
    "three axes": (8, 4, 7),
}


def published_merging(shape, longest):
    """`merge_small_dims` of google-research's scalable_shampoo."""
    axes, product = [], 1
    for length in shape:
        if product * length <= longest:
            product *= length
        else:
            if product > 1:
                axes.append(product)
            product = length
    return [*axes, product] if product > 1 else axes


@pytest.fixture(name="oracle")
def scalable_shampoo(monkeypatch):
    """ScalableShampoo with two deviations from the published algorithm corrected.

    It leaves an axis of 1 before a first axis longer than a block, so the order of the root is one too high; and with
    `use_svd` it leaves out the ridge that its approximate iterations add.
    """
    original_power = preconditioner.compute_power_svd

    def with_ridge(matrix, power):
        top = torch.linalg.matrix_norm(matrix, 2)[..., None, None]
        return original_power(matrix + EPS * top * torch.eye(matrix.shape[-1], dtype=matrix.dtype), power)

    monkeypatch.setattr(preconditioner, "compute_power_svd", with_ridge)
    monkeypatch.setattr(preconditioner, "merge_small_dims", published_merging)
    return ScalableShampoo


def pair(shapes, dtype=torch.float64):
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    return ours, copy.deepcopy(ours)


def train_both(ours, theirs, first, second, steps=25):
    for _ in range(steps):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p) * torch.logspace(0, -3, p.shape[-1], dtype=p.dtype)
            q.grad = p.grad.clone()
        first.step()
        second.step()


@pytest.mark.parametrize("graft", ["none", "sgd", "sqrtn", "adagrad", "rmsprop"])
@pytest.mark.parametrize(
    "options",
    [
        {"start_preconditioning_step": 5},
        {"nesterov": False, "start_preconditioning_step": 1, "betas": (0.8, 1.0)},
        {"statistics_compute_steps": 2, "preconditioning_compute_steps": 3, "start_preconditioning_step": 4},
    ],
    ids=["usual", "sums", "seldom"],
)
def test_updates_equal_scalable_shampoos(oracle, graft, options):
    ours, theirs = pair(SHAPES.values())
    options = {"betas": (0.9, 0.99), "block_size": 8, "preconditioning_compute_steps": 1, "matrix_eps": EPS} | options
    betas = options.pop("betas")
    other = oracle(theirs, 0.01, graft_type=LayerWiseGrafting[graft.upper()], use_svd=True, **options)
    other.param_groups[0]["betas"] = options["betas"] = (
        betas  # it computes correctly with β₂ = 1, but its constructor rejects it
    )
    train_both(ours, theirs, Shampoo(ours, 0.01, graft_type=graft, **options), other)
    for name, p, q in zip(SHAPES, ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


def test_updates_are_close_to_unpatched_scalable_shampoos():
    """Its iterations stop at an error of 1e-3, hence the tolerance; no axis here is longer than a block."""
    ours, theirs = pair([(6, 4, 3, 3), (8, 7), (5,)])
    options = {"block_size": 16, "preconditioning_compute_steps": 1, "start_preconditioning_step": 3}
    train_both(ours, theirs, Shampoo(ours, 0.01, **options), ScalableShampoo(theirs, 0.01, **options))
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("shape", [*SHAPES.values(), (1, 300), (257, 129), (1, 1), (64, 3, 7, 7)])
@pytest.mark.parametrize("size", [8, 128])
def test_blocks_cover_a_tensor_exactly_once(shape, size):
    assert list(merge_axes(shape, size)) == published_merging(shape, size)
    if len(flat := merge_axes(shape, size)) < 2:
        return
    tensor = torch.randn(flat)
    rejoined = torch.full_like(tensor, torch.nan)
    for grid in block_grids(flat, size):
        assert max(grid.block) <= size
        pieces = grid.split(tensor)
        first = tuple(slice(begin, begin + length) for begin, length in zip(grid.corner, grid.block, strict=True))
        assert torch.equal(pieces[0], tensor[first])
        grid.join_(rejoined, pieces)
    assert torch.equal(rejoined, tensor)


def test_inverse_roots_equal_their_definition():
    torch.manual_seed(0)
    factor = torch.randn(3, 6, 20, dtype=torch.float64)
    statistics, powers = factor @ factor.mT, torch.tensor([-1 / 2, -1 / 4, -1 / 6], dtype=torch.float64)
    roots = inverse_roots(statistics, torch.zeros_like(statistics), powers, 0.0)
    for root, statistic, order in zip(roots, statistics, (2, 4, 6), strict=True):
        torch.testing.assert_close(
            torch.linalg.matrix_power(root, order) @ statistic, torch.eye(6, dtype=torch.float64)
        )


def test_failed_roots_keep_the_last_valid_ones(monkeypatch):
    statistics = torch.eye(4).repeat(5, 1, 1) * 16
    statistics[1, 0, 0], statistics[3, 2, 1] = torch.nan, torch.inf
    last, powers = torch.full_like(statistics, 7), torch.full((5,), -1 / 4)
    roots = inverse_roots(statistics, last, powers, 0.0)
    for i in range(5):
        torch.testing.assert_close(roots[i], last[i] if i in (1, 3) else torch.eye(4) / 2)
    eigh = torch.linalg.eigh

    def fails_to_converge(stack):
        if (stack[:, 0, 0] == 9).any():
            raise torch.linalg.LinAlgError("did not converge")
        return eigh(stack)

    monkeypatch.setattr(shampoo_blocks.torch.linalg, "eigh", fails_to_converge)
    statistics = torch.eye(4).repeat(5, 1, 1) * 16
    statistics[2] = torch.eye(4) * 9
    roots = inverse_roots(statistics, last, powers, 0.0)
    for i in range(5):
        torch.testing.assert_close(roots[i], last[i] if i == 2 else torch.eye(4) / 2)


@pytest.mark.parametrize("graft", GRAFTS)
@pytest.mark.parametrize(
    "gradient",
    [
        lambda shape: torch.zeros(shape),
        lambda shape: torch.randn(shape) * torch.logspace(0, -18, shape[-1]),
        lambda shape: torch.ones(shape),
        lambda shape: torch.randn(shape) * 1e-30,
        lambda shape: torch.randn(shape) * 1e15,
    ],
    ids=["zeros", "ill-conditioned", "rank one", "tiny", "huge"],
)
def test_hard_gradients_give_finite_updates(graft, gradient):
    torch.manual_seed(0)
    p = nn.Parameter(torch.zeros(24, 17))
    optimizer = Shampoo([p], 1e-3, block_size=16, graft_type=graft, start_preconditioning_step=2)
    for _ in range(6):
        p.grad = gradient(p.shape)
        optimizer.step()
        assert p.isfinite().all()


def test_one_overflow_does_not_corrupt_the_statistics():
    torch.manual_seed(0)
    p = nn.Parameter(torch.zeros(8, 8))
    optimizer = Shampoo([p], 1e-3, block_size=8, start_preconditioning_step=1)
    for step in range(4):
        p.grad = torch.randn_like(p) * (1e30 if step == 1 else 1)
        if step == 1:
            before = {slot: tensor.clone() for slot, tensor in optimizer.state[p].items()}
        optimizer.step()
        if step == 1:
            assert torch.equal(optimizer.state[p]["statistics.0.0"], before["statistics.0.0"])
    assert all(tensor.isfinite().all() for slot, tensor in optimizer.state[p].items() if slot != "momentum")


def test_sharded_roots_give_equal_updates():
    """Roots computed one matrix at a time or all at once are equal up to rounding.

    Not bitwise: on some processors LAPACK rounds by the alignment of a matrix. In double precision, rounding is too
    small to hide an error.
    """

    def one_matrix_at_a_time(work, *stacks):
        return torch.cat([work(*(stack[i : i + 1] for stack in stacks)) for i in range(len(stacks[0]))])

    ours, others = pair(SHAPES.values(), torch.float64)
    options = {"block_size": 8, "start_preconditioning_step": 1}
    train_both(
        ours,
        others,
        Shampoo(ours, 0.01, **options),
        Shampoo(others, 0.01, sharded_map=one_matrix_at_a_time, **options),
        4,
    )
    assert max(float((p - q).detach().abs().max()) for p, q in zip(ours, others, strict=True)) < 1e-9


def test_parameters_without_gradients_do_not_affect_others():
    """A parameter's statistics do not depend on which other parameters have gradients in a step."""
    ours, others = pair([(9, 8), (8, 8)])
    first, second = (Shampoo(each, 0.01, block_size=4, start_preconditioning_step=1) for each in (ours, others[:1]))
    for step in range(6):
        gradient = torch.randn_like(ours[0])
        ours[0].grad, others[0].grad = gradient, gradient.clone()
        ours[1].grad = torch.randn_like(ours[1]) if step % 3 else None
        first.step()
        second.step()
    assert torch.equal(ours[0], others[0])


@pytest.mark.parametrize("options", [{"graft_type": "adam"}, {"block_size": 0}, {"preconditioning_compute_steps": 0}])
def test_invalid_options_are_rejected(options):
    with pytest.raises(ValueError, match=r"graft_type 'adam' is none of|at least 1, got 0"):
        Shampoo([nn.Parameter(torch.zeros(2, 2))], 0.1, **options)
