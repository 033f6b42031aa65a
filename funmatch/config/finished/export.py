"""The table of export."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from funmatch.config.finished.model import MODEL, WithImages
from funmatch.config.metadata import Changes, Group, Opt
from funmatch.config.values import Names

PLACE = Changes.PLACE
FORMATS = ("onnx", "torch-export", "openvino", "timm", "keras", "savedmodel", "tflite")


class Export(WithImages):
    """Write a model for other runtimes, each file checked in its own on real images."""

    verbs: ClassVar[str] = "Use"
    examples: ClassVar[tuple[str, ...]] = (
        "funmatch export runs/student --format onnx",
        "funmatch export runs/student --format onnx openvino --out exported",
    )

    model: Annotated[str, MODEL]
    """Run folder, or any model that `distill --teacher` takes."""
    format: Annotated[
        Names, Opt(group=Group.OUTPUT, changes=PLACE, essential=True, metavar="onnx|torch-export|openvino|timm|keras …")
    ] = ("onnx",)
    """Formats to write, one or several: onnx, torch-export (.pt2), openvino (.xml), timm; of BiT networks also keras
    (.keras), savedmodel, tflite."""
    out: Annotated[
        Path | None, Opt(group=Group.OUTPUT, changes=PLACE, essential=True, usual="export in the run's folder")
    ] = None
    """Folder for the files."""
    overwrite: Annotated[bool, Opt(group=Group.OUTPUT, changes=PLACE, essential=True)] = False
    """Replace the folder if it exists."""
    opset: Annotated[int, Opt(group=Group.OUTPUT, changes=PLACE, at_least=18, at_most=25)] = 18
    """Version of ONNX's operators."""
    dynamic: Annotated[bool, Opt(group=Group.OUTPUT, changes=PLACE, usual="unless --fixed-batch is given")] = False
    """Take any number of images at a time."""
    fixed_batch: Annotated[
        int | None, Opt(group=Group.OUTPUT, changes=PLACE, at_least=1, usual="any number of images", metavar="N")
    ] = None
    """Take exactly N images at a time, as compilers for some devices need."""
    input: Annotated[Literal["float", "uint8"], Opt(group=Group.OUTPUT, changes=PLACE, essential=True)] = "float"
    """What the model takes, as (n, 3, side, side): float, RGB in [0, 1], or uint8, RGB in 0 … 255. The normalisation is
    part of the model."""
    logits: Annotated[bool, Opt(group=Group.OUTPUT, changes=PLACE, usual="unless --probabilities is given")] = False
    """Return logits."""
    probabilities: Annotated[bool, Opt(group=Group.OUTPUT, changes=PLACE, essential=True)] = False
    """Return probabilities."""
    verify: Annotated[bool, Opt(group=Group.OUTPUT, changes=PLACE, essential=True)] = True
    """Compare each file in its own runtime with PyTorch, on real images."""
    images: Annotated[int, Opt(group=Group.DATA, changes=PLACE, at_least=1, essential=True, metavar="N")] = 500
    """Images to compare on at most: of the validation split, else of the training images."""
    quantize: Annotated[
        int | None, Opt(group=Group.OUTPUT, changes=PLACE, at_least=8, at_most=16, essential=True, usual="off",
                        metavar="8|16")
    ] = None  # fmt: skip
    """Also write a smaller ONNX file: 8 for integers of 8 bits, 16 for half precision. Layers that lose most stay in
    fp32."""
    max_drop: Annotated[float, Opt(group=Group.OUTPUT, changes=PLACE, at_least=0, at_most=100, essential=True)] = 1.0
    """What the smaller file may lose, in percentage points: of accuracy on the validation images, or without labels of
    agreement with fp32."""
    calibration: Annotated[int, Opt(group=Group.DATA, changes=PLACE, at_least=1, metavar="N")] = 512
    """Training images by which the ranges of 8 bits are chosen; their labels are not used."""
    sensitivity: Annotated[bool, Opt(group=Group.OUTPUT, changes=PLACE)] = False
    """Measure how much each layer loses with 8 bits, also where none has to stay in fp32."""

    def problems(self) -> list[str]:
        found = [f"unknown format {each!r}; known: {', '.join(FORMATS)}" for each in self.format if each not in FORMATS]
        if not self.format:
            found.append(f"give at least one format: {', '.join(FORMATS)}")
        if self.dynamic and self.fixed_batch:
            found.append("--dynamic and --fixed-batch exclude each other")
        if self.logits and self.probabilities:
            found.append("--logits and --probabilities exclude each other")
        if self.input == "uint8" and set(self.format) == {"timm"}:
            found.append("--input uint8 does not apply to timm's format, which takes normalised images")
        if self.quantize not in (None, 8, 16):
            found.append(f"--quantize takes 8 or 16, not {self.quantize}")
        if self.quantize and "onnx" not in self.format:
            found.append("--quantize makes an ONNX file smaller; add onnx to --format")
        if self.quantize and self.fixed_batch:
            found.append("--quantize does not go with --fixed-batch; omit it")
        if not self.quantize:
            found += [
                f"--{name.replace('_', '-')} belongs to --quantize"
                for name in ("max_drop", "calibration", "sensitivity")
                if self.moved(name)
            ]
        return found + super().problems()
