"""Knowledge distillation by function matching: a small image classifier becomes the same function as a big one."""

from typing import TYPE_CHECKING, Any

from funmatch.api import (
    Outcome,
    Tuned,
    distill,
    distill_several,
    evaluate,
    finetune,
    load,
    prepare,
    recipe,
    study,
    train,
    tune,
)
from funmatch.errors import InputError
from funmatch.version import __version__

# For type checkers and editors, which do not run `__getattr__`.
if TYPE_CHECKING:
    from funmatch.models.classifier import Card, Classifier

__all__ = [
    "Card", "Classifier", "InputError", "Outcome", "Tuned", "__version__",
    "distill", "distill_several", "evaluate", "finetune",
    "load", "prepare", "recipe", "study", "train", "tune",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """`Card` and `Classifier` need torch, whose import takes seconds; so they are imported on first use."""
    if name in ("Card", "Classifier"):
        from funmatch.models import classifier

        return getattr(classifier, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
