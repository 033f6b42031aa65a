"""Profiles the first steps of a run (`--profile`): time by part, share of the measured peak, and a trace."""

import json
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import profile, record_function

from funmatch.models.ensemble import TeacherEnsemble
from funmatch.models.flops import gflop
from funmatch.ops.native import linear
from funmatch.runtime import devices, env
from funmatch.runtime.disk.files import write_atomically
from funmatch.runtime.log import info, print_table
from funmatch.runtime.timing import StepTimer
from funmatch.training.setup import TrainSetup

WARM, TIMED, TRACED = 5, 20, 3
"""Steps of warm-up, steps that are timed, and steps in the trace."""
TRACE, METRICS = "trace.json", "profile.json"
MATRIX_SIDE = {"cpu": 2048}
"""Side of the matrices whose product gives the measured peak, by device type; elsewhere 8192."""
PEAK_SECONDS, MIN_PRODUCTS = 0.5, 3
"""Time that the peak is measured for, and the products that it takes at least."""
REST = "all else"


@contextmanager
def profile_training(
    setup: TrainSetup[Any], teachers: TeacherEnsemble | None, folder: Path
) -> Generator[Callable[[], None]]:
    """Yields a function to call after each step; it profiles the first steps where `--profile` is set.

    Args:
        teachers: their arithmetic is counted too.
        folder: where `profile.json` and `trace.json` are written.
    """
    # One process is enough: all take the same steps.
    if not setup.config.profile or not env.is_main_process():
        yield lambda: None
        return
    profile = Profile(setup, teachers, folder)
    try:
        yield profile.after_step
    finally:
        # Also after Ctrl-C: what was timed until then is reported.
        profile.close()


class Profile:
    """Times the first steps of a run by part, then records a trace of a few more.

    Timing and tracing do not overlap, since the tracer slows every kernel launch. The trace is that of
    `torch.profiler`: Perfetto (ui.perfetto.dev) and Chrome's about:tracing show it.
    """

    def __init__(self, setup: TrainSetup[Any], teachers: TeacherEnsemble | None, folder: Path) -> None:
        self.setup, self.teachers, self.folder, self.steps = setup, teachers, folder, 0
        self.device = setup.loop.device
        self.watch = StepTimer(lambda: devices.synchronize(self.device))
        self.began = 0.0
        self.trace: profile | None = None

    def after_step(self) -> None:
        """Counts a step, and begins or ends timing and tracing after it."""
        self.steps += 1
        # The first steps allocate, compile and choose kernels, so they are not timed.
        if self.steps == WARM:
            # What is still queued belongs to the warm-up.
            devices.synchronize(self.device)
            self.began = time.perf_counter()
            self.watch.__enter__()
        elif self.steps == WARM + TIMED:
            self.report(TIMED)
            self.trace = profile()
            self.trace.__enter__()
            # Without synchronizing: the trace should show the kernels as they overlap in a real run.
            self.watch = StepTimer(lambda: None, record_function)
            self.watch.__enter__()
        elif self.steps == WARM + TIMED + TRACED:
            self.write_trace()

    def close(self) -> None:
        """Reports what was measured when a run ends early."""
        if WARM < self.steps < WARM + TIMED:
            self.report(self.steps - WARM)
        elif self.trace:
            self.write_trace()
        elif self.steps <= WARM:
            info(f"--profile needs more than {WARM} steps, but the run took only {self.steps}")

    def report(self, steps: int) -> None:
        """Writes and prints the time by part of the timed steps."""
        seconds = time.perf_counter() - self.began
        self.watch.__exit__()
        metrics = step_times(self.watch, seconds, steps) | arithmetic(self.setup, self.teachers)
        write_atomically(self.folder / METRICS, json.dumps(metrics, indent=1))
        # With --json the standard output holds nothing but the result.
        if not self.setup.config.as_json:
            print_profile(metrics)
        info(f"profile: {self.folder / METRICS}")

    def write_trace(self) -> None:
        """Ends the trace and writes it."""
        assert self.trace
        self.watch.__exit__()
        self.trace.__exit__(None, None, None)
        self.trace.export_chrome_trace(str(self.folder / TRACE))
        self.trace = None
        info(f"trace of {TRACED} steps: {self.folder / TRACE} (open it at ui.perfetto.dev)")


def step_times(watch: StepTimer, total: float, steps: int) -> dict[str, Any]:
    """Averages the timed parts over steps.

    Args:
        total: seconds of all steps.

    Returns:
        milliseconds per step: `step_ms`, `parts_ms` of the loop, which add up to it, and `beside_ms` of other threads.
    """
    loop = {name: 1e3 * seconds / steps for name, seconds in watch.seconds.items()}
    # What no timer covers, so that the parts add up to the step.
    loop[REST] = 1e3 * total / steps - sum(loop.values())
    background = {name: 1e3 * seconds / steps for name, seconds in watch.background_seconds.items()}
    return {"steps": steps, "step_ms": 1e3 * total / steps, "parts_ms": loop, "beside_ms": background}


def arithmetic(setup: TrainSetup[Any], teachers: TeacherEnsemble | None) -> dict[str, Any]:
    """Counts the arithmetic of a step, and measures the device's peak.

    Returns:
        `gflop` by part, without parts whose operations cannot be counted, and `peak_gflops` per second.
    """
    images = setup.loader.size
    student = gflop(setup.student.classifier.net, setup.config.side or 0)
    # The backward pass computes two products for each one of the forward pass: by inputs and by weights.
    parts = {} if student is None else {"student": student * images, "backward": 2 * student * images}
    teacher = _teacher_gflop(teachers) if teachers else None
    if teacher is not None:
        parts["teacher"] = teacher * images
    return {"gflop": parts, "peak_gflops": peak(setup.loop.device, setup.loop.precision)}


def _teacher_gflop(teachers: TeacherEnsemble) -> float | None:
    """Returns the GFLOP of all teachers for one image; None where one cannot be counted."""
    # All or nothing: a part of the arithmetic would look like a low share of the peak.
    each = [gflop(member.frozen.classifier.net, member.side) for member in teachers.members]
    return None if None in each else sum(gflops for gflops in each if gflops is not None)


def peak(device: torch.device, precision: str) -> float:
    """Measures the GFLOP/s of a product of large matrices, which a network cannot exceed."""
    size = MATRIX_SIDE.get(device.type, 8192)
    # In the run's own precision: its peak is what the run could reach.
    dtype = devices.DTYPES.get(precision, torch.float32)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    # The libraries that torch has on a CPU differ by half.
    packed = device.type == "cpu" and precision != "fp16" and torch.backends.mkldnn.is_available()
    return max(_product_speed(product, left, right) for product in (torch.matmul, *[linear.product] * packed))


def _product_speed(product: Callable[[Tensor, Tensor], Tensor], left: Tensor, right: Tensor) -> float:
    """Returns the GFLOP/s of a product of two square matrices."""
    size, device = len(left), left.device
    times: list[float] = []
    until = time.perf_counter() + PEAK_SECONDS
    # The fastest of several: the first ones start the library and raise the clock.
    while len(times) < MIN_PRODUCTS or time.perf_counter() < until:
        began = time.perf_counter()
        product(left, right)
        # Without it only the launch would be timed.
        devices.synchronize(device)
        times.append(time.perf_counter() - began)
    return 2 * size**3 / min(times) / 1e9


def print_profile(metrics: dict[str, Any]) -> None:
    """Prints a table of the parts, the slowest first."""
    rows = []
    for name, took in sorted(metrics["parts_ms"].items(), key=lambda pair: -pair[1]):
        counted = metrics["gflop"].get(name)
        speed = counted / (took / 1e3) if counted and took > 0 else None
        # Parts without counted operations, e.g. waiting, have no share of the peak.
        of_peak = f"{100 * speed / metrics['peak_gflops']:.0f} %" if speed else ""
        rows.append([name, f"{took:,.1f}", f"{100 * took / metrics['step_ms']:.1f} %", of_peak])
    # These overlap the loop, so they have no share of the step.
    for name, took in metrics["beside_ms"].items():
        rows.append([f"{name} (background threads)", f"{took:,.1f}", "", ""])
    rows.append(["whole step", f"{metrics['step_ms']:,.1f}", "100 %", ""])
    peak_speed = f"{metrics['peak_gflops'] / 1e3:,.2f} TFLOP/s"
    print_table(
        f"time by part, mean of {metrics['steps']} steps", ["part", "ms", "of the step", f"of {peak_speed}"], rows
    )
