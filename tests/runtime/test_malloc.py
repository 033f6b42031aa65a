"""Freed memory is kept between steps while any run is training."""

import platform
import resource
import subprocess
import sys

import pytest
import torch

from funmatch.runtime import malloc

CPU = torch.device("cpu")
GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")


@GLIBC
def test_first_enter_and_last_exit_configure_malloc(monkeypatch):
    calls: list[str] = []

    class Library:
        def mallopt(self, option: int, value: int) -> None:
            calls.append(f"{option} {value}")

        def malloc_trim(self, _pad: int) -> None:
            calls.append("trim")

    monkeypatch.setattr(malloc, "_active", 0)  # as before the tests, which keep freed memory, too
    for name in malloc.OVERRIDE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(malloc.ctypes, "CDLL", lambda _: Library())
    one, other = malloc.keep_freed_memory(CPU), malloc.keep_freed_memory(CPU)
    one.__enter__()
    assert calls == ["-4 0", "-1 -1"]
    other.__enter__()
    one.__exit__(None, None, None)
    assert len(calls) == 2
    other.__exit__(None, None, None)
    assert calls[2:] == ["-4 65536", "-1 131072", "trim"]
    with malloc.keep_freed_memory(torch.device("cuda")):
        pass
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.mmap_max=5")
    with malloc.keep_freed_memory(CPU):
        pass
    assert len(calls) == 5, "the user's own malloc settings are kept"


STEPS = """
import resource, sys, torch
from funmatch.runtime import malloc

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        kept = [torch.zeros(10_000_000) for _ in range(3)]
        del kept
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
plain = faults()
with malloc.keep_freed_memory(torch.device("cpu")):
    # Until the heap has grown to what the steps need: how soon depends on what lies in between.
    faults()
    faults()
    own = faults()
print(plain, own)
"""


@pytest.mark.slow
@GLIBC
def test_freed_memory_causes_no_page_faults_again():
    # A process of its own: here, other tests' allocations would add faults, and leave freed memory to reuse.
    result = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, check=True)
    plain, own = map(int, result.stdout.split())
    page = resource.getpagesize()
    assert plain * page > 10**7, "without it, all memory faults in again"
    assert own < plain / 10
