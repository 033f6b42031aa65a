"""Options for the optimizer and the learning-rate schedule."""

from typing import Annotated, Any, Literal

from funmatch.config.metadata import Changes, Group, Inherit, Opt
from funmatch.config.options import Options
from funmatch.config.values import Pairs
from funmatch.runtime.functions import is_function_name

STUDENT = Changes.STUDENT
LR = 3e-3
"""Learning rate at the top of the schedule."""
FINETUNE_LR = 1e-4
"""The same for fine-tuning with another optimizer than SGD, for which BiT-HyperRule has one."""
WARMUP_STEPS, WARMUP_SHARE = 1500, 10
"""Length of the warm-up, at most one of so many parts of the run."""
Schedule = Literal["cosine", "linear", "quadratic", "wsd", "staircase", "constant"]


class Optimizer(Options):
    """How gradients become updates."""

    # Replaces the options below: a recipe's arguments and momentum do not fit another optimizer.
    optimizer: Annotated[
        str,
        Opt(group=Group.OPTIMIZER, changes=STUDENT, aliases=("--opt",), metavar="NAME", function=True,
            replaces=("optimizer_kwargs", "momentum", "momentum_dtype")),
    ] = "adamw"  # fmt: skip
    """Optimizer: adamw, sgd, lamb, lars, muon, shampoo, soap, any of timm's, or package.module:function of the list of
    parameters."""
    optimizer_kwargs: Annotated[
        Pairs, Opt(group=Group.OPTIMIZER, changes=STUDENT, usual="none", metavar="KEY=VALUE …")
    ] = ()
    """Arguments for the optimizer, e.g. eps=1e-6 or, for Shampoo, block_size=128 graft_type=rmsprop."""
    momentum: Annotated[
        float | None,
        Opt(group=Group.OPTIMIZER, changes=STUDENT, at_least=0, below=1, usual="0.9; for muon 0.95"),
    ] = None
    """Momentum, or AdamW's first beta, of optimizers that have one."""
    momentum_dtype: Annotated[Literal["fp32", "bf16"], Opt(group=Group.OPTIMIZER, changes=STUDENT)] = "fp32"
    """Data type in which AdamW stores the mean of its gradients; the paper's code uses bf16."""
    # None, since BiT-HyperRule has a default of its own, by optimizer and batch.
    lr: Annotated[
        float | None,
        Opt(group=Group.OPTIMIZER, changes=STUDENT, inherit=Inherit.NEVER, above=0, usual=LR, essential=True),
    ] = None
    """Learning rate at the top of the schedule."""
    schedule: Annotated[
        Schedule,
        Opt(
            group=Group.OPTIMIZER,
            changes=STUDENT,
            inherit=Inherit.NEVER,
            replaces=("decay_steps", "decay_factors", "cooldown_steps", "cooldown_shape"),
        ),
    ] = "cosine"
    """Learning rate after the linear warm-up: falling to 0 along half a cosine, a line or a parabola; constant until it
    falls over the last --cooldown-steps (wsd); falling at --decay-steps (staircase); or constant."""
    # Extends: a longer wsd run has a cool-down of its own.
    cooldown_steps: Annotated[
        int | None,
        Opt(
            group=Group.OPTIMIZER,
            changes=STUDENT,
            inherit=Inherit.NEVER,
            at_least=0,
            usual="a fifth of the run",
            extends=True,
        ),
    ] = None
    """wsd: number of steps at the end of the run over which the learning rate falls to 0."""
    cooldown_shape: Annotated[Literal["sqrt", "linear"], Opt(group=Group.OPTIMIZER, changes=STUDENT)] = "sqrt"
    """wsd: how it falls, as 1 − √t or along a line."""
    decay_steps: Annotated[
        tuple[int, ...],
        Opt(
            group=Group.OPTIMIZER,
            changes=STUDENT,
            inherit=Inherit.NEVER,
            usual="none",
            replaces=("decay_factors",),
            metavar="STEP …",
        ),
    ] = ()
    """staircase: the steps at which the learning rate falls."""
    decay_factors: Annotated[
        tuple[float, ...],
        Opt(
            group=Group.OPTIMIZER,
            changes=STUDENT,
            inherit=Inherit.NEVER,
            at_least=0,
            usual="0.1, 0.01, …",
            metavar="FACTOR …",
        ),
    ] = ()
    """staircase: the learning rate after each of these steps, as a share of --lr."""
    # Independent of lr, so that a search over lr does not move it, too (Loshchilov and Hutter, 2019).
    weight_decay: Annotated[float, Opt(group=Group.OPTIMIZER, changes=STUDENT, at_least=0, below=1)] = 1e-4
    """Weight decay, decoupled from the learning rate: the share of each kernel that one step removes at the top of the
    schedule. (In torch's AdamW this would be weight_decay / lr.) Biases and norm layers do not decay."""
    # A longer run of a wsd schedule keeps the warm-up that it began with: see training/run/extend.py.
    warmup_steps: Annotated[
        int | None,
        Opt(group=Group.OPTIMIZER, changes=STUDENT, inherit=Inherit.NEVER, at_least=0,
            usual=f"{WARMUP_STEPS:,}, but at most 1/{WARMUP_SHARE} of the run"),
    ] = None  # fmt: skip
    """Number of steps over which the learning rate rises from 0."""
    clip_norm: Annotated[float | None, Opt(group=Group.OPTIMIZER, changes=STUDENT, above=0, usual="never")] = 1.0
    """Clip gradients to this global norm; None never clips."""

    @property
    def optimizer_arguments(self) -> dict[str, Any]:
        """The options that `ops.optim.factory.create_optimizer` takes by their names, besides rate and decay."""
        return {"momentum": self.momentum, "momentum_dtype": self.momentum_dtype}

    def problems(self) -> list[str]:
        steps, factors, found = self.decay_steps, self.decay_factors, self._function_problems()
        # With a rule, the steps of the staircase follow from the number of images, which is not known yet.
        if self.schedule == "staircase" and not steps and not self.by_rule:
            found.append("a staircase needs --decay-steps, e.g. --decay-steps 200 300 400")
        if steps and self.schedule != "staircase":
            found.append(f"decay_steps belong to --schedule staircase, not {self.schedule}")
        if self.cooldown_steps is not None and self.schedule != "wsd":
            found.append(f"cooldown_steps belong to --schedule wsd, not {self.schedule}")
        if self.momentum_dtype != "fp32" and self.optimizer != "adamw":
            found.append(f"momentum_dtype {self.momentum_dtype} belongs to --optimizer adamw, not {self.optimizer}")
        # `moved`, since every value is a valid shape: only one that is not the default was set by somebody.
        if self.moved("cooldown_shape") and self.schedule != "wsd":
            found.append(f"cooldown_shape belongs to --schedule wsd, not {self.schedule}")
        # With a rule the steps come later, and so does their comparison with the factors.
        if factors and len(factors) != len(steps) and not (self.by_rule and not steps):
            found.append(f"{len(factors)} decay_factors for {len(steps)} decay_steps; give one each")
        # A set, so that a step which is named twice is found too.
        if list(steps) != sorted(set(steps)) or (steps and steps[0] < 1):
            found.append(f"decay_steps must rise from 1 on, got {', '.join(map(str, steps))}")
        return found + super().problems()

    def _function_problems(self) -> list[str]:
        """Options that a user's function decides itself, and the one that it does not."""
        if not is_function_name(self.optimizer):
            return []
        # 0 is what such a run records.
        idle = {name: self.moved(name) for name in ("optimizer_kwargs", "momentum")}
        idle["weight_decay"] = self.moved("weight_decay") and self.weight_decay != 0
        found = [f"{name} belongs to optimizers by name; {self.optimizer} sets its own" for name in idle if idle[name]]
        # Required: the schedule would otherwise replace the optimizer's own rate by our default without a word.
        if self.lr is None:
            found.append(f"optimizer {self.optimizer} needs --lr, which the schedule sets in all of its groups")
        return found
