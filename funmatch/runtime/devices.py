"""Processes, devices, precision and the generators that networks draw from."""

import os
import platform
from contextlib import AbstractContextManager

import torch

from funmatch.errors import InputError
from funmatch.runtime import env

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """The device that a person named; `auto` is the accelerator, if there is one.

    Raises:
        InputError: no such device here.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return accelerator or torch.device("cpu")
    known = f"here: cpu{f', {accelerator.type}' if accelerator else ''}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"unknown device {name!r}; {known}") from None
    if device.type != "cpu" and (accelerator is None or device.type != accelerator.type):
        raise InputError(f"no {device.type} device on this machine; {known}")
    if device.type != "cpu" and (device.index or 0) >= torch.accelerator.device_count():
        raise InputError(f"no device {name}; there are {torch.accelerator.device_count()} of {device.type}")
    return device if device.type == "cpu" or env.world_size() == 1 else _own_accelerator(device)


def _own_accelerator(device: torch.device) -> torch.device:
    """The accelerator of this process, where several share the work."""
    if device.index is not None:
        raise InputError(f"each process takes an accelerator of its own: --device {device.type}, not {device}")
    if env.local_world_size() > torch.accelerator.device_count():
        raise InputError(
            f"{env.local_world_size()} processes, but this machine has {torch.accelerator.device_count()} of "
            f"{device.type}; start one for each, or say --device cpu"
        )
    return torch.device(device.type, env.local_rank())


def resolve_precision(name: str, device: torch.device) -> str:
    """`auto` becomes bf16 where an accelerator has it, fp16 where it has not, fp32 on the CPU."""
    if name != "auto":
        return name
    if device.type == "cpu":
        return "fp32"
    supported = getattr(torch.get_device_module(device), "is_bf16_supported", lambda: True)
    return "bf16" if supported() else "fp16"


def teacher_precisions(name: str, device: torch.device) -> tuple[str, ...]:
    """The arithmetic that a frozen teacher may be computed in: as said, or all that the hardware is fast in."""
    if name != "auto":
        return (name,)
    if device.type == "cpu":
        fast = {
            "bf16": torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(),
            "fp16": torch.ops.mkldnn._is_mkldnn_fp16_supported(),
        }
        return (*(precision for precision, has in fast.items() if has), "fp32")
    return ("bf16", "fp16", "fp32") if resolve_precision("auto", device) == "bf16" else ("fp16", "fp32")


def machine_signature(device: torch.device) -> tuple[object, ...]:
    """What a measurement on a device depends on: the hardware, the library, and how many threads compute."""
    name = "cpu" if device.type == "cpu" else torch.get_device_module(device).get_device_name(device)
    return name, platform.machine(), torch.backends.cpu.get_cpu_capability(), torch.__version__, torch.get_num_threads()


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """The context in which networks run: fp32 as they are, else autocast."""
    return torch.autocast(device.type, DTYPES.get(precision, torch.bfloat16), enabled=precision in DTYPES)


def loss_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """Scales the loss where gradients in fp16 would vanish; does nothing otherwise."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def seed_networks(seed: int, step: int, device: torch.device, rank: int = 0) -> None:
    """Makes dropout and its like a function of (seed, step, rank), so that a resumed run drops the same units.

    Each process has other images of the global batch, and drops other units for them.
    """
    mixed = (seed * 0x9E3779B97F4A7C15 + step + rank * 0xD1B54A32D192ED03) % 2**63
    if device.type == "cpu":
        torch.default_generator.manual_seed(mixed)  # without asking every kind of device there could be
    else:
        torch.manual_seed(mixed)


def empty_cache(device: torch.device) -> None:
    """Gives memory that is kept for later back, and begins a new peak."""
    if device.type != "cpu":
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """The most bytes that were in use at once on an accelerator; 0 for the CPU, where this is not known."""
    return 0 if device.type == "cpu" else torch.accelerator.max_memory_allocated(device)


def device_memory(device: torch.device) -> int:
    """Bytes of memory that an accelerator has of its own; 0 for the CPU, and where nobody says."""
    asked = getattr(torch.get_device_module(device), "mem_get_info", None) if device.type != "cpu" else None
    return asked(device)[1] if asked else 0


def synchronize(device: torch.device) -> None:
    """Waits until a device has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def spare_threads() -> int:
    """Threads for making views, beside the one that drives the model."""
    cores = len(os.sched_getaffinity(0)) // env.local_world_size() if hasattr(os, "sched_getaffinity") else 2
    return max(1, min(8, cores - 1))
