"""Picks devices and precisions, and seeds and measures the device that a run uses."""

import os
import platform
from contextlib import AbstractContextManager

import torch

from funmatch.errors import InputError
from funmatch.runtime import env

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """Returns the device of a name; `auto` is the accelerator if there is one, else the CPU.

    With several processes each gets an accelerator of its own.

    Args:
        name: auto, cpu, cuda, cuda:1, mps, …

    Raises:
        InputError: the machine has no such device.
    """
    # torch's generic accelerator, not torch.cuda: it covers MPS, XPU and others, of which a machine has one kind.
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return accelerator or torch.device("cpu")
    available = f"available: cpu{f', {accelerator.type}' if accelerator else ''}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"unknown device {name!r}; {available}") from None
    if device.type != "cpu" and (accelerator is None or device.type != accelerator.type):
        raise InputError(f"no {device.type} device on this machine; {available}")
    if device.type != "cpu" and (device.index or 0) >= torch.accelerator.device_count():
        raise InputError(f"no device {name}; this machine has {torch.accelerator.device_count()} of {device.type}")
    return device if device.type == "cpu" or env.world_size() == 1 else _own_accelerator(device)


def _own_accelerator(device: torch.device) -> torch.device:
    """Returns this process's accelerator, by its local rank."""
    if device.index is not None:
        raise InputError(f"each process uses its own accelerator; pass --device {device.type}, not {device}")
    # Without this check two processes would share an accelerator, or one would fail deep inside NCCL.
    if env.local_world_size() > torch.accelerator.device_count():
        raise InputError(
            f"{env.local_world_size()} processes, but this machine has {torch.accelerator.device_count()} of "
            f"{device.type}; start one process per accelerator, or pass --device cpu"
        )
    return torch.device(device.type, env.local_rank())


def resolve_precision(name: str, device: torch.device) -> str:
    """Resolves `auto`: bf16 on accelerators that support it, fp16 on others, fp32 on the CPU."""
    if name != "auto":
        return name
    # Whether bf16 pays on a CPU depends on the network (1.6 to 2.3 times as fast for BiT's R50x1, 0.67 for a
    # MobileNetV3-L), so there it is measured, by `training.student.acceleration`.
    if device.type == "cpu":
        return "fp32"
    supported = getattr(torch.get_device_module(device), "is_bf16_supported", lambda: True)
    return "bf16" if supported() else "fp16"


def teacher_precisions(name: str, device: torch.device) -> tuple[str, ...]:
    """Returns the precisions in which a frozen teacher may compute.

    Args:
        name: fp32, bf16 or fp16, which is then the only one; or auto, for all that the hardware is fast in.
        device: where the teacher runs.

    Returns:
        the precisions to measure; fp32 is among them if the name is auto.
    """
    if name != "auto":
        return (name,)
    if device.type == "cpu":
        # Private functions: torch has no public ones, and without the instructions these types are emulated and slow.
        fast = {
            "bf16": torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(),
            "fp16": torch.ops.mkldnn._is_mkldnn_fp16_supported(),
        }
        return (*(precision for precision, supported in fast.items() if supported), "fp32")
    return ("bf16", "fp16", "fp32") if resolve_precision("auto", device) == "bf16" else ("fp16", "fp32")


def machine_signature(device: torch.device) -> tuple[object, ...]:
    """Returns what a measurement on a device depends on: hardware, library and number of threads."""
    # The CPU's capability and the number of threads count for accelerators too: the host may be the bottleneck.
    name = "cpu" if device.type == "cpu" else torch.get_device_module(device).get_device_name(device)
    return name, platform.machine(), torch.backends.cpu.get_cpu_capability(), torch.__version__, torch.get_num_threads()


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Returns the context in which networks run: autocast for bf16 and fp16, none for fp32."""
    # The dtype has to be valid even where autocast is off.
    return torch.autocast(device.type, DTYPES.get(precision, torch.bfloat16), enabled=precision in DTYPES)


def loss_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """Returns the scaler that keeps gradients in fp16 from vanishing; it does nothing for other precisions."""
    # A disabled scaler passes everything through, so that the loop has one path for all precisions.
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def seed_networks(seed: int, step: int, device: torch.device, rank: int = 0) -> None:
    """Seeds dropout and the like from (seed, step, rank), so that a resumed run drops the same units.

    Args:
        seed: the run's.
        step: the step that follows.
        device: where the networks run.
        rank: of this process, whose images are others than those of the rest.
    """
    # Odd 64-bit constants spread neighbouring steps and ranks over all seeds: sums of small numbers would collide.
    mixed = (seed * 0x9E3779B97F4A7C15 + step + rank * 0xD1B54A32D192ED03) % 2**63
    if device.type == "cpu":
        torch.default_generator.manual_seed(mixed)  # `torch.manual_seed` would query every kind of device, each step
    else:
        torch.manual_seed(mixed)


def empty_cache(device: torch.device) -> None:
    """Releases an accelerator's cached memory and resets its peak."""
    # Both, since this is called after an attempt that did not fit: the next one must not be charged with its peak.
    if device.type != "cpu":
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Returns the peak of an accelerator's allocated memory in bytes; 0 for the CPU, where it is unknown."""
    return 0 if device.type == "cpu" else torch.accelerator.max_memory_allocated(device)


def device_memory(device: torch.device) -> int:
    """Returns an accelerator's total memory in bytes; 0 for the CPU, and where the backend does not report it."""
    query = getattr(torch.get_device_module(device), "mem_get_info", None) if device.type != "cpu" else None
    return query(device)[1] if query else 0


def synchronize(device: torch.device) -> None:
    """Waits until an accelerator has finished its queued work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def spare_threads() -> int:
    """Returns how many threads may prepare views, beside the one that drives the model: 1 to 8."""
    # The cores that this process may use, which in a container are fewer than the machine's.
    cores = len(os.sched_getaffinity(0)) // env.local_world_size() if hasattr(os, "sched_getaffinity") else 2
    # More than eight gain nothing: the accelerator or the memory is the bottleneck by then.
    return max(1, min(8, cores - 1))
