"""A library that is imported when a test first needs it, so that of several processes only one waits for it."""

import warnings
from importlib import import_module
from typing import Any


class LazyModule:
    """Has the attributes of a module, which is imported for the first of them.

    Args:
        name: the module's.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as `pytest.importorskip` does: they are the library's own
            return getattr(import_module(self._name), name)
