"""Our own code for the CPU, `native.cpp`, compiled on first use: where torch looks at the same memory several times.

Whoever calls it holds it against torch first, and does without where it cannot be had.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

from funmatch.errors import first_line
from funmatch.runtime.files import cache_home

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-shared", "-fPIC")
CPU_FLAGS = (("-march=native", "-mprefer-vector-width=512"), ("-march=native",), ())
"""What else a compiler may understand, the fastest first."""
CPU_INFO = Path("/proc/cpuinfo")
BUILD_LOCK = Lock()
DTYPES = ("float32", "bfloat16")


class NormShape(ctypes.Structure):
    """As in `native.cpp`."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("pictures", "places", "channels", "groups")),
        *((name, ctypes.c_int) for name in ("relu", "threads")),
    ]


POINTER, COUNT, NUMBER = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
SIGNATURES = {
    "look": [*[POINTER] * 3, COUNT, COUNT],
    **{
        f"{name}_{number}": arguments
        for number in DTYPES
        for name, arguments in {
            "norm": [*[POINTER] * 6, ctypes.POINTER(NormShape), NUMBER],
            "norm_back": [*[POINTER] * 9, ctypes.POINTER(NormShape)],
            "standardise": [*[POINTER] * 4, COUNT, COUNT, NUMBER, ctypes.c_int],
            "standardise_back": [*[POINTER] * 5, COUNT, COUNT, ctypes.c_int],
        }.items()
    },
}


def find_compiler() -> str | None:
    """The C++ compiler of this machine, `$CXX` or one of the usual names."""
    return next(
        (found for name in (os.environ.get("CXX"), "c++", "g++") if name and (found := shutil.which(name))), None
    )


def why_unavailable() -> str:
    """Why it cannot be had here; empty where it can. The first time this takes a second or two: it is compiled."""
    with BUILD_LOCK:  # threads that make views ask at once
        return _opened()[1]


def load_library() -> Any:
    """The functions of `native.cpp`, where `why_not` says nothing."""
    opened, why = _opened()
    assert opened is not None, why
    return opened


@cache
def _opened() -> tuple[Any, str]:
    """The library, made if it is not there; or why there is none."""
    try:
        place = _built()
        try:
            return _bound(ctypes.CDLL(str(place))), ""
        except (OSError, AttributeError):  # it was damaged
            place.unlink()
            return _bound(ctypes.CDLL(str(_built()))), ""
    except (OSError, subprocess.SubprocessError, AttributeError, RuntimeError) as error:
        return None, first_line(error)


def _bound(opened: Any) -> Any:
    for name, arguments in SIGNATURES.items():
        function = getattr(opened, name)
        function.argtypes, function.restype = arguments, None
    return opened


def _built() -> Path:
    """The compiled library in our cache: one for each source, compiler, and kind of processor."""
    name = find_compiler()
    if name is None:
        raise OSError("there is no C++ compiler; install g++, or say by CXX where one is")
    version = subprocess.run([name, "--version"], capture_output=True, timeout=60).stdout
    words = (SOURCE.read_bytes(), FLAGS, CPU_FLAGS, version, platform.machine(), _processor())
    place = cache_home() / "kernels" / f"{hashlib.blake2b(repr(words).encode(), digest_size=12).hexdigest()}.so"
    if place.is_file():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as folder:
        made, said = Path(folder) / place.name, ""
        for more in CPU_FLAGS:
            words = [name, *FLAGS, *more, str(SOURCE), "-o", str(made)]
            done = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=600)
            if done.returncode == 0:
                with open(made, "rb") as file:
                    os.fsync(file.fileno())
                made.replace(place)
                return place
            said = done.stderr
    raise OSError(f"{name} cannot compile them: {first_line(Exception(said))}")


def _processor() -> str:
    """What kind of processor this is: instructions of one may be unknown to another."""
    if not CPU_INFO.is_file():
        return platform.processor()
    return "".join(
        sorted(
            {line for line in CPU_INFO.read_text().splitlines() if line.startswith(("model name", "flags", "Features"))}
        )
    )
