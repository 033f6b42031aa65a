"""Creates optimizers by name, all with weight decay that applies to kernels only and not through the learning rate.

Whatever the optimizer, a step is Δw = −s·(lr·update + weight_decay·w), with s the schedule's factor: the user's number
is the share of a kernel that is lost in a step at the peak of the schedule. Kernels decay first. So an update that
depends on its kernel (the trust ratios of LAMB and LARS, the projections of AdamP) sees what is left of it, as in
timm's decoupled optimizers; and those of timm that differ only in how they decay (`lamb`, `lambw`) are the same here.
MADGRAD averages what is left with a point computed from the first weights: with it, kernels decay towards them.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from funmatch.errors import InputError, first_line, unknown
from funmatch.ops.optim.adamw import AdamW
from funmatch.ops.optim.shampoo import Shampoo
from funmatch.ops.optim.shampoo_blocks import ShardedMap, map_locally
from funmatch.ops.optim.updates import decayed_parameters
from funmatch.runtime.functions import find_function, is_function_name

Groups = list[dict[str, Any]]
TWICE = "it differentiates the gradient once more, which the training loop does not prepare"
DRAWS = "it draws from a generator of its own, so a resumed run would not be bitwise identical"
REFUSED = {"adahessian": TWICE, "kron": DRAWS, "kronc": DRAWS, "kronw": DRAWS}
"""Optimizers of timm that cannot be used, and why."""
RESERVED = {"params", "lr", "weight_decay", "momentum", "sharded_map"}
"""Arguments of optimizers that are not passed among their options."""


def list_optimizers() -> list[str]:
    """Returns the names that `create_optimizer` accepts: those of `FACTORIES` and timm's."""
    import timm.optim  # here, since it imports torch's distributed tensors: as long as all the rest of a run takes

    return sorted({*FACTORIES, *map(str, timm.optim.list_optimizers())} - REFUSED.keys())


def check_optimizer_name(name: str) -> None:
    """Checks that an optimizer has this name and can be used.

    Raises:
        InputError: it has not, or cannot.
    """
    if is_function_name(name):
        return
    if name in REFUSED:
        raise InputError(f"optimizer {name} cannot be used: {REFUSED[name]}")
    # timm's are listed only for a name that is not ours, since that imports them all.
    if name not in FACTORIES and name not in list_optimizers():
        raise unknown("optimizer", name, list_optimizers())


def resolve_momentum(name: str, momentum: float | None) -> float:
    """Returns the momentum as given, or the optimizer's default: 0.95 for Muon, 0.9 for others.

    Raises:
        InputError: no optimizer has this name.
    """
    check_optimizer_name(name)
    default = 0.95 if "muon" in name else 0.9
    return default if momentum is None else momentum


def create_optimizer(
    name: str,
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    *,
    momentum: float | None = None,
    momentum_dtype: str = "fp32",
    options: Mapping[str, Any] | None = None,
    sharded_map: ShardedMap = map_locally,
) -> torch.optim.Optimizer:
    """Creates the optimizer of a name for a model's trainable parameters.

    Args:
        name: one of `list_optimizers()`, or that of a user's function, which decides all but the schedule.
        model: its parameters with `requires_grad` are trained.
        lr: learning rate at the peak of the schedule, > 0.
        weight_decay: share of a kernel that is lost in a step at the peak of the schedule.
        momentum: of the optimizers that have an argument of this name, and of Shampoo; see `resolve_momentum`.
        momentum_dtype: dtype in which AdamW keeps the mean of its gradients, fp32 or bf16.
        options: further arguments of the optimizer, e.g. `eps`.
        sharded_map: distributes the computation of Shampoo's roots over processes.

    Raises:
        InputError: there is no such optimizer or option, or a library that it needs is missing.
    """
    if is_function_name(name):
        return call_function(name, model)
    momentum = resolve_momentum(name, momentum)
    if momentum_dtype != "fp32" and name != "adamw":
        raise InputError(f"momentum_dtype {momentum_dtype} belongs to optimizer adamw, not {name}")
    own = {"adamw": {"dtype": momentum_dtype}, "shampoo": {"sharded_map": sharded_map}}.get(name, {})
    # Checked and tried before anything is created: a wrong option is reported before the run has a folder.
    options = dict(options or {})
    try:
        _check_options(name, options)
        if options:
            _try_options(name, model, lr, momentum, options)
        return _create(name, model, lr, weight_decay, momentum, {**own, **options})
    except (TypeError, ValueError, ImportError, AssertionError) as error:  # timm asserts that its libraries are present
        raise InputError(f"optimizer {name}: {error}") from None


def call_function(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """Creates the optimizer of a user's function for a model's trainable parameters.

    Args:
        name: of the function: a list of parameters to an optimizer, which decays weights itself.

    Raises:
        InputError: it fails, or returns something else.
    """
    function = find_function(name, "optimizer")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        optimizer = function(parameters)
    except Exception as error:  # the user's code can raise anything
        raise InputError(f"optimizer {name} fails: {first_line(error)}") from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InputError(f"optimizer {name} returned {type(optimizer).__name__}, expected a torch.optim.Optimizer")
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if held - {*map(id, parameters)}:
        raise InputError(f"optimizer {name} holds other parameters than those it was given")
    return optimizer


def _create(
    name: str, model: nn.Module, lr: float, weight_decay: float, momentum: float, options: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """Creates the optimizer, with the weight decay attached to it."""
    decaying, others = _groups(model, name)
    # torch multiplies AdamW's decay by the learning rate, so it gets the quotient: lr · (weight_decay / lr).
    if name == "adamw":
        decaying["weight_decay"] = weight_decay / lr
    factory = FACTORIES.get(name) or partial(_from_timm, name)
    optimizer = factory([group for group in (decaying, others) if group["params"]], lr, momentum, **options)
    if name != "adamw":
        optimizer.register_step_pre_hook(partial(_decay_, kernels=decaying["params"], share=weight_decay / lr))
    return optimizer


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    """Checks that an optimizer has these options.

    Raises:
        InputError: it has not, or the option is one of `RESERVED`.
    """
    # Needed, since some optimizers take `**kwargs` and would ignore a misspelt option.
    known = inspect.signature(_class_of(name)).parameters.keys() - RESERVED
    for option in options:
        if option in RESERVED:
            raise InputError(f"{option} is not among its options; it is set by an option of the run")
        if option not in known:
            raise unknown("option", option, known)


def _try_options(name: str, model: nn.Module, lr: float, momentum: float, options: Mapping[str, Any]) -> None:
    """Takes a step on a tiny layer, since some optimizers find out only then that an option has a wrong value.

    Raises:
        InputError: the step fails.
    """
    # Initialised with ones by hand: torch's initialisation would draw random numbers and so change the run.
    layer = nn.utils.skip_init(nn.Linear, 2, 2, device=next(model.parameters()).device)
    for parameter in layer.parameters():
        nn.init.ones_(parameter)
        parameter.grad = torch.ones_like(parameter)
    try:
        _create(name, layer, lr, 0.0, momentum, options).step()
    except Exception as error:  # a wrong value can raise anything
        given = ", ".join(f"{option}={value!r}" for option, value in options.items())
        raise InputError(f"it fails with {given}: {first_line(error)}") from None


def _groups(model: nn.Module, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the groups of the trainable kernels and of the other trainable parameters."""
    kernels = decayed_parameters(model)
    # In the model's order, on which the names of groups in a checkpoint and the bits of sums depend.
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    # No weight decay of the optimizer's own; for all but AdamW `_decay_` applies it.
    first: dict[str, Any] = {"params": [p for name, p in named if name in kernels], "weight_decay": 0.0}
    second: dict[str, Any] = {"params": [p for name, p in named if name not in kernels], "weight_decay": 0.0}
    # Without it timm applies the trust ratio only to groups whose own weight decay is not 0.
    if any(word in name for word in ("lamb", "lars", "larc")):
        first["always_adapt"] = True
    # AdamW, also for embeddings and other matrices that are not kernels; Muon would orthogonalize them.
    if "muon" in name:
        second["use_fallback"] = True
    return first, second


def _decay_(
    optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any, *, kernels: Sequence[Tensor], share: float
) -> None:
    """Decays the kernels that are about to be updated by `share` times the current learning rate."""
    updated = [kernel for kernel in kernels if kernel.grad is not None]
    if share and updated:
        with torch.no_grad():
            # The schedule has set the group's rate to lr · s, and share is weight_decay / lr: 1 − s · weight_decay.
            torch._foreach_mul_(updated, 1 - optimizer.param_groups[0]["lr"] * share)


def _adamw(groups: Groups, lr: float, _momentum: float, dtype: str = "fp32", **options: Any) -> torch.optim.Optimizer:
    # Fused, since it leaves weights and decay alone in a step whose fp16 gradients overflowed.
    fused = options.pop("fused", True)
    return (AdamW if dtype == "bf16" else torch.optim.AdamW)(groups, lr=lr, fused=fused, **options)


def _sgd(groups: Groups, lr: float, momentum: float, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, **options)


def _shampoo(groups: Groups, lr: float, momentum: float, **options: Any) -> torch.optim.Optimizer:
    betas = options.pop("betas", (momentum, 0.999))
    return Shampoo(groups, lr, betas, **options)


def _soap(groups: Groups, lr: float, _momentum: float, **options: Any) -> torch.optim.Optimizer:
    return _class_of("soap")(groups, lr=lr, weight_decay=0.0, **options)


def _class_of(name: str) -> Callable[..., torch.optim.Optimizer]:
    """Returns the class of an optimizer.

    Raises:
        ImportError: its library is missing; timm raises others too.
    """
    if name == "soap":
        try:
            from pytorch_optimizer import SOAP
        except ImportError:
            raise ImportError("it is pytorch-optimizer's; pip install 'funmatch[soap]'") from None
        return SOAP
    ours = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD, "shampoo": Shampoo}
    if name in ours:
        return ours[name]
    from timm.optim import get_optimizer_class

    return get_optimizer_class(name, bind_defaults=False)


def _from_timm(name: str, groups: Groups, lr: float, momentum: float, **options: Any) -> torch.optim.Optimizer:
    from timm.optim import create_optimizer_v2

    # timm's LAMB clips to a norm of 1 by default; the loop clips all gradients itself, if the user wants it.
    if "lamb" in name:
        options = {"max_grad_norm": None, **options}
    return create_optimizer_v2(groups, name, lr=lr, weight_decay=0.0, momentum=momentum, **options)


# timm has an `adamw` and an `sgd` too, but the one is not fused and the other Nesterov's.
FACTORIES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "sgd": _sgd,
    "shampoo": _shampoo,
    "soap": _soap,
}
"""Optimizers that are not created by timm: (groups, lr, momentum, options) to the optimizer."""
