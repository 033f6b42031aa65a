"""Imports Hugging Face's transformers only where one of its networks is used, and keeps what it prints off the screen.

Nothing of a repository is ever run: no code of its own (`trust_remote_code`), no kernels, and of its files of weights
only tensors are read, by `checkpoints`.
"""

import logging
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from funmatch.errors import InputError


def transformers_for(what: str) -> Any:
    """Returns the library transformers.

    Args:
        what: needs it, for the message.

    Raises:
        InputError: it is not installed.
    """
    try:
        with _without_log(), warnings.catch_warnings(action="ignore"):
            import transformers
            import transformers.modeling_utils  # transformers itself imports what it needs later, and that writes logs
    except ImportError:
        raise InputError(
            f"{what} is a network of the library transformers, which is not installed; "
            "pip install 'funmatch[transformers]'"
        ) from None
    return transformers


@contextmanager
def quiet() -> Generator[None]:
    """Keeps transformers' reports, progress and warnings off the screen; what matters in them becomes our messages."""
    from transformers.utils import logging as reports

    level, has_progress = reports.get_verbosity(), reports.is_progress_bar_enabled()
    reports.set_verbosity(reports.CRITICAL)
    reports.disable_progress_bar()
    try:
        with _without_log(), warnings.catch_warnings(action="ignore"):
            yield
    finally:
        reports.set_verbosity(level)
        if has_progress:
            reports.enable_progress_bar()


@contextmanager
def _without_log() -> Generator[None]:
    """Keeps warnings of libraries, such as those that transformers imports, out of the log."""
    level = logging.root.manager.disable
    logging.disable(max(level, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(level)
