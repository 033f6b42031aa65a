"""Compares a student that replays a tape with one that has a live teacher, and with the student alone.

    python benchmarks/tape.py [--rounds 5] [--steps 8] [--precision fp32] [--compile off] [--teacher …] [--student …]

Each round has a run with a live teacher (recording nothing), a run that replays a tape, and the student alone on a
prepared batch, in the same precision and with the same kernels. There are two ideals: by arithmetic (the teacher's
share of a step's FLOPs), and by time (a replayed step that costs as much as the student alone). They differ, since
networks use a machine differently.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
from pathlib import Path

import timm
import torch
from strategies import flops_of, parts, seconds_a_step, seconds_of, student_step  # pyrefly: ignore[missing-import]
from versus_timm import make_images, network  # pyrefly: ignore[missing-import]

import funmatch


def distil(folder: Path, name: str, options: argparse.Namespace, **more) -> Path:
    """Distil with the given options and return the run folder."""
    return funmatch.distill(
        data=str(folder / "images"), val="none", teacher=options.teacher, teacher_weights=str(folder / "teacher.pt"),
        student=options.student, side=options.side, batch=options.batch, steps=options.steps + 3, unlabelled=True,
        out=folder / "runs" / name, log_every=1, eval_every=10**6, save_every=10**6, allow_weak_teacher=True,
        precision=options.precision, teacher_precision=options.precision, compile=options.compile, **more,
    ).folder  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--compile", default="off")
    parser.add_argument("--teacher", default="resnetv2_101x1_bit")
    parser.add_argument("--student", default="resnetv2_50x1_bit")
    options = parser.parse_args()
    options.device = "cpu"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["FUNMATCH_CACHE"] = str(folder / "cache")
        make_images(folder / "images", 128)
        torch.save(network(options.teacher, 0).state_dict(), folder / "teacher.pt")
        flops = tuple(map(flops_of, parts(folder, options)))
        classes = network(options.teacher, 0).num_classes
        by_itself = student_step(options, classes, options.precision, native=options.compile == "native")
        distil(folder, "recorded", options, tape=folder / "tape")
        live, replayed, alone = [], [], []
        for number in range(options.rounds):
            live.append(seconds_a_step(distil(folder, f"live-{number}", options), options.batch))
            tape = distil(folder, f"replayed-{number}", options, tape=folder / "tape")
            replayed.append(seconds_a_step(tape, options.batch))
            alone.append(seconds_of(by_itself, options.steps))
        size = sum(path.stat().st_size for path in (folder / "tape").iterdir())
    ideal = sum(flops) / flops[1]
    ratios = [a / b for a, b in zip(live, replayed, strict=True)]
    of_student_alone = [a / b for a, b in zip(alone, replayed, strict=True)]
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    print(f"{machine}, torch {torch.__version__}, timm {timm.__version__}, {options.precision}")
    print(json.dumps({
        "live_s": statistics.median(live), "replayed_s": statistics.median(replayed),
        "alone_s": statistics.median(alone), "tape_bytes": size,
        "times_faster": [statistics.median(ratios), min(ratios), max(ratios)],
        "ideal_by_flops": ideal, "of_ideal_by_flops": statistics.median(ratios) / ideal,
        "of_ideal_by_time": [statistics.median(of_student_alone), min(of_student_alone), max(of_student_alone)],
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
