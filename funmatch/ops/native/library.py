"""Loads the C++ kernels, compiled on first use: CPU code for what torch and Pillow do with more memory or time.

Callers compare a kernel with torch before they use it, and fall back to torch where it is unavailable.
"""

import ctypes
import subprocess
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

from funmatch.errors import first_line
from funmatch.ops.native import build

LOAD_LOCK = Lock()
DTYPES = ("float32", "bfloat16")


class NormShape(ctypes.Structure):
    """The `Shape` of `norms.cpp`: the same fields in the same order."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("images", "pixels", "channels", "groups")),
        *((name, ctypes.c_int) for name in ("relu", "threads")),
    ]


class BatchShape(ctypes.Structure):
    """The `Shape` of `batch_norms.cpp`."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("images", "pixels", "channels", "count")),
        *((name, ctypes.c_double) for name in ("eps", "momentum")),
        *((name, ctypes.c_int) for name in ("activation", "threads")),
    ]


class Window(ctypes.Structure):
    """The `Window` of `depthwise.cpp`."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("images", "height", "width", "channels", "out_height", "out_width")),
        *((name, ctypes.c_int) for name in ("taps", "stride", "padding", "threads")),
    ]


class RowsShape(ctypes.Structure):
    """The `Shape` of `rows.cpp`."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "width")),
        ("eps", ctypes.c_double),
        ("threads", ctypes.c_int),
    ]


POINTER, COUNT, NUMBER = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
# Without declared types ctypes passes integers as 32 bits, which would cut addresses short.
SIGNATURES = {
    "sample_views": [*[POINTER] * 3, COUNT, COUNT, ctypes.c_int],
    "decode_jpeg_box": [POINTER, COUNT, *[POINTER] * 3],
    **{
        f"{name}_{dtype}": arguments
        for dtype in DTYPES
        for name, arguments in {
            "group_norm": [*[POINTER] * 6, ctypes.POINTER(NormShape), NUMBER],
            "group_norm_backward": [*[POINTER] * 9, ctypes.POINTER(NormShape)],
            "batch_statistics": [POINTER, POINTER, ctypes.POINTER(BatchShape)],
            "batch_norm": [*[POINTER] * 9, ctypes.POINTER(BatchShape)],
            "batch_norm_sums": [*[POINTER] * 7, ctypes.POINTER(BatchShape)],
            "batch_norm_backward": [*[POINTER] * 8, ctypes.POINTER(BatchShape)],
            "depthwise_input": [*[POINTER] * 3, ctypes.POINTER(Window)],
            "depthwise_weight": [*[POINTER] * 3, ctypes.POINTER(Window)],
            "softmax": [POINTER, POINTER, ctypes.POINTER(RowsShape)],
            "column_sums": [POINTER, POINTER, ctypes.POINTER(RowsShape)],
            "standardize": [*[POINTER] * 4, COUNT, COUNT, NUMBER, ctypes.c_int],
            "standardize_backward": [*[POINTER] * 5, COUNT, COUNT, ctypes.c_int],
        }.items()
    },
    # By the dtypes of inputs and results.
    **{
        f"{name}_{dtypes}": [*[POINTER] * count, ctypes.POINTER(RowsShape)]
        for dtypes in ("float32_float32", "float32_bfloat16", "bfloat16_bfloat16")
        for name, count in {"layer_norm": 6, "layer_norm_backward": 8}.items()
    },
}


def addresses(*tensors: Any) -> list[int]:
    """Returns where tensors lie in memory, as arguments of the library's functions."""
    # A bare address keeps nothing alive: a caller holds each tensor in a variable until the kernel has returned.
    return [tensor.data_ptr() for tensor in tensors]


def why_unavailable() -> str:
    """Returns why the kernels are unavailable; an empty string if they are available.

    The first call on a machine compiles them, which takes a second or two.
    """
    # `cache` alone lets several threads in at once; those that prepare views all ask first thing.
    with LOAD_LOCK:
        return _load()[1]


def load_library() -> Any:
    """Returns the library, whose functions are those of `SIGNATURES`; `why_unavailable` must have returned nothing."""
    loaded, reason = _load()
    assert loaded is not None, reason
    return loaded


def identity() -> str:
    """Returns a text that differs between kernels whose numbers may differ; empty where there are none."""
    return "" if why_unavailable() else Path(load_library()._name).stem


@cache
def _load() -> tuple[Any, str]:
    """Loads the library and compiles it if necessary; returns it, or None and the reason."""
    try:
        path = build.build()
        try:
            return _declare(ctypes.CDLL(str(path))), ""
        except (OSError, AttributeError):
            # A file in the cache can be damaged; it is compiled again, once.
            path.unlink()
            return _declare(ctypes.CDLL(str(build.build()))), ""
    except (OSError, subprocess.SubprocessError, AttributeError, RuntimeError) as error:
        return None, first_line(error)


def _declare(library: Any) -> Any:
    """Declares the functions' arguments and returns the library."""
    for name, arguments in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    return library
