"""Measures what INT8 costs and gains: accuracy on test images, size, and latency in ONNX Runtime on a CPU.

    python benchmarks/quantization.py accuracy RUN … --steps 150 [--out runs/quantization]
    python benchmarks/quantization.py speed resnet50 mobilenetv3_small_100 vit_tiny_patch16_224 [--repeats 5]

accuracy: for each finished run its student in fp32, by calibration alone, with layers in fp32 until 1 point holds, and
after training for INT8 (`funmatch distill RUN --quantize 8`); a table of top-1 on all test images. speed: networks with
random weights at their own image size; latency of one image, the median of several passes in each of several repeats.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import funmatch
from funmatch.cli import parse
from funmatch.commands import export as command
from funmatch.config import Export
from funmatch.errors import WorkFailed
from funmatch.models.load import load
from funmatch.ops.view_spec import Preprocessing
from funmatch.shipping.export.formats import FORMATS, make_job
from funmatch.shipping.export.smaller import FILES, REPORT
from funmatch.shipping.quantize.quantize import How, quantize_onnx
from funmatch.shipping.quantize.scores import Images, latency, score
from funmatch.shipping.real_images import open_real_data
from funmatch.training.student.trained_model import TrainedModel, open_trained_model

ALL = 10**9


def test_images(run: Path) -> Images:
    """All test images of a run, with their labels."""
    options = Export.checked(model=str(run))
    images = open_real_data(options, open_trained_model(str(run))).choose(ALL, "test")
    return Images(images, images.split.labels(np.arange(len(images))).numpy())


def exported(run: Path, out: Path, **options: Any) -> dict[str, Any] | str:
    """Exports a run to INT8; returns the report, or why nothing was written."""
    try:
        return command.run(Export.checked(model=str(run), out=out, quantize=8, **options)).metrics["quantized"]
    except WorkFailed as failed:
        return str(failed)


def trained(run: Path, out: Path, steps: int, lr: float | None) -> None:
    """Trains a run's student for INT8, with the defaults of the command line."""
    words = ["distill", str(run), "--quantize", "8", "--steps", str(steps), "--out", str(out)]
    config = parse([*words, *(["--lr", str(lr)] if lr else [])])
    funmatch.distill(**{name: getattr(config, name) for name in type(config).model_fields if config.moved(name)})


def accuracy(options: argparse.Namespace) -> None:
    print("| run | fp32 | calibration alone | ranges | ≤ 1 point on validation | layers in fp32 | trained for INT8 "
          "| ranges | MB fp32 → INT8 |\n|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    for run in options.runs:
        images, place = test_images(run), options.out / run.name
        trained(run, place / "qat", options.steps, options.lr)
        cells, sizes = [], {}
        jobs = {"alone": (run, 100.0), "gate": (run, 1.0), "qat": (place / "qat", 100.0)}
        for name, (source, drop) in jobs.items():
            # The same file again where calibration alone keeps the limit.
            folder = place / ("alone" if name == "gate" and (place / "alone" / "held").exists() else name)
            folder = folder / "export" if name == "qat" else folder
            found = exported(source, folder, max_drop=drop) if not folder.exists() else report(folder)
            if isinstance(found, str):
                cells += ["–", found]
                continue
            if name == "alone" and found["drop"] <= 1:
                (folder / "held").touch()
            top1 = {each: 100 * (score(folder / each, images, threads=options.threads)[0].top1 or 0)
                    for each in ("model.onnx", FILES[8])}  # fmt: skip
            sizes = {each: (folder / each).stat().st_size / 1e6 for each in top1}
            if name == "alone":
                cells.append(f"{top1['model.onnx']:.2f}")
            kept = f"{len(found['fp32'])} of {found['layers']}" if name == "gate" else found["method"]
            cells += [f"{top1[FILES[8]]:.2f}", kept]
        mb = " → ".join(f"{size:.2f}" for size in sizes.values())
        print(f"| {run.name} | {' | '.join(cells)} | {mb} |", flush=True)


def report(folder: Path) -> dict[str, Any]:
    """The report of an export that is there already."""
    return json.loads((folder / REPORT).read_text())


def written(name: str, folder: Path) -> tuple[Path, int]:
    """Writes a network with random weights as ONNX; returns the file and the image size."""
    torch.manual_seed(0)
    classifier = load(name, classes=1000).eval()
    side = classifier.card.side
    how = Preprocessing(side=side, short_side=side, squash=False, resample="antialias")
    model = TrainedModel(name, classifier, how)
    FORMATS["onnx"].write(make_job(model), folder)
    return folder / FORMATS["onnx"].file, side


def speed(options: argparse.Namespace) -> None:
    print("| network | image size | fp32 (ms) | INT8 (ms) | times as fast | MB fp32 → INT8 | times smaller |\n"
          "|---|---|---|---|---|---|---|")  # fmt: skip
    for name in options.networks:
        with tempfile.TemporaryDirectory() as place:
            source, side = written(name, Path(place))
            rng = np.random.default_rng(0)
            batches = [rng.random((8, 3, side, side), np.float32) for _ in range(2)]
            small = Path(place) / "int8.onnx"
            quantize_onnx(source, small, Images(batches), Images(batches), How(max_drop=100, threads=options.threads))
            # In turn: what else runs on the machine then slows both.
            times: dict[Path, list[float]] = {source: [], small: []}
            for _ in range(options.repeats):
                for path, found in times.items():
                    found.append(latency(path, batches[0][:1], threads=options.threads))
            sizes = [path.stat().st_size / 1e6 for path in times]
            ratios = [a / b for a, b in zip(*times.values(), strict=True)]
            cells = [f"{statistics.median(each):.2f} ({min(each):.2f} … {max(each):.2f})" for each in times.values()]
            print(
                f"| {name} | {side} | {' | '.join(cells)} | {statistics.median(ratios):.2f} ({min(ratios):.2f} … "
                f"{max(ratios):.2f}) | {sizes[0]:.1f} → {sizes[1]:.1f} | {sizes[0] / sizes[1]:.2f} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    kinds = parser.add_subparsers(required=True)
    first = kinds.add_parser("accuracy")
    first.add_argument("runs", type=Path, nargs="+")
    first.add_argument("--steps", type=int, default=150, help="of training for INT8")
    first.add_argument("--lr", type=float, help="of training for INT8; default: a tenth of the run's")
    first.add_argument("--out", type=Path, default=Path("runs/quantization"))
    first.set_defaults(work=accuracy)
    second = kinds.add_parser("speed")
    second.add_argument("networks", nargs="+")
    second.add_argument("--repeats", type=int, default=5)
    second.set_defaults(work=speed)
    options = parser.parse_args()
    options.work(options)


if __name__ == "__main__":
    main()
