"""Compiles the C++ kernels on first use and loads them: CPU code for what torch and Pillow do with more memory or time.

Callers compare a kernel with torch before they use it, and fall back to torch where it is unavailable.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

from funmatch.errors import first_line
from funmatch.runtime.disk.files import cache_home, user_cache, write_atomically
from funmatch.runtime.measured import Measurement

NAMES = ("norms.cpp", "batch_norms.cpp", "depthwise.cpp", "rows.cpp", "views.cpp", "jpeg.cpp")
HEADER_NAMES = ("exponential.h", "numbers.h", "sums.h", "jpeg_codes.h", "jpeg_header.h", "jpeg_pixels.h")
SOURCES, HEADERS = (tuple(map(Path(__file__).with_name, names)) for names in (NAMES, HEADER_NAMES))
# Vectors wider than the processor's are no mistake: the compiler cuts them (-Wno-psabi).
FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-shared", "-fPIC", "-Wno-psabi")
# Written out as vectors, these are as fast with less optimization, which takes half the time.
FURTHER_FLAGS = {"batch_norms.cpp": ("-O2",)}
# The fastest first. Compilers prefer 256-bit vectors even where the processor has 512; some know neither flag.
CPU_FLAGS = (("-march=native", "-mprefer-vector-width=512"), ("-march=native",), ())
CPU_INFO = Path("/proc/cpuinfo")
BUILD_LOCK = Lock()
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


def find_compiler() -> str | None:
    """Returns the path of the machine's C++ compiler: `$CXX`, c++ or g++; None without one."""
    names = (os.environ.get("CXX"), "c++", "g++")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def why_unavailable() -> str:
    """Returns why the kernels are unavailable; an empty string if they are available.

    The first call on a machine compiles them, which takes a second or two.
    """
    # `cache` alone lets several threads in at once; those that prepare views all ask first thing.
    with BUILD_LOCK:
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
        path = _build()
        try:
            return _declare(ctypes.CDLL(str(path))), ""
        except (OSError, AttributeError):
            # A file in the cache can be damaged; it is compiled again, once.
            path.unlink()
            return _declare(ctypes.CDLL(str(_build()))), ""
    except (OSError, subprocess.SubprocessError, AttributeError, RuntimeError) as error:
        return None, first_line(error)


def _declare(library: Any) -> Any:
    """Declares the functions' arguments and returns the library."""
    for name, arguments in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    return library


def _build() -> Path:
    """Returns the compiled library in the cache, compiling it if it is not there.

    Raises:
        OSError: there is no compiler, or it fails.
    """
    compiler = find_compiler()
    if compiler is None:
        raise OSError("no C++ compiler found; install g++, or set CXX to the path of one")
    version = _version_of(compiler)
    # Everything that decides the machine code: a home folder may be shared by machines with different processors.
    sources = [source.read_bytes() for source in (*SOURCES, *HEADERS)]
    key = (sources, FLAGS, FURTHER_FLAGS, CPU_FLAGS, version, platform.machine(), _processor())
    path = _folder() / f"{hashlib.blake2b(repr(key).encode(), digest_size=12).hexdigest()}.so"
    if _is_ours(path.parent) and _is_intact(path):
        return path
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    if not _is_ours(path.parent):
        raise OSError(
            f"others can write to {path.parent}, and could put code there; make it yours (chmod go-w), or set "
            "FUNMATCH_CACHE to a folder of your own"
        )
    # Compiled beside its place and renamed: other processes never load half a library.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        compiled, stderr = Path(folder) / path.name, ""
        for flags in CPU_FLAGS:
            stderr = _compile([compiler, *FLAGS, *flags], compiled)
            if stderr is None:
                _put(compiled, path)
                return path
    raise OSError(f"{compiler} cannot compile the kernels: {first_line(Exception(stderr))}")


def _compile(command: list[str], library: Path) -> str | None:
    """Compiles the sources into a library; returns what the compiler complains of, or None if it succeeded."""

    def complaint(*arguments: str | Path) -> str | None:
        words = [*command, *map(str, arguments)]
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=600)
        return done.stderr if done.returncode else None

    # At the same time: the first run on a machine waits for it.
    objects = [library.with_name(f"{source.stem}.o") for source in SOURCES]

    def compile_one(source: Path, into: Path) -> str | None:
        return complaint("-c", *FURTHER_FLAGS.get(source.name, ()), source, "-o", into)

    with ThreadPoolExecutor(len(SOURCES)) as pool:
        complaints = [*pool.map(compile_one, SOURCES, objects)]
    found = next((each for each in complaints if each is not None), None)
    return complaint(*objects, "-o", library) if found is None else found


def _put(compiled: Path, path: Path) -> None:
    """Puts a library that was compiled in its place in the cache, with its digest."""
    # Synced before the rename, or a power loss could leave a library of zeros under the final name.
    with open(compiled, "rb") as file:
        os.fsync(file.fileno())
    digest = hashlib.blake2b(compiled.read_bytes()).hexdigest()
    os.chmod(compiled, 0o644)  # whatever the umask is: what others can write is never loaded
    # The library last, so that one with a digest is never looked for in vain.
    write_atomically(_digest_of(path), digest)
    compiled.replace(path)


def _version_of(compiler: str) -> bytes:
    """Returns what a compiler says of its version: an upgraded one has the same path. Each is asked once."""
    found = os.stat(compiler)  # of what a link leads to
    key = repr((os.path.realpath(compiler), found.st_size, found.st_mtime_ns))
    measured = Measurement("compilers", key, "the compiler's version")
    # In hexadecimal digits: it may be any bytes.
    if record := measured.read({"version": str}):
        with suppress(ValueError):
            return bytes.fromhex(record["version"])
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=60).stdout
    measured.write({"version": version.hex()})
    return version


def _folder() -> Path:
    """Returns the folder of the libraries: in the cache, or in the user's own where others can write to that one."""
    folder = cache_home() / "kernels"
    with suppress(OSError):  # a cache that is shared may be read only
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        if folder.stat().st_uid == os.getuid():
            # Earlier versions left it writable for the group, where the umask allowed that.
            folder.chmod(folder.stat().st_mode & ~0o022)
    return folder if _is_ours(folder) else user_cache() / "kernels"


def _digest_of(path: Path) -> Path:
    return path.with_name(f".{path.stem}.digest")


def _is_ours(path: Path) -> bool:
    """Returns whether a file or folder is of this user or of root, and nobody else may write to it."""
    try:
        status = path.stat()
    except OSError:
        return False
    return status.st_uid in (0, os.getuid()) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _is_intact(path: Path) -> bool:
    """Returns whether a library is what was compiled: a flipped bit in it computes other numbers, or ends the process.

    A library that an earlier version compiled has no digest, and is compiled once more.
    """
    digest = _digest_of(path)
    try:
        # The digest finds damage; it is the permissions that keep other people's code out.
        same = digest.read_text() == hashlib.blake2b(path.read_bytes()).hexdigest()
    except (OSError, UnicodeDecodeError):
        return False
    return same and _is_ours(path) and _is_ours(digest)


def _processor() -> str:
    """Returns a text that differs between processors with different instructions."""
    if not CPU_INFO.is_file():
        return platform.processor()
    # A set, since the lines repeat for every core; sorted, since sets have no order.
    kinds = ("model name", "flags", "Features")
    return "".join(sorted({line for line in CPU_INFO.read_text().splitlines() if line.startswith(kinds)}))
