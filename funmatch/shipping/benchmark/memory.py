"""Measures the peak memory of a format in a fresh process that only loads it and computes one image at a time.

    python -m funmatch.shipping.benchmark.memory '{"format": "", "path": "model.onnx", "side": 224, "threads": 1}'

A process that has done other things before holds memory of those, too.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from funmatch.errors import InputError

CALLS = 3
"""Images that are computed, one at a time: the second call may still allocate."""
TIME_LIMIT = 600
"""Seconds that a process may take; `torch.compile` takes minutes for a large network."""


def measure(job: dict[str, Any]) -> int:
    """Starts a process for a job and returns the peak of its memory in bytes, without interpreter and libraries.

    Args:
        job: `side`, `threads`, and `path` of a runtime's file; or `format` (eager or compiled), `model`, `weights`,
            `model_kwargs`, `device` and `precision`.

    Raises:
        InputError: the process failed.
    """
    threads = {name: str(job["threads"]) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    command = [sys.executable, "-m", "funmatch.shipping.benchmark.memory", json.dumps(job)]
    try:
        done = subprocess.run(
            command, env=os.environ | threads, capture_output=True, text=True, timeout=TIME_LIMIT, check=True
        )
        return int(done.stdout.splitlines()[-1])
    except subprocess.CalledProcessError as error:
        last = [line for line in error.stderr.splitlines() if line.strip()][-1:]
        raise InputError(f"its process ended with exit code {error.returncode}: {''.join(last)}") from None
    except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
        raise InputError(f"its process gave no figure: {error}") from None


def peak_of(job: dict[str, Any]) -> int:
    """Does a job in this process, and returns the peak of its memory in bytes."""
    import numpy as np

    load = _load_runtime if job.get("path") else _load_torch
    prepare, device_peak = load(job)
    _reset_peak()
    before = _resident_now()
    predict = prepare()
    image = np.random.default_rng(0).random((1, 3, job["side"], job["side"]), np.float32)
    for _ in range(CALLS):
        predict(image)
    # Of an accelerator, what it allocated: the host's memory then says little.
    return device_peak() or max(0, _peak() - before)


Loaded = tuple[Callable[[], Callable], Callable[[], int]]
"""What prepares a format once its libraries are imported, and what returns the peak of an accelerator."""


def _load_runtime(job: dict[str, Any]) -> Loaded:
    from funmatch.shipping.runtimes import open_runtime, require

    path = Path(job["path"])
    # Only the runtime that is needed: another one's libraries would be counted as memory of neither.
    for module in {".onnx": ("onnxruntime",), ".xml": ("openvino",), ".pt2": ("torch",)}.get(path.suffix, ()):
        require(module)

    def prepare() -> Callable:
        runtime = open_runtime(path, job["threads"])
        return lambda image: runtime(runtime.as_input(image))

    return prepare, lambda: 0


def _load_torch(job: dict[str, Any]) -> Loaded:
    import torch

    from funmatch.runtime import devices
    from funmatch.shipping.benchmark.formats import FORMATS, Machine, Subject
    from funmatch.training.student.trained_model import open_trained_model

    torch.set_num_threads(job["threads"])
    device = torch.device(job["device"])

    def prepare() -> Callable:
        weights = Path(job["weights"]) if job["weights"] else None
        model = open_trained_model(
            job["model"], weights=weights, model_kwargs=tuple(job["model_kwargs"]), side=job["side"]
        )
        subject = Subject("", job["model"], model.preprocessing, model, None, Path())
        return FORMATS[job["format"]].make(subject, Machine(device, job["precision"], job["threads"])).predict

    return prepare, lambda: devices.peak_memory(device)


def _reset_peak() -> None:
    """Sets the peak to what is resident now, where the system allows it: importing libraries has a peak of its own."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _resident_now() -> int:
    """Returns the bytes that are resident; where the system does not say, the peak so far."""
    return _of_status("VmRSS") or _peak()


def _peak() -> int:
    """Returns the peak of resident bytes."""
    # Not `ru_maxrss` on Linux: a process inherits it from the one that started it.
    if peak := _of_status("VmHWM"):
        return peak
    import resource

    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024


def _of_status(name: str) -> int:
    """Returns a number of bytes from Linux's record of this process; 0 elsewhere."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    print(peak_of(json.loads(sys.argv[1])))
