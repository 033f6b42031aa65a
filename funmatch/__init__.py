"""Knowledge distillation by function matching: a small image classifier becomes the same function as a big one."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from funmatch.errors import InputError
from funmatch.version import __version__

# For type checkers and editors, which do not run `__getattr__`.
if TYPE_CHECKING:
    from funmatch.api import (
        Outcome,
        Tuned,
        benchmark,
        distill,
        distill_several,
        embed,
        evaluate,
        export,
        finetune,
        head,
        load,
        predict,
        prepare,
        recipe,
        select,
        study,
        train,
        tune,
    )
    from funmatch.models.classifier import Card, Classifier
    from funmatch.reports.predictions import Prediction, Predictions
    from funmatch.runtime.signals import Interrupted
    from funmatch.runtime.time_limit import TimeLimitReached

__all__ = [
    "Card", "Classifier", "InputError", "Interrupted", "Outcome", "Prediction", "Predictions", "TimeLimitReached",
    "Tuned", "__version__",
    "benchmark", "distill", "distill_several", "embed", "evaluate", "export", "finetune", "head",
    "load", "predict", "prepare", "recipe", "select", "study", "train", "tune",
]  # fmt: skip


ELSEWHERE = {
    **dict.fromkeys(("Card", "Classifier"), "models.classifier"),
    **dict.fromkeys(("Prediction", "Predictions"), "reports.predictions"),
    "Interrupted": "runtime.signals",
    "TimeLimitReached": "runtime.time_limit",
}
"""Modules of the public names that are not in `funmatch.api`."""


def __getattr__(name: str) -> Any:
    """Imports a public name on first use: some need torch, and a command line needs none of the functions."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = ELSEWHERE.get(name, "api")
    value = getattr(import_module(f"{__name__}.{module}"), name)
    globals()[name] = value  # found at once from here on
    return value


def __dir__() -> list[str]:
    """Names what `__getattr__` imports, too, so that it is completed."""
    return sorted({*globals(), *__all__})
