"""Compares a step of distillation with timm's components over families of networks, and with the machine's peak.

    python benchmarks/pairs.py [--rounds 3] [--pairs resnet50:resnet18:128:32 ...] [--out results/pairs-cpu.md]

As `versus_timm.py`, whose turns it takes: each measurement is a process of its own, from JPEGs, and ours is `funmatch
distill` with nothing chosen, in a run of 400 steps. Both networks of a pair are first trained for some steps with
labels, so that BatchNorm and attention see numbers as in use. In the first round all of timm's variants are measured;
further rounds take ours and the best of them in turn. Shares are those of `--profile`: of a matrix product's speed in
the precision of the run. The images are crops of scikit-learn's two photographs, or of the folder `--images`.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import versus_timm  # pyrefly: ignore[missing-import]
from PIL import Image
from sklearn.datasets import load_sample_images

PAIRS = (
    "resnetv2_101x1_bit:resnetv2_50x1_bit:128:32",
    "resnetv2_50x1_bit:mobilenetv3_large_100:128:32",
    "resnet50:resnet18:128:32",
    "resnet50d:resnet18d:128:32",
    "regnety_016:regnety_004:128:32",
    "tf_efficientnet_lite2:mobilenetv3_small_100:128:64",
    "efficientnet_b0:mobilenetv4_conv_small:128:32",
    "convnext_tiny:mobilenetv3_large_100:128:32",
    "convnext_tiny:convnext_atto:128:32",
    "vit_small_patch16_224:vit_tiny_patch16_224:224:32",
    "vit_base_patch16_clip_224:deit_small_patch16_224:224:16",
    "swin_tiny_patch4_window7_224:resnet18:224:16",
)
"""Teacher, student, side and batch."""
TIMM = {
    "timm, bf16": ("bf16",),
    "timm, bf16, channels last": ("bf16", "last"),
    "timm, fp32, channels last": ("last",),
    "timm, bf16, channels last, compiled": ("bf16", "last", "compiled"),
    "timm, fp32, channels last, compiled": ("last", "compiled"),
}
STEPS, TRAINED, IMAGES = 400, 12, 320
REFUSED = ("rejected", "native", "training ", "using", "WARNING")


@dataclass
class Measured:
    """Seconds a step of each contender by round, and what a run of ours says.

    Attributes:
        begin: seconds until the first step, by contender.
        said: lines of our run about its choices.
        profile: its `profile.json`.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    begin: dict[str, float] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)
    profile: dict[str, Any] = field(default_factory=dict)


def make_images(folder: Path, count: int) -> None:
    """Writes crops of two photographs as JPEGs of 384 × 384 pixels."""
    rng = np.random.default_rng(0)
    photographs = load_sample_images().images
    for i in range(count):
        photograph = photographs[i % 2]
        size = int(rng.integers(224, 385))
        top, left = (int(rng.integers(0, edge - size + 1)) for edge in photograph.shape[:2])
        crop = Image.fromarray(photograph[top : top + size, left : left + size]).resize((384, 384))
        path = folder / "train" / f"{i % versus_timm.CLASSES}" / f"{i:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        crop.save(path, quality=92)


def train_some(name: str, options: argparse.Namespace, folder: Path, into: Path) -> None:
    """Trains a network for some steps with labels, so that its statistics are no random ones."""
    torch.manual_seed(0)
    net = versus_timm.network(name, 0, options.side).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-4)
    paths = sorted((folder / "images" / "train").rglob("*.jpg"))
    rng = np.random.default_rng(0)
    card = net.pretrained_cfg
    mean, std = (torch.tensor(card[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    for _ in range(TRAINED):
        chosen = [paths[i] for i in rng.choice(len(paths), 16, replace=False)]
        pixels = [np.asarray(Image.open(path).resize((options.side, options.side))) for path in chosen]
        views = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
        labels = torch.tensor([int(path.parent.name) for path in chosen])
        with torch.autocast("cpu", torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(net((views - mean) / std), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.save(net.state_dict(), into)


def our_turn(folder: Path, options: argparse.Namespace, out: Path) -> tuple[float, float, list[str]]:
    """Returns seconds a step of `funmatch distill`, seconds until its first one, and what it says of its choices."""
    more = ("--student-weights", folder / "student.pt", "--profile")
    command = versus_timm.our_command(folder, options, STEPS, out, *more)
    log = out.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.time()
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
        begin = 0.0
        while not (out / "profile.json").is_file():
            if process.poll() is not None:
                sys.exit(log.read_text())
            time.sleep(0.2)
            metrics = out / "metrics.jsonl"
            if not begin and metrics.is_file() and '"step"' in metrics.read_text():
                begin = time.time() - began
        process.kill()
        process.wait()
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    steps = [record for record in records if record["event"] == "step"]
    # The trace, after which `profile.json` is written, is slow: only steps before it count.
    rates = [record["images_per_second"] for record in steps[versus_timm.WARM : 25]]
    seconds = options.batch / statistics.median(rates)
    said = [line for line in log.read_text().splitlines() if any(word in line for word in REFUSED)]
    return seconds, begin, said


def timm_turn(folder: Path, options: argparse.Namespace, name: str) -> tuple[float, float]:
    """Returns seconds a step of one of timm's variants, and seconds until its first one has been taken."""
    argv = [sys.executable, __file__, "--turn", str(folder), "--variant", name, "--pairs", options.pair]
    began = time.time()
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    seconds = float(done.stdout.split()[-1])
    return seconds, time.time() - began - seconds * (options.steps + versus_timm.WARM)


def measure(folder: Path, options: argparse.Namespace) -> Measured:
    """Measures a pair in rounds; writes its lines of progress."""
    found, contenders = Measured(), [*options.variants]
    for number in range(options.rounds):
        out = folder / "runs" / f"{options.pair.replace(':', '-')}-{number}"
        seconds, begin, said = our_turn(folder, options, out)
        found.seconds.setdefault("funmatch", []).append(seconds)
        if number == 0:
            # Of the first run on this machine, which measures and remembers.
            found.begin["funmatch"], found.said = begin, said
        found.profile = json.loads((out / "profile.json").read_text())
        for name in contenders:
            theirs, begin = timm_turn(folder, options, name)
            found.seconds.setdefault(name, []).append(theirs)
            found.begin.setdefault(name, begin)
            print(f"{options.pair} round {number}: ours {seconds:.3f}, {name} {theirs:.3f}", flush=True)
        # The opponent of further rounds is the one that was best.
        contenders = [min(contenders, key=lambda name: found.seconds[name][-1])]
    return found


def rows(pair: str, found: Measured) -> tuple[str, float]:
    """Returns a line of the table, and the ratio to the best of timm's variants."""
    best = min((name for name in found.seconds if name != "funmatch"), key=lambda name: found.seconds[name][0])
    ours = found.seconds["funmatch"]
    ratios = [theirs / mine for theirs, mine in zip(found.seconds[best], ours, strict=True)]
    images = int(pair.split(":")[-1])
    profile = found.profile
    shares = []
    for part in ("teacher", "student", "backward"):
        took, counted = profile["parts_ms"].get(part), profile["gflop"].get(part)
        shares.append(f"{100 * counted / (took / 1e3) / profile['peak_gflops']:.0f} %" if took and counted else "")
    networks = sum(profile["parts_ms"].get(part, 0) for part in ("teacher", "student", "backward", "optimizer"))
    whole = [found.begin[name] + STEPS * statistics.median(found.seconds[name]) for name in (best, "funmatch")]
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} … {max(ratios):.2f})"
    cells = [
        pair.replace(":", ", ", 3).replace(", ", " → ", 1), f"{images / statistics.median(found.seconds[best]):.1f}",
        best.removeprefix("timm, "), f"{images / statistics.median(ours):.1f}", spread, f"{whole[0] / whole[1]:.2f}",
        *shares, f"{100 - 100 * networks / profile['step_ms']:.1f} %",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |", statistics.median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="timed steps of timm's")
    parser.add_argument("--pairs", nargs="+", default=PAIRS, help="teacher:student:side:batch")
    parser.add_argument("--out", type=Path, help="file of the table")
    parser.add_argument("--variants", nargs="+", default=[*TIMM], choices=[*TIMM], help="of timm, in the first round")
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--turn", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    options = parser.parse_args()

    def chosen(pair: str) -> argparse.Namespace:
        teacher, student, side, batch = pair.split(":")
        sizes = {"side": int(side), "batch": int(batch), "pair": pair}
        return argparse.Namespace(**vars(options) | sizes, teacher=teacher, student=student)

    if options.turn:
        print(versus_timm.timm_turn(options.turn, chosen(options.pairs[0]), TIMM[options.variant]))
        return
    title = (
        "| teacher → student, side, batch | timm, images/s | its best variant | ours | ratio | whole run | teacher | "
    )
    title += "student | backward | outside |\n|---|---:|---|---:|---|---:|---:|---:|---:|---:|"
    lines, notes, ratios = [title], [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["FUNMATCH_CACHE"] = str(folder / "cache")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
        make_images(folder / "images", IMAGES)
        for pair in options.pairs:
            own = chosen(pair)
            train_some(own.teacher, own, folder, folder / "teacher.pt")
            train_some(own.student, own, folder, folder / "student.pt")
            found = measure(folder, own)
            line, ratio = rows(pair, found)
            lines.append(line)
            ratios.append(ratio)
            notes.append(f"- {pair}: {json.dumps(found.seconds)} {json.dumps(found.begin)}; {'; '.join(found.said)}")
            # Written as they come, so that a cut run still tells.
            text = "\n".join([*lines, "", f"Median ratio {statistics.median(ratios):.2f}.", "", *notes, ""])
            print(text, flush=True)
            if options.out:
                options.out.write_text(f"{machine()}\n\n{text}")


def machine() -> str:
    """Returns the machine and the versions."""
    processor = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    return f"{processor}, torch {torch.__version__}, timm {timm.__version__}"


if __name__ == "__main__":
    main()
