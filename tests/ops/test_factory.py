"""Every optimizer through one table: it learns, also in bf16; its decay is its own; it resumes with the same bits."""

import copy
import importlib.util

import pytest
import timm.optim
import torch
from torch import nn

import funmatch
from funmatch.data.loader import Batch
from funmatch.errors import InputError
from funmatch.ops.distances import kl
from funmatch.ops.optim.factory import FACTORIES, REFUSED, create_optimizer, list_optimizers
from funmatch.ops.optim.schedules import factor
from funmatch.ops.optim.state import load_optimizer_state_, optimizer_state_dict
from funmatch.ops.optim.updates import decayed_parameters
from funmatch.runtime import devices
from funmatch.training.loop import LoopOptions, fit, set_lr
from funmatch.training.run import checkpoint
from funmatch.training.run.state import TrainState

CHOSEN = [*FACTORIES, "lamb", "lars", "muon"]
ELSEWHERE = [name for name in timm.optim.list_optimizers() if name.startswith(("bnb", "fused"))]
ALL = [
    *CHOSEN,
    *(pytest.param(name, marks=pytest.mark.slow) for name in list_optimizers() if name not in {*CHOSEN, *ELSEWHERE}),
]
LR = {"lars": 3.0, "larc": 0.3, "nlars": 3.0, "nlarc": 0.3, "adadelta": 10.0, "sgd": 0.1, "adafactor": 0.1}
EARLY = {"shampoo": {"start_preconditioning_step": 3, "block_size": 8}, "soap": {"precondition_frequency": 2}}


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    body = nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 9, 1), nn.AdaptiveAvgPool2d(2)
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(36, 10))


def made(name: str, model: nn.Module, weight_decay: float = 0.0, **options):
    return create_optimizer(name, model, LR.get(name, 0.01), weight_decay, options={**EARLY.get(name, {}), **options})


@pytest.mark.parametrize("name", ALL)
def test_it_descends_a_quadratic(name):
    torch.manual_seed(0)
    model = nn.Linear(12, 10)
    wanted, curvature = torch.randn(10, 12), torch.logspace(0, -1, 12)
    optimizer, losses = made(name, model), []
    for step in range(120):
        set_lr(optimizer, LR.get(name, 0.01), factor("cosine", step, 120, 10))
        optimizer.zero_grad()
        loss = (curvature * (model.weight - wanted) ** 2).mean() + model.bias.square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def distilled(name: str, precision: str, steps: int = 24) -> list[float]:
    """The losses of a small student that learns from a random teacher."""
    teacher, student = network(1), network(2)
    lr = LR.get(name, 0.01)
    course = LoopOptions(
        steps, lr, lambda step: factor("linear", step, steps, 3), 1.0, 0, torch.device("cpu"), precision
    )
    generator = torch.Generator().manual_seed(0)
    crops = torch.rand(16, 3, 8, 8, generator=generator)
    targets = teacher(crops).detach() * 5

    def loss_of(_batch):
        return {"loss": kl(student(crops), targets).mean()}

    batch = Batch(crops, torch.zeros(16, dtype=torch.int64), 1.0)
    optimizer = made(name, student, 1e-4)
    scaler = devices.loss_scaler(course.device, precision)
    return [losses["loss"].item() for _, losses in fit(course, student, optimizer, scaler, [batch] * steps, loss_of)]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_distils(name, precision):
    """The schedule begins at 0, where some optimizers divide by the learning rate."""
    losses = distilled(name, precision)
    assert torch.tensor(losses).isfinite().all()
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("lr", [1e-3, 0.1])
def test_its_decay_does_not_depend_on_the_learning_rate(name, lr):
    """Where gradients are zero only the decay is left, of kernels alone: 0.01 times the schedule's factor."""
    model = network().double()
    before = {each: parameter.detach().clone() for each, parameter in model.named_parameters()}
    optimizer = create_optimizer(name, model, lr, 0.01, options=EARLY.get(name))
    left = 1.0
    for share in (0.5, 1.0, 0.0):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        set_lr(optimizer, lr, share)
        optimizer.step()
        left *= 1 - 0.01 * share
        if name.startswith("madgrad"):
            left = 0.9 * left + 0.1 * 0.995  # its mean with the weights that it first saw
    for each, parameter in model.named_parameters():
        expected = before[each] * (left if each in decayed_parameters(model) else 1)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-7, atol=1e-9, msg=each)


def taught(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        set_lr(optimizer, 0.01, factor("quadratic", step, 20, 2))
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def assert_resumes(build, tmp_path) -> None:
    """Eleven steps are six and, from a checkpoint, five, to the last bit of weights and of all that is remembered."""
    whole, first, second = network(), network(), network(1)
    optimizer = build(whole)
    taught(whole, optimizer, range(11))
    stopped = build(first)
    taught(first, stopped, range(6))
    checkpoint.save(tmp_path, checkpoint.tensors_of(first, stopped), TrainState(step=6))
    resumed = build(second)
    checkpoint.restore(tmp_path, second, resumed)
    taught(second, resumed, range(6, 11))
    for (name, one), other in zip(whole.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    one, other = optimizer_state_dict(whole, optimizer), optimizer_state_dict(second, resumed)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", ALL)
def test_it_resumes_with_the_same_bits(name, tmp_path):
    assert_resumes(lambda model: made(name, model, 1e-3), tmp_path)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("shampoo", {"preconditioning_compute_steps": 4, "graft_type": "rmsprop-normalized"}),
        ("shampoo", {"start_preconditioning_step": 9}),
        ("sgd", {"nesterov": True}),
    ],
)
def test_options_resume_too(name, options, tmp_path):
    assert_resumes(lambda model: made(name, model, 1e-3, **options), tmp_path)


def test_the_mean_of_gradients_in_bf16(tmp_path):
    """As optax's scale_by_adam with mu_dtype: the update takes the mean as it is, and what is kept is rounded."""
    assert_resumes(lambda model: create_optimizer("adamw", model, 0.01, 1e-3, momentum_dtype="bf16"), tmp_path)
    torch.manual_seed(0)
    model = nn.Linear(5, 4, bias=False)
    optimizer = create_optimizer("adamw", model, 0.1, momentum_dtype="bf16")
    w, m, v = model.weight.detach().double(), torch.zeros(4, 5), torch.zeros(4, 5, dtype=torch.float64)
    for t in range(1, 6):
        g = torch.randn(4, 5)
        model.weight.grad = g.clone()
        optimizer.step()
        mean = 0.9 * m.double() + 0.1 * g.double()
        v = 0.999 * v + 0.001 * g.double() ** 2
        w = w - 0.1 * (mean / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        m = optimizer.state[model.weight]["exp_avg"]
        assert m.dtype == torch.bfloat16
        torch.testing.assert_close(m.double(), mean, rtol=2**-8, atol=0)
        torch.testing.assert_close(model.weight.detach().double(), w, rtol=1e-5, atol=1e-6)


def test_trust_ratios_look_at_kernels_only():
    """LAMB's update of a kernel is as long as the kernel, whether it decays or not; that of a bias is Adam's."""
    model = network()
    before = copy.deepcopy(model.state_dict())
    optimizer = create_optimizer("lamb", model, 0.01)
    taught(model, optimizer, range(2, 3))
    for name, parameter in model.named_parameters():
        moved = (parameter.detach() - before[name]).norm() / 0.01
        length = before[name].norm() if name in decayed_parameters(model) else parameter.numel() ** 0.5
        torch.testing.assert_close(moved, torch.as_tensor(length), rtol=1e-2, atol=1e-2, msg=name)


def test_gradients_are_clipped_by_the_loop_alone():
    """LAMB would clip them once more, to a norm of 1; so what it remembers of them would be shorter."""
    model = network()
    optimizer = create_optimizer("lamb", model, 0.01)
    taught(model, optimizer, range(1))
    for parameter in model.parameters():
        torch.testing.assert_close(optimizer.state[parameter]["exp_avg"], 0.1 * parameter.grad)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_resumed_is_refused(name):
    with pytest.raises(InputError, match=rf"optimizer {name} cannot be used: it (draws|differentiates)"):
        create_optimizer(name, network(), 0.1)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_library_that_is_missing_is_told(name):
    if importlib.util.find_spec("bitsandbytes" if name.startswith("bnb") else "apex"):
        pytest.skip("it is here")
    with pytest.raises(InputError, match=f"optimizer {name}: "):
        create_optimizer(name, network(), 0.1)


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("adamv", {}, "did you mean .*'adamw'"),
        ("shampo", {}, "'shampoo'"),
        ("shampoo", {"blocksize": 3}, "blocksize"),
        ("shampoo", {"graft_type": "adam"}, "graft_type 'adam' is none of"),
        ("shampoo", {"betas": (0.9, 1.1)}, r"betas must lie in .* got \(0.9, 1.1\)"),
        ("shampoo", {"betas": 0.9}, r"optimizer shampoo: it fails with betas=0.9: "),
        ("soap", {"beta": 3}, "optimizer soap: unknown option 'beta'; did you mean 'betas'"),
        ("lamb", {"beta": 3}, "optimizer lamb: unknown option 'beta'; did you mean 'betas'"),
        ("lamb", {"betas": 0.9, "eps": 1e-6}, r"optimizer lamb: it fails with betas=0.9, eps=1e-06: "),
        ("lars", {"betas": (0.9, 0.99)}, "optimizer lars: unknown option 'betas'"),
        ("lars", {"eps": "small"}, "optimizer lars: it fails with eps='small': "),
        ("muon", {"layer_decay": 0.9}, "optimizer muon: unknown option 'layer_decay'"),
        ("adamw", {"eps": -1.0}, "epsilon"),
        ("adamw", {"betas": (0.9,)}, r"optimizer adamw: it fails with betas=\(0.9,\): "),
        ("adamw", {"foreach": True}, "optimizer adamw: it fails with foreach=True: "),
        *[(name, {"weight_decay": 0.1}, "weight_decay is not among its options") for name in CHOSEN],
        (
            "sgd",
            {"momentum": 0.8},
            "optimizer sgd: momentum is not among its options; it is set by an option of the run",
        ),
    ],
)
def test_wrong_names_and_options_are_told(name, options, told):
    with pytest.raises(InputError, match=told):
        create_optimizer(name, network(), 0.1, options=options)


def test_wrong_options_leave_no_folder(tmp_path):
    given = {"data": "fashion-mini", "student": "fashion-mini-student", "batch": 8, "threads": 1, "steps": 2}
    with pytest.raises(InputError, match=r"optimizer lamb: it fails with betas=0\.9"):
        funmatch.train(out=tmp_path / "run", optimizer="lamb", optimizer_kwargs=("betas=0.9",), **given)
    assert not (tmp_path / "run").exists()


def test_options_are_tried_without_a_trace():
    """Nothing random is drawn, and the model is what it was."""
    model = network()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    optimizer = create_optimizer("lamb", model, 0.01, 0.1, options={"eps": 1e-5})
    assert not optimizer.state
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one, other) for one, other in zip(before.values(), model.state_dict().values(), strict=True))


def test_only_adamw_keeps_a_mean_in_bf16():
    with pytest.raises(InputError, match="momentum_dtype bf16 belongs to optimizer adamw, not sgd"):
        create_optimizer("sgd", network(), 0.1, momentum_dtype="bf16")


def test_what_an_optimizer_remembers_comes_back_as_it_was():
    model = nn.Linear(3, 2)
    kept = {"n": 3, "x": 0.1 + 0.2, "on": True, "none": None, "many": [[], torch.arange(3), [torch.eye(2), 7]]}
    first, second = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    first.state[model.weight] = dict(kept)
    first.param_groups[0]["step"] = torch.tensor(5.0)
    load_optimizer_state_(model, second, optimizer_state_dict(model, first))
    again = second.state[model.weight]
    assert {name: again[name] for name in ("n", "x", "on", "none")} == {
        name: kept[name] for name in ("n", "x", "on", "none")
    }
    assert again["many"][0] == []
    assert torch.equal(again["many"][1], torch.arange(3))
    assert torch.equal(again["many"][2][0], torch.eye(2))
    assert again["many"][2][1] == 7
    assert second.param_groups[0]["step"] == 5
