"""Compares the frozen teacher with timm's own network: speed, and closeness of the outputs.

    python benchmarks/teacher.py [--models resnetv2_50x3_bit resnetv2_101x1_bit] [--side 128] [--batch 16] [--turns 7]
    python benchmarks/teacher.py --device auto --models resnetv2_101x3_bit resnetv2_152x2_bit --batch 512

The contenders alternate in one process, so that a drift of the machine affects all of them: timm's network in
evaluation mode under `torch.inference_mode` in fp32 (on the CPU) and under autocast, eager and compiled; and the
frozen teacher in the forms that a run may use. Weights are random. On an accelerator, it also measures the peak of a
large bf16 matrix product and reports the share of it that each reaches (a multiply-add counts as two).
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import timm
import torch
from torch import Tensor

from funmatch.models.flops import gflop
from funmatch.models.inference.frozen import Frozen
from funmatch.models.inference.modes import InferenceMode
from funmatch.models.load import load
from funmatch.ops.distances import kl
from funmatch.runtime import devices


def timed(run: Callable[[], Tensor]) -> float:
    began = time.perf_counter()
    run().sum().item()  # which waits for the device
    return time.perf_counter() - began


def matrix_peak(device: torch.device, size: int = 8192) -> float:
    """TFLOP/s of a product of bf16 matrices, the best of several."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    timed(lambda: a @ b)
    return 2 * size**3 * 10 / min(timed(lambda: [a @ b for _ in range(10)][-1]) for _ in range(5)) / 1e12


def contenders(name: str, views: Tensor, options: argparse.Namespace) -> dict[str, Callable[[], Tensor]]:
    """The contenders by name: functions from views to logits."""
    torch.manual_seed(0)
    classifier = load(name, classes=options.classes)
    state = {key: value.clone() for key, value in classifier.net.state_dict().items()}
    device = views.device

    def fresh() -> torch.nn.Module:
        net = timm.create_model(name, num_classes=options.classes)
        net.load_state_dict(state)
        return net.eval().to(device)

    def theirs(net: Callable[[Tensor], Tensor], *, autocast: bool) -> Callable[[], Tensor]:
        normalised = (views - 0.5) / 0.5

        def run() -> Tensor:
            with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                return net(normalised)

        return run

    def ours(form: InferenceMode) -> Callable[[], Tensor]:
        model = load(name, classes=options.classes)
        model.net.load_state_dict(state)
        frozen = Frozen(model.to(device), form)
        return lambda: frozen(views)

    found = {"timm, fp32": theirs(fresh(), autocast=False)}
    found["timm, autocast bf16"] = theirs(fresh(), autocast=True)
    if device.type != "cpu":
        last = fresh().to(memory_format=torch.channels_last)
        found["timm, autocast bf16, channels last"] = theirs(last, autocast=True)
    forms = [InferenceMode(), InferenceMode(precision="bf16"), InferenceMode(precision="bf16", layout="contiguous")]
    forms.append(
        InferenceMode(precision="fp16") if device.type != "cpu" else InferenceMode(precision="bf16", native=True)
    )
    if options.compile:
        found["timm, autocast bf16, compiled"] = theirs(torch.compile(fresh(), dynamic=False), autocast=True)
        forms.append(InferenceMode(precision="bf16", compiled=True))
    return found | {f"frozen: {form}": ours(form) for form in forms}


def measure(name: str, options: argparse.Namespace, device: torch.device) -> dict:
    """Seconds and closeness to fp32 of each contender."""
    views = torch.rand(options.batch, 3, options.side, options.side, generator=torch.Generator().manual_seed(0))
    views = views.to(device).contiguous(memory_format=torch.channels_last)
    running = contenders(name, views, options)
    truth = next(iter(running.values()))().float()
    distances = {each: kl(run().float(), truth).mean().item() for each, run in running.items()}
    seconds: dict[str, list[float]] = {each: [] for each in running}
    for _ in range(options.turns):
        for each, run in running.items():
            seconds[each].append(timed(run))
    first = seconds["timm, fp32"]
    return {
        each: {
            "ms": [round(1e3 * value, 1) for value in (statistics.median(taken), min(taken), max(taken))],
            "images_per_second": options.batch / statistics.median(taken),
            "ratio": [
                pick([a / b for a, b in zip(first, taken, strict=True)]) for pick in (statistics.median, min, max)
            ],
            "kl": distances[each],
        }
        for each, taken in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnetv2_50x3_bit", "resnetv2_101x1_bit"])
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--classes", type=int, default=37)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    device = devices.pick_device(options.device)
    peak = None if device.type == "cpu" else matrix_peak(device)
    versions = f"torch {torch.__version__}, timm {timm.__version__}"
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, {device}, {versions}")
    if peak:
        print(f"{torch.get_device_module(device).get_device_name(device)}: {peak:.0f} TFLOP/s of bf16 matrices")
    found = {}
    for name in options.models:
        found[name] = measure(name, options, device)
        operations = gflop(load(name, classes=options.classes).net, options.side) or 0.0
        print(f"\n{name}, {options.side} px, batch {options.batch}, {operations:.1f} GFLOP an image\n")
        print(
            "| | ms (least … most) | images/s | times timm fp32 (least … most) | KL |" + (" of peak |" if peak else "")
        )
        print("|---|---|---|---|---|" + ("---|" if peak else ""))
        for each, figures in found[name].items():
            ms, ratio = figures["ms"], figures["ratio"]
            share = f" {100 * figures['images_per_second'] * operations / 1e3 / peak:.0f} % |" if peak else ""
            print(
                f"| {each} | {ms[0]} ({ms[1]} … {ms[2]}) | {figures['images_per_second']:.0f} "
                f"| {ratio[0]:.2f} ({ratio[1]:.2f} … {ratio[2]:.2f}) | {figures['kl']:.1e} |{share}"
            )
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main()
