"""AdamW whose mean of the gradients is stored in bf16."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor


class AdamW(torch.optim.AdamW):
    """torch's AdamW with the mean of the gradients in bf16, as in the paper's code (optax's `mu_dtype`).

    The stored mean, β₁ and their product are rounded; the gradient's share is added to it in float32.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Takes one step."""
        kept = [self._fade(group) for group in self.param_groups]
        loss = super().step(closure)
        for group, (parameters, means, faded) in zip(self.param_groups, kept, strict=True):
            share = 1 - group["betas"][0]
            exact = [self.state[parameter]["exp_avg"] for parameter in parameters]
            if parameters:
                # Again, in optax's own order: a last bit of float32 decides now and then how bf16 is rounded.
                torch._foreach_copy_(exact, [cast("Tensor", parameter.grad) for parameter in parameters])
                torch._foreach_mul_(exact, share)
                torch._foreach_add_(exact, faded)
            for parameter, mean in zip(parameters, self._unless_overflowed(means, exact), strict=True):
                self.state[parameter]["exp_avg"] = mean
            for parameter in group["params"]:
                if (slots := self.state.get(parameter)) and slots["exp_avg"].dtype == torch.float32:  # the first step
                    slots["exp_avg"] = slots["exp_avg"].bfloat16()
        return loss

    def _fade(self, group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Multiplies the means by β₁; returns the parameters to be updated, their means, and what is left of these."""
        beta = group["betas"][0]
        updated = [each for each in group["params"] if each.grad is not None and self.state.get(each)]
        means = [self.state[parameter]["exp_avg"] for parameter in updated]
        faded = [torch.empty_like(mean, dtype=torch.float32) for mean in means]
        if updated:
            torch._foreach_copy_(faded, torch._foreach_mul(means, float(torch.tensor(beta, dtype=torch.bfloat16))))
            # Divided by β₁, with which the step will multiply them.
            for parameter, mean in zip(updated, torch._foreach_div(faded, beta), strict=True):
                self.state[parameter]["exp_avg"] = mean
        return updated, means, faded

    def _unless_overflowed(self, before: list[Tensor], after: list[Tensor]) -> list[Tensor]:
        """Returns the means in bf16; a step whose fp16 gradients overflowed is none, and changes no mean."""
        overflowed = getattr(self, "found_inf", None)
        if overflowed is not None:
            return [
                torch.where(overflowed.to(new.device) > 0, old, new.bfloat16())
                for old, new in zip(before, after, strict=True)
            ]
        if before:
            torch._foreach_copy_(before, after)
        return before
