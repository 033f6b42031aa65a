"""Measures how much memory loading a network takes beyond its weights.

    python benchmarks/loading.py [--model resnetv2_101x3_bit]

Writes the network in every format (about three times its weights, in a temporary folder), then loads each in a process
of its own and reports the growth of its peak memory as a multiple of the weights.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from funmatch.models import bit
from funmatch.models.load import load
from funmatch.models.save import save


def write(name: str, folder: Path) -> dict[str, tuple[str, Path | None]]:
    """Writes the network in every format; returns the name of each and its file of weights."""
    model = load(name, classes=37)
    (folder / "timm").mkdir()
    save(model, folder / "timm", card=model.card, about={})
    state = model.net.state_dict()
    torch.save(state, folder / "w.pt")
    found: dict[str, tuple[str, Path | None]] = {
        "folder": (str(folder / "timm"), None),
        ".safetensors": (name, folder / "timm" / "model.safetensors"),
        ".pt": (name, folder / "w.pt"),
    }
    if name.endswith("_bit"):
        depth, width = name.removeprefix("resnetv2_").removesuffix("_bit").split("x")
        units = next(units for units, known in bit.DEPTHS.items() if known == int(depth))
        names = [bit.STEM, "group_norm/gamma", "group_norm/beta", "head/kernel", "head/bias"]
        for block, count in enumerate(units, 1):
            for unit in range(1, count + 1):
                place = f"block{block}/unit{unit:02}"
                names += [f"{place}/a/proj/standardized_conv2d/kernel"] if unit == 1 else []
                for part in "abc":
                    names += [f"{place}/{part}/group_norm/gamma", f"{place}/{part}/group_norm/beta"]
                    names += [f"{place}/{part}/standardized_conv2d/kernel"]
        arrays = {each: state[bit.timm_name(each)].numpy() for each in names}
        arrays = {each: array.transpose(2, 3, 1, 0) if array.ndim == 4 else array for each, array in arrays.items()}
        np.savez(folder / f"x{width}.npz", **arrays)
        found[".npz"] = (str(folder / f"x{width}.npz"), None)
    return found


def peak() -> int:
    """Peak memory of this process in bytes. (`getrusage` would start from the parent's.)"""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def grown(name: str, weights: str) -> None:
    """Loads a network and prints how much the peak of this process's memory grew."""
    before = peak()
    began = time.monotonic()
    model = load(name, weights=Path(weights) if weights else None, pretrained=True)
    took = time.monotonic() - began
    size = sum(tensor.nbytes for tensor in model.net.state_dict().values())
    print(f"{size / 1e9:.2f} GB of weights; peak + {(peak() - before) / size:.2f} times the weights; {took:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnetv2_101x3_bit")
    parser.add_argument("--load", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        grown(*options.load)
        return
    with tempfile.TemporaryDirectory() as folder:
        for kind, (name, weights) in write(options.model, Path(folder)).items():
            command = [sys.executable, __file__, "--load", name, str(weights or "")]
            print(f"{kind:<13}", subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())


if __name__ == "__main__":
    main()
