"""Where a run's steps go: `--profile`."""

import json
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile, record_function

from funmatch.models.ensemble import TeacherEnsemble
from funmatch.models.flops import gflop
from funmatch.runtime import devices, env
from funmatch.runtime.files import write_atomically
from funmatch.runtime.log import info, print_table
from funmatch.runtime.timing import StepTimer
from funmatch.training.setup import TrainSetup

WARM, TIMED, TRACED = 5, 20, 3
"""Steps that are let by, that are timed, and that the trace shows."""
TRACE, FIGURES = "trace.json", "profile.json"
SQUARE = {"cpu": 2048}
"""Of the matrices whose product is the measured peak; elsewhere 8192."""
PEAK_SECONDS, AT_LEAST = 0.5, 3
REST = "all else"


@contextmanager
def profile_training(
    setup: TrainSetup[Any], teachers: TeacherEnsemble | None, folder: Path
) -> Generator[Callable[[], None]]:
    """Gives what is to be called after each step: it profiles the first ones, if the run was asked to."""
    if not setup.config.profile or not env.is_main_process():
        yield lambda: None
        return
    profile = Profile(setup, teachers, folder)
    try:
        yield profile.after_step
    finally:
        profile.close()


class Profile:
    """Watches the first steps of a session, says where they went, and leaves a trace in the run's folder.

    The trace is that of `torch.profiler`: Perfetto (ui.perfetto.dev) and Chrome's about:tracing show it.
    """

    def __init__(self, setup: TrainSetup[Any], teachers: TeacherEnsemble | None, folder: Path) -> None:
        self.setup, self.teachers, self.folder, self.steps = setup, teachers, folder, 0
        self.device = setup.loop.device
        self.watch = StepTimer(lambda: devices.synchronize(self.device))
        self.began = 0.0
        self.trace: profile | None = None

    def after_step(self) -> None:
        """To be called when a step is over."""
        self.steps += 1
        if self.steps == WARM:
            devices.synchronize(self.device)
            self.began = time.perf_counter()
            self.watch.__enter__()
        elif self.steps == WARM + TIMED:
            self.report(TIMED)
            self.trace = profile()
            self.trace.__enter__()
            self.watch = StepTimer(lambda: None, record_function)
            self.watch.__enter__()
        elif self.steps == WARM + TIMED + TRACED:
            self.traced()

    def close(self) -> None:
        """Tells what is known when a run ends before all was seen."""
        if WARM < self.steps < WARM + TIMED:
            self.report(self.steps - WARM)
        elif self.trace:
            self.traced()
        elif self.steps <= WARM:
            info(f"--profile needs more than {WARM} steps, and there were {self.steps}")

    def report(self, steps: int) -> None:
        """Says where the timed steps went, and keeps it."""
        whole = time.perf_counter() - self.began
        self.watch.__exit__()
        figures = shares(self.watch, whole, steps) | arithmetic(self.setup, self.teachers)
        write_atomically(self.folder / FIGURES, json.dumps(figures, indent=1))
        if not self.setup.config.as_json:
            shown(figures)
        info(f"profile: {self.folder / FIGURES}")

    def traced(self) -> None:
        assert self.trace
        self.watch.__exit__()
        self.trace.__exit__(None, None, None)
        self.trace.export_chrome_trace(str(self.folder / TRACE))
        self.trace = None
        info(f"trace of {TRACED} steps: {self.folder / TRACE} (ui.perfetto.dev shows it)")


def shares(watch: StepTimer, whole: float, steps: int) -> dict[str, Any]:
    """Milliseconds of a step by part: of the loop, and of the threads beside it."""
    own = {name: 1e3 * seconds / steps for name, seconds in watch.seconds.items()}
    own[REST] = 1e3 * whole / steps - sum(own.values())
    beside = {name: 1e3 * seconds / steps for name, seconds in watch.background_seconds.items()}
    return {"steps": steps, "step_ms": 1e3 * whole / steps, "parts_ms": own, "beside_ms": beside}


def arithmetic(setup: TrainSetup[Any], teachers: TeacherEnsemble | None) -> dict[str, Any]:
    """GFLOP of a step by part, and the device's measured peak in GFLOP a second; without what cannot be counted."""
    images = setup.loader.size
    student = gflop(setup.student.classifier.net, setup.config.side or 0)
    found = {} if student is None else {"student": student * images, "backward": 2 * student * images}
    teacher = _teacher_gflop(teachers) if teachers else None
    if teacher is not None:
        found["teacher"] = teacher * images
    return {"gflop": found, "peak_gflops": peak(setup.loop.device, setup.loop.precision)}


def _teacher_gflop(teachers: TeacherEnsemble) -> float | None:
    """GFLOP of all teachers for one image; None where one cannot be counted."""
    each = [gflop(member.frozen.classifier.net, member.side) for member in teachers.members]
    return None if None in each else sum(one for one in each if one is not None)


def peak(device: torch.device, precision: str) -> float:
    """Billions of operations a second of a product of large matrices: what could be had at best."""
    size = SQUARE.get(device.type, 8192)
    dtype = devices.DTYPES.get(precision, torch.float32)
    one, other = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times: list[float] = []
    until = time.perf_counter() + PEAK_SECONDS
    while len(times) < AT_LEAST or time.perf_counter() < until:
        began = time.perf_counter()
        one @ other
        devices.synchronize(device)
        times.append(time.perf_counter() - began)
    return 2 * size**3 / min(times) / 1e9


def shown(figures: dict[str, Any]) -> None:
    """A table for people."""
    rows = []
    for name, took in sorted(figures["parts_ms"].items(), key=lambda pair: -pair[1]):
        counted = figures["gflop"].get(name)
        speed = counted / (took / 1e3) if counted and took > 0 else None
        of_peak = f"{100 * speed / figures['peak_gflops']:.0f} %" if speed else ""
        rows.append([name, f"{took:,.1f}", f"{100 * took / figures['step_ms']:.1f} %", of_peak])
    for name, took in figures["beside_ms"].items():
        rows.append([f"{name}, in threads beside", f"{took:,.1f}", "", ""])
    rows.append(["a step", f"{figures['step_ms']:,.1f}", "100 %", ""])
    peak_told = f"{figures['peak_gflops'] / 1e3:,.2f} TFLOP/s"
    print_table(f"where a step goes, of {figures['steps']}", ["part", "ms", "of the step", f"of {peak_told}"], rows)
