"""Collects what was measured into the result that `--json` prints."""

import math
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from funmatch.config.finished.benchmark import Benchmark
from funmatch.models.flops import gflop
from funmatch.runtime import devices
from funmatch.shipping.benchmark.candidates import Candidate
from funmatch.shipping.benchmark.formats import Machine, Subject
from funmatch.shipping.benchmark.scores import EvaluationImages


def build_result(
    options: Benchmark,
    machine: Machine,
    images: EvaluationImages | None,
    subjects: Sequence[Subject],
    candidates: Sequence[Candidate],
) -> dict[str, Any]:
    """Returns the result of the command: where and how was measured, the models, and a row for each format."""
    models = [
        {
            "label": each.label,
            "name": each.name,
            "parameters": each.trained.classifier.count_parameters(),
            "gflop": gflop(each.trained.classifier.net, each.preprocessing.side),
            "side": each.preprocessing.side,
            "step": each.trained.step,
        }
        for each in subjects
        if each.model
    ]
    return {
        "machine": describe_machine(machine),
        "versions": dict(_versions()),
        "device": str(machine.device),
        "precision": machine.precision,
        "threads": machine.threads,
        "batches": list(options.batches),
        "spread": options.largest_spread,
        "max_seconds": options.max_seconds,
        "data": images.cache.name if images else None,
        "split": images.split.name if images else None,
        "images": len(images.split) if images else None,
        "of_images": images.available if images else None,
        "models": models,
        "results": [_row(each) for each in candidates],
    }


def describe_machine(machine: Machine) -> str:
    """Names the processor, its cores, and the accelerator if one is used."""
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    accelerator = "" if machine.device.type == "cpu" else f", {devices.machine_signature(machine.device)[0]}"
    return f"{name} ({platform.machine()}), {cores()} cores{accelerator}"


def _versions() -> Iterator[tuple[str, str]]:
    for name in ("funmatch", "torch", "timm", "onnxruntime", "openvino"):
        with suppress(PackageNotFoundError):
            yield name, version(name).partition("-")[0]


def _row(candidate: Candidate) -> dict[str, Any]:
    """Returns the row of a candidate in the result of the command; None where something was not measured."""
    prepared, latency, throughput = candidate.prepared, candidate.latency, candidate.throughput
    seconds = None if latency is None else (latency.median, latency.percentile(0.9), latency.percentile(0.99))
    ms, ms_p90, ms_p99 = (None if each is None else 1e3 * each for each in seconds or (None, None, None))
    return {
        "model": candidate.subject.label if candidate.format else "",
        "format": candidate.format or candidate.subject.name,
        "label": candidate.label,
        "status": candidate.status,
        "reason": candidate.reason,
        "device": prepared.device if prepared else None,
        "bytes": prepared.file_bytes if prepared else None,
        "top1": candidate.scores.get("top1"),
        "agreement": candidate.scores.get("agreement"),
        "agreement_eager": candidate.scores.get("agreement_eager"),
        "ms": ms,
        "ms_p90": ms_p90,
        "ms_p99": ms_p99,
        "spread": _finite(latency.spread) if latency else None,
        "calls": latency.calls if latency else 0,
        "rounds": len(latency.rounds) if latency else 0,
        "batch": throughput.images if throughput else None,
        "images_per_second": throughput.images / throughput.median if throughput else None,
        "images_per_second_spread": _finite(throughput.spread) if throughput else None,
        "memory_bytes": candidate.memory,
    }


def _finite(value: float) -> float | None:
    """Returns a number, or None for infinity, which JSON does not have."""
    return value if math.isfinite(value) else None


def cores() -> int:
    """Returns the cores that this process may use, which in a container are fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
