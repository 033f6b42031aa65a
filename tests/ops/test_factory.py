"""Every optimizer, through one table: it learns in fp32 and bf16, decays as documented, and resumes bitwise equal."""

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

QUICK = [*FACTORIES, "lamb", "lars", "muon"]
NEED_OTHER_LIBRARIES = [name for name in timm.optim.list_optimizers() if name.startswith(("bnb", "fused"))]
ALL = [
    *QUICK,
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in list_optimizers()
        if name not in {*QUICK, *NEED_OTHER_LIBRARIES}
    ),
]
# Rates at which these descend within few steps, e.g. LARS, which scales updates by a trust coefficient of 0.001.
LR = {"lars": 3.0, "larc": 0.3, "nlars": 3.0, "nlarc": 0.3, "adadelta": 10.0, "sgd": 0.1, "adafactor": 0.1}
# Preconditioning from an early step on, or the short runs here would never reach it.
EARLY = {"shampoo": {"start_preconditioning_step": 3, "block_size": 8}, "soap": {"precondition_frequency": 2}}


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    body = nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 9, 1), nn.AdaptiveAvgPool2d(2)
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(36, 10))


def build_optimizer(name: str, model: nn.Module, weight_decay: float = 0.0, **options):
    return create_optimizer(name, model, LR.get(name, 0.01), weight_decay, options={**EARLY.get(name, {}), **options})


@pytest.mark.parametrize("name", ALL)
def test_optimizer_descends_a_quadratic(name):
    torch.manual_seed(0)
    model = nn.Linear(12, 10)
    target, curvature = torch.randn(10, 12), torch.logspace(0, -1, 12)
    optimizer, losses = build_optimizer(name, model), []
    for step in range(120):
        set_lr(optimizer, LR.get(name, 0.01), factor("cosine", step, 120, 10))
        optimizer.zero_grad()
        loss = (curvature * (model.weight - target) ** 2).mean() + model.bias.square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def distillation_losses(name: str, precision: str, steps: int = 24) -> list[float]:
    """Losses of a small student trained to match a random teacher."""
    teacher, student = network(1), network(2)
    lr = LR.get(name, 0.01)
    options = LoopOptions(
        steps, lr, lambda step: factor("linear", step, steps, 3), 1.0, 0, torch.device("cpu"), precision
    )
    generator = torch.Generator().manual_seed(0)
    crops = torch.rand(16, 3, 8, 8, generator=generator)
    targets = teacher(crops).detach() * 5

    def loss_of(_batch):
        return {"loss": kl(student(crops), targets).mean()}

    batch = Batch(crops, torch.zeros(16, dtype=torch.int64), 1.0)
    optimizer = build_optimizer(name, student, 1e-4)
    scaler = devices.loss_scaler(options.device, precision)
    return [losses["loss"].item() for _, losses in fit(options, student, optimizer, scaler, [batch] * steps, loss_of)]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_optimizer_trains_a_student(name, precision):
    """The schedule starts at 0, where optimizers that divide by the learning rate would give NaN."""
    losses = distillation_losses(name, precision)
    assert torch.tensor(losses).isfinite().all()
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("lr", [1e-3, 0.1])
def test_weight_decay_does_not_depend_on_the_learning_rate(name, lr):
    """With zero gradients only the decay remains, on kernels only: 0.01 times the schedule's factor."""
    model = network().double()
    before = {each: parameter.detach().clone() for each, parameter in model.named_parameters()}
    optimizer = create_optimizer(name, model, lr, 0.01, options=EARLY.get(name))
    remaining = 1.0
    for share in (0.5, 1.0, 0.0):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        set_lr(optimizer, lr, share)
        optimizer.step()
        remaining *= 1 - 0.01 * share
        if name.startswith("madgrad"):
            remaining = 0.9 * remaining + 0.1 * 0.995  # MADGRAD averages with the initial weights
    for each, parameter in model.named_parameters():
        expected = before[each] * (remaining if each in decayed_parameters(model) else 1)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-7, atol=1e-9, msg=each)


def train_on_random_gradients(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        set_lr(optimizer, 0.01, factor("quadratic", step, 20, 2))
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def assert_resumes(build, tmp_path) -> None:
    """Six steps, a checkpoint and five steps give bitwise the same weights and state as eleven steps."""
    uninterrupted, first, second = network(), network(), network(1)
    optimizer = build(uninterrupted)
    train_on_random_gradients(uninterrupted, optimizer, range(11))
    stopped = build(first)
    train_on_random_gradients(first, stopped, range(6))
    checkpoint.save(tmp_path, checkpoint.tensors_of(first, stopped), TrainState(step=6))
    resumed = build(second)
    checkpoint.restore(tmp_path, second, resumed)
    train_on_random_gradients(second, resumed, range(6, 11))
    for (name, one), other in zip(uninterrupted.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    one, other = optimizer_state_dict(uninterrupted, optimizer), optimizer_state_dict(second, resumed)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", ALL)
def test_resumed_optimizer_equals_uninterrupted_one(name, tmp_path):
    assert_resumes(lambda model: build_optimizer(name, model, 1e-3), tmp_path)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("shampoo", {"preconditioning_compute_steps": 4, "graft_type": "rmsprop-normalized"}),
        ("shampoo", {"start_preconditioning_step": 9}),
        ("sgd", {"nesterov": True}),
    ],
)
def test_resumed_optimizer_with_options_equals_uninterrupted_one(name, options, tmp_path):
    assert_resumes(lambda model: build_optimizer(name, model, 1e-3, **options), tmp_path)


def test_bf16_momentum_equals_its_equation(tmp_path):
    """Like optax's scale_by_adam with mu_dtype: the stored mean, β₁ and their product are rounded."""
    assert_resumes(lambda model: create_optimizer("adamw", model, 0.01, 1e-3, momentum_dtype="bf16"), tmp_path)
    torch.manual_seed(0)
    model = nn.Linear(5, 4, bias=False)
    optimizer = create_optimizer("adamw", model, 0.1, momentum_dtype="bf16")
    w, m, v = model.weight.detach().double(), torch.zeros(4, 5), torch.zeros(4, 5, dtype=torch.float64)
    for t in range(1, 6):
        g = torch.randn(4, 5)
        model.weight.grad = g.clone()
        optimizer.step()
        # 0.8984375 is 0.9 with the 8 binary digits of bf16.
        mean = (0.8984375 * m.float()).bfloat16().double() + 0.1 * g.double()
        v = 0.999 * v + 0.001 * g.double() ** 2
        w = w - 0.1 * (mean / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        m = optimizer.state[model.weight]["exp_avg"].clone()  # updated in place
        assert m.dtype == torch.bfloat16
        assert torch.equal(m, mean.bfloat16())
        torch.testing.assert_close(model.weight.detach().double(), w, rtol=1e-5, atol=1e-6)


def test_trust_ratio_applies_to_kernels_only():
    """LAMB's update of a kernel has the kernel's norm, with or without decay; that of a bias is Adam's."""
    model = network()
    before = copy.deepcopy(model.state_dict())
    optimizer = create_optimizer("lamb", model, 0.01)
    train_on_random_gradients(model, optimizer, range(2, 3))
    for name, parameter in model.named_parameters():
        moved = (parameter.detach() - before[name]).norm() / 0.01
        length = before[name].norm() if name in decayed_parameters(model) else parameter.numel() ** 0.5
        torch.testing.assert_close(moved, torch.as_tensor(length), rtol=1e-2, atol=1e-2, msg=name)


def test_optimizers_do_not_clip_gradients_themselves():
    """timm's LAMB would clip again, to a norm of 1, which would show in its mean of gradients."""
    model = network()
    optimizer = create_optimizer("lamb", model, 0.01)
    train_on_random_gradients(model, optimizer, range(1))
    for parameter in model.parameters():
        torch.testing.assert_close(optimizer.state[parameter]["exp_avg"], 0.1 * parameter.grad)


@pytest.mark.parametrize("name", REFUSED)
def test_optimizers_that_cannot_resume_are_rejected(name):
    with pytest.raises(InputError, match=rf"optimizer {name} cannot be used: it (draws|differentiates)"):
        create_optimizer(name, network(), 0.1)


@pytest.mark.parametrize("name", NEED_OTHER_LIBRARIES)
def test_missing_optimizer_library_is_reported(name):
    if importlib.util.find_spec("bitsandbytes" if name.startswith("bnb") else "apex"):
        pytest.skip("the library is installed")
    with pytest.raises(InputError, match=f"optimizer {name}: "):
        create_optimizer(name, network(), 0.1)


@pytest.mark.parametrize(
    ("name", "options", "message"),
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
        *[(name, {"weight_decay": 0.1}, "weight_decay is not among its options") for name in QUICK],
        (
            "sgd",
            {"momentum": 0.8},
            "optimizer sgd: momentum is not among its options; it is set by an option of the run",
        ),
    ],
)
def test_wrong_names_and_options_are_rejected(name, options, message):
    with pytest.raises(InputError, match=message):
        create_optimizer(name, network(), 0.1, options=options)


def test_wrong_options_leave_no_folder(tmp_path):
    options = {"data": "fashion-mini", "student": "fashion-mini-student", "batch": 8, "threads": 1, "steps": 2}
    with pytest.raises(InputError, match=r"optimizer lamb: it fails with betas=0\.9"):
        funmatch.train(out=tmp_path / "run", optimizer="lamb", optimizer_kwargs=("betas=0.9",), **options)
    assert not (tmp_path / "run").exists()


def test_checking_options_changes_neither_model_nor_rng():
    """A trial step draws nothing from torch's generator and leaves the model as it was."""
    model = network()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    optimizer = create_optimizer("lamb", model, 0.01, 0.1, options={"eps": 1e-5})
    assert not optimizer.state
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one, other) for one, other in zip(before.values(), model.state_dict().values(), strict=True))


def test_bf16_momentum_is_for_adamw_only():
    with pytest.raises(InputError, match="momentum_dtype bf16 belongs to optimizer adamw, not sgd"):
        create_optimizer("sgd", network(), 0.1, momentum_dtype="bf16")


def test_optimizer_state_round_trip():
    model = nn.Linear(3, 2)
    slots = {"n": 3, "x": 0.1 + 0.2, "on": True, "none": None, "many": [[], torch.arange(3), [torch.eye(2), 7]]}
    first, second = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    first.state[model.weight] = dict(slots)
    first.param_groups[0]["step"] = torch.tensor(5.0)
    load_optimizer_state_(model, second, optimizer_state_dict(model, first))
    loaded = second.state[model.weight]
    assert {name: loaded[name] for name in ("n", "x", "on", "none")} == {
        name: slots[name] for name in ("n", "x", "on", "none")
    }
    assert loaded["many"][0] == []
    assert torch.equal(loaded["many"][1], torch.arange(3))
    assert torch.equal(loaded["many"][2][0], torch.eye(2))
    assert loaded["many"][2][1] == 7
    assert second.param_groups[0]["step"] == 5
