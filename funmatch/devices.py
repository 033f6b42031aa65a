"""Processes, devices, precision and the generators that networks draw from."""

import os
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from funmatch.data.loader import Batch
from funmatch.errors import InputError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def pick(name: str) -> torch.device:
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
    return device


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


def described(device: torch.device) -> tuple[object, ...]:
    """What a measurement on a device depends on: the hardware, the library, and how many threads compute."""
    name = "cpu" if device.type == "cpu" else torch.get_device_module(device).get_device_name(device)
    return name, platform.machine(), torch.backends.cpu.get_cpu_capability(), torch.__version__, torch.get_num_threads()


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """The context in which networks run: fp32 as they are, else autocast."""
    return torch.autocast(device.type, DTYPES.get(precision, torch.bfloat16), enabled=precision in DTYPES)


def loss_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """Scales the loss where gradients in fp16 would vanish; does nothing otherwise."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def seed_networks(seed: int, step: int, device: torch.device) -> None:
    """Makes dropout and its like a function of (seed, step), so that a resumed run drops the same units."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step) % 2**63
    if device.type == "cpu":
        torch.default_generator.manual_seed(mixed)  # without asking every kind of device there could be
    else:
        torch.manual_seed(mixed)


def pinner(device: torch.device) -> Callable[[Batch], Batch] | None:
    """Copies a batch into pinned memory, from where an accelerator fetches it without being waited for."""
    return None if device.type == "cpu" else lambda batch: batch.each(torch.Tensor.pin_memory)


def spare_threads() -> int:
    """Threads for making views, beside the one that drives the model."""
    return max(1, min(8, len(os.sched_getaffinity(0)) - 1 if hasattr(os, "sched_getaffinity") else 1))
