"""Optimizers by name, all with weight decay on kernels only that does not depend on the learning rate.

Whatever the optimizer, a step is Δw = −s·(lr·update + weight_decay·w), with s the schedule's factor: the user's number
is the share of a kernel that is lost in a step at the top of the schedule. Kernels decay first. So an update that looks
at its kernel (the trust ratios of LAMB and LARS, the projections of AdamP) sees what is left of it, as in timm's
decoupled optimizers; and those of timm that differ only in how they decay (`lamb`, `lambw`) are the same here. MADGRAD
takes the mean of what is left and a point that it reckons from the first weights: with it, kernels decay towards them.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import timm.optim
import torch
from timm.optim import create_optimizer_v2, get_optimizer_class
from torch import Tensor, nn

from funmatch.errors import InputError, first_line, unknown
from funmatch.ops.optim.shampoo import Shampoo
from funmatch.ops.optim.shampoo_blocks import ShardedMap, map_locally
from funmatch.ops.optim.updates import decayed_parameters

Groups = list[dict[str, Any]]
TWICE = "it differentiates the gradient once more, which the loop here does not prepare"
DRAWS = "it draws from a generator of its own, so that a run that was stopped would not end with the same bits"
REFUSED = {"adahessian": TWICE, "kron": DRAWS, "kronc": DRAWS, "kronw": DRAWS}
"""The optimizers of timm that cannot be used, and why."""
RESERVED = {"params", "lr", "weight_decay", "momentum", "share"}
"""What an optimizer is given otherwise than as an option."""


def list_optimizers() -> list[str]:
    """All optimizers that `make` knows: those of this module, and timm's."""
    return sorted({*FACTORIES, *map(str, timm.optim.list_optimizers())} - REFUSED.keys())


def check_optimizer_name(name: str) -> None:
    """Raises an `InputError` where no optimizer has this name."""
    if name in REFUSED:
        raise InputError(f"optimizer {name} cannot be used: {REFUSED[name]}")
    if name not in list_optimizers():
        raise unknown("optimizer", name, list_optimizers())


def resolve_momentum(name: str, asked: float | None) -> float:
    """The momentum that was asked for, or is usual; an `InputError` where no optimizer has this name."""
    check_optimizer_name(name)
    usual = 0.95 if "muon" in name else 0.9
    return usual if asked is None else asked


def create_optimizer(
    name: str,
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    *,
    momentum: float | None = None,
    momentum_dtype: str = "fp32",
    options: Mapping[str, Any] | None = None,
    share: ShardedMap = map_locally,
) -> torch.optim.Optimizer:
    """The optimizer with this name, of the parameters of a model that are taught.

    Args:
        name: one of `names()`.
        model: whose parameters with `requires_grad` are taught.
        lr: at the top of the schedule, > 0.
        weight_decay: the share of a kernel that is lost in a step at the top of the schedule.
        momentum: of those that have one of this name, and Shampoo; by default 0.9, Muon's 0.95.
        momentum_dtype: in which AdamW keeps the mean of its gradients, fp32 or bf16.
        options: more for the optimizer, e.g. `eps`.
        share: how the work on Shampoo's roots is shared out.

    Raises:
        InputError: no such optimizer or option, or a library that it needs is not here.
    """
    momentum = resolve_momentum(name, momentum)
    if momentum_dtype != "fp32" and name != "adamw":
        raise InputError(f"momentum_dtype {momentum_dtype} belongs to optimizer adamw, not {name}")
    own = {"adamw": {"dtype": momentum_dtype}, "shampoo": {"share": share}}.get(name, {})
    options = dict(options or {})
    try:
        _check_options(name, options)
        if options:
            _try_out(name, model, lr, momentum, options)
        return _made(name, model, lr, weight_decay, momentum, {**own, **options})
    except (TypeError, ValueError, ImportError, AssertionError) as error:  # timm asserts that its libraries are here
        raise InputError(f"optimizer {name}: {error}") from None


def _made(
    name: str, model: nn.Module, lr: float, weight_decay: float, momentum: float, options: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """The optimizer, with the weight decay hung on it."""
    decaying, others = _groups(model, name)
    if name == "adamw":
        decaying["weight_decay"] = weight_decay / lr
    maker = FACTORIES.get(name) or partial(_of_timm, name)
    optimizer = maker([group for group in (decaying, others) if group["params"]], lr, momentum, **options)
    if name != "adamw":
        optimizer.register_step_pre_hook(partial(_decay_, kernels=decaying["params"], share=weight_decay / lr))
    return optimizer


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raises an `InputError` where an optimizer has no such option, or we a knob for it: else some are passed over."""
    known = inspect.signature(_class_of(name)).parameters.keys() - RESERVED
    for option in options:
        if option in RESERVED:
            raise InputError(f"{option} is not among its options: it has a knob of its own")
        if option not in known:
            raise unknown("option", option, known)


def _try_out(name: str, model: nn.Module, lr: float, momentum: float, options: Mapping[str, Any]) -> None:
    """Raises an `InputError` where an optimizer cannot work with its options, which some find out at the first step."""
    small = nn.utils.skip_init(nn.Linear, 2, 2, device=next(model.parameters()).device)  # nothing random is drawn
    for parameter in small.parameters():
        nn.init.ones_(parameter)
        parameter.grad = torch.ones_like(parameter)
    try:
        _made(name, small, lr, 0.0, momentum, options).step()
    except Exception as error:  # whatever it comes to
        given = ", ".join(f"{option}={value!r}" for option, value in options.items())
        raise InputError(f"it cannot work with {given}: {first_line(error)}") from None


def _groups(model: nn.Module, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The kernels that are taught, and the other parameters; timm's optimizers have no weight decay of their own."""
    decaying = decayed_parameters(model)
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    first: dict[str, Any] = {"params": [p for name, p in named if name in decaying], "weight_decay": 0.0}
    second: dict[str, Any] = {"params": [p for name, p in named if name not in decaying], "weight_decay": 0.0}
    if any(word in name for word in ("lamb", "lars", "larc")):
        first["always_adapt"] = True  # else their trust ratios would count with weight decay only
    if "muon" in name:
        second["use_fallback"] = True  # AdamW, also for embeddings and whatever else is no kernel
    return first, second


def _decay_(
    optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any, *, kernels: Sequence[Tensor], share: float
) -> None:
    """Takes from the kernels that are about to be updated what they lose, a share of the learning rate."""
    updated = [kernel for kernel in kernels if kernel.grad is not None]
    if share and updated:
        with torch.no_grad():
            torch._foreach_mul_(updated, 1 - optimizer.param_groups[0]["lr"] * share)


class AdamW(torch.optim.AdamW):
    """torch's AdamW, which multiplies its decay by the learning rate, with the mean of the gradients kept in bf16.

    It is rounded only when it is put away, as optax's `mu_dtype`, which the paper's code sets.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update."""
        self._keep(torch.float32)
        loss = super().step(closure)
        self._keep(torch.bfloat16)
        return loss

    def _keep(self, dtype: torch.dtype) -> None:
        for slots in self.state.values():
            slots["exp_avg"] = slots["exp_avg"].to(dtype)


def _adamw(groups: Groups, lr: float, _momentum: float, dtype: str = "fp32", **options: Any) -> torch.optim.Optimizer:
    fused = options.pop("fused", True)  # it leaves weights and decay alone where gradients in fp16 overflowed
    return (AdamW if dtype == "bf16" else torch.optim.AdamW)(groups, lr=lr, fused=fused, **options)


def _sgd(groups: Groups, lr: float, momentum: float, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, **options)


def _shampoo(groups: Groups, lr: float, momentum: float, **options: Any) -> torch.optim.Optimizer:
    betas = options.pop("betas", (momentum, 0.999))
    return Shampoo(groups, lr, betas, **options)


def _soap(groups: Groups, lr: float, _momentum: float, **options: Any) -> torch.optim.Optimizer:
    return _class_of("soap")(groups, lr=lr, weight_decay=0.0, **options)


def _class_of(name: str) -> Callable[..., torch.optim.Optimizer]:
    """What an optimizer is an instance of; raises as its library does where that is not here."""
    if name == "soap":
        try:
            from pytorch_optimizer import SOAP
        except ImportError:
            raise ImportError("it is pytorch-optimizer's; pip install 'funmatch[soap]'") from None
        return SOAP
    ours = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD, "shampoo": Shampoo}
    return ours.get(name) or get_optimizer_class(name, bind_defaults=False)


def _of_timm(name: str, groups: Groups, lr: float, momentum: float, **options: Any) -> torch.optim.Optimizer:
    if "lamb" in name:
        options = {"max_grad_norm": None, **options}  # the loop clips all gradients, if a person wants it
    return create_optimizer_v2(groups, name, lr=lr, weight_decay=0.0, momentum=momentum, **options)


FACTORIES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "sgd": _sgd,
    "shampoo": _shampoo,
    "soap": _soap,
}
"""Those that are not timm's, or not as timm has them: its `adamw` is not fused, its `sgd` is Nesterov's."""
