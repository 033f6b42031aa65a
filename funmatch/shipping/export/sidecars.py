"""Writes what stands beside an exported model: class names, preprocessing, and an example that needs no funmatch."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment

from funmatch.data.readers.catalog import CATALOG
from funmatch.ops.resizing.libraries import TORCHVISION, filter_of
from funmatch.training.student.trained_model import TrainedModel
from funmatch.version import __version__

LABELS, PREPROCESSING, EXAMPLE, VERIFICATION = "labels.txt", "preprocessing.json", "example.py", "verify.json"
TEMPLATE = "example.py.jinja"
LIBRARIES = {
    ".onnx": "onnxruntime", ".xml": "openvino", ".pt2": "torch", ".keras": "keras", ".tflite": "tensorflow",
    "": "tensorflow",
}  # fmt: skip
"""The library that opens a model, by the ending of its file; a SavedModel has none."""
OF_TENSORFLOW = ("keras", "tensorflow")
"""Libraries whose models take images as (n, height, width, 3)."""


def describe(model: TrainedModel, *, uint8: bool, probabilities: bool, fixed_batch: int | None) -> dict[str, Any]:
    """Returns what someone needs to know who uses the model without funmatch.

    Args:
        model: the model.
        uint8, probabilities: of `ExportNet`.
        fixed_batch: number of images that it takes at a time; None: any.
    """
    how, card = model.preprocessing, model.classifier.card
    data = [str(each) for each in model.knobs.get("data", ())]
    licences = {name: CATALOG[name].licence for name in data if name in CATALOG}
    return {
        "class_names": list(model.class_names),
        "input": {
            "name": "images", "shape": [fixed_batch or "n", 3, how.side, how.side],
            "type": "uint8" if uint8 else "float32", "range": [0, 255] if uint8 else [0, 1], "order": "NCHW, RGB",
        },
        "output": "probabilities" if probabilities else "logits",
        **({"task": card.task} if card.task == "multilabel" else {}),
        "preprocessing": {"largest_short_side": model.cap, **asdict(how)},
        "normalization": {"mean": list(card.mean), "std": list(card.std), "where": "inside the model"},
        "source": {
            "model": model.name, "run": str(model.run.folder) if model.run else None, "step": model.step,
            "data": data, "licence_of_data": licences or "not known", "funmatch": __version__,
        },
    }  # fmt: skip


def with_tensorflow(about: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Returns a description that also says what the models of TensorFlow take.

    Args:
        about: of `describe`.
        names: of all files that were written.
    """
    are_of_tensorflow = [LIBRARIES.get(Path(name).suffix) in OF_TENSORFLOW for name in names if name != "timm"]
    batch, channels, *size = about["input"]["shape"]
    given = about["input"] | {"shape": [batch, *size, channels], "order": "NHWC, RGB"}
    if are_of_tensorflow and all(are_of_tensorflow):
        return about | {"input": given}
    return about | ({"input_of_tensorflow": given} if any(are_of_tensorflow) else {})


def as_metadata(about: dict[str, Any]) -> dict[str, str]:
    """Returns a description as texts by name, as formats keep them."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()}


def write_sidecars(folder: Path, about: dict[str, Any], name: str | None) -> None:
    """Writes the files beside a model.

    Args:
        folder: of the model.
        about: of `describe`.
        name: of the model's file that the example opens; None: no example.
    """
    (folder / PREPROCESSING).write_text(json.dumps(about, indent=2))
    # One name a line, so that a name of two lines is still one.
    lines = [each.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r") for each in about["class_names"]]
    (folder / LABELS).write_text("\n".join(lines) + "\n", errors="surrogateescape")
    if name:
        (folder / EXAMPLE).write_text(example(about, name))


def example(about: dict[str, Any], name: str) -> str:
    """Returns a script that classifies images with a model's runtime alone.

    Args:
        about: of `describe`.
        name: of the model's file.
    """
    library = LIBRARIES[Path(name).suffix]
    how, batch = about["preprocessing"], about["input"]["shape"][0]
    by_torchvision = how["resample"].startswith(TORCHVISION)
    # Torchvision's name for what Pillow calls nearest is of a version that rounds otherwise.
    nearest = by_torchvision and how["resample"].endswith("nearest")
    template = Environment(keep_trailing_newline=True).from_string((Path(__file__).parent / TEMPLATE).read_text())
    return template.render(
        library=library, nhwc=library in OF_TENSORFLOW, file=name, side=how["side"], short_side=how["short_side"],
        cap=how["largest_short_side"], squash=how["squash"], resample=how["resample"], floor=how.get("floor"),
        by_torchvision=by_torchvision, filter="NEAREST_EXACT" if nearest else filter_of(how["resample"]).upper(),
        uint8=about["input"]["type"] == "uint8", probabilities=about["output"] == "probabilities",
        fixed_batch=None if batch == "n" else batch, several=about.get("task") == "multilabel",
    )  # fmt: skip
