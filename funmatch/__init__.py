"""Knowledge distillation by function matching: a small image classifier becomes the same function as a big one."""

from funmatch.api import Outcome, distill, evaluate, train
from funmatch.errors import InputError

__version__ = "0.1.0"
__all__ = ["InputError", "Outcome", "distill", "evaluate", "train"]
