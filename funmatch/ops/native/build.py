"""Compiles the C++ kernels into a library in the cache, once a machine.

A library that is there is used only if it is whole, and nobody else can write to it.
"""

import hashlib
import os
import platform
import shutil
import stat
import subprocess
from contextlib import suppress
from pathlib import Path

from funmatch.errors import first_line
from funmatch.runtime.disk.files import cache_home, user_cache, write_atomically
from funmatch.runtime.disk.partials import scratch_folder
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
SECONDS = 600
"""What a compiler may take."""


def find_compiler() -> str | None:
    """Returns the path of the machine's C++ compiler: `$CXX`, c++ or g++; None without one."""
    names = (os.environ.get("CXX"), "c++", "g++")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def build() -> Path:
    """Returns the compiled library in the cache, compiling it if it is not there, which takes seconds.

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
    with scratch_folder(path.parent, "compiling") as folder:
        compiled, stderr = folder / path.name, ""
        for flags in CPU_FLAGS:
            stderr = _compile([compiler, *FLAGS, *flags], compiled)
            if stderr is None:
                _put(compiled, path)
                return path
    raise OSError(f"{compiler} cannot compile the kernels: {first_line(Exception(stderr))}")


def _compile(command: list[str], library: Path) -> str | None:
    """Compiles the sources into a library; returns what the compiler complains of, or None if it succeeded."""
    objects = [library.with_name(f"{source.stem}.o") for source in SOURCES]
    # At the same time: the first run on a machine waits for it.
    commands = [
        [*command, "-c", *FURTHER_FLAGS.get(source.name, ()), str(source), "-o", str(into)]
        for source, into in zip(SOURCES, objects, strict=True)
    ]
    complaints = _run(commands) or _run([[*command, *map(str, objects), "-o", str(library)]])
    return complaints[0] if complaints else None


def _run(commands: list[list[str]]) -> list[str]:
    """Runs compilers at the same time; returns what those that failed complain of."""
    running = [
        subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
        for words in commands
    ]
    try:
        complaints = [each.communicate(timeout=SECONDS)[1] for each in running]
        return [text for each, text in zip(running, complaints, strict=True) if each.returncode]
    finally:
        for each in running:
            each.kill()  # where one took too long


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
