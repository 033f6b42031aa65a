"""Every knob of the program: one frozen table a verb, a sentence under each knob, checked together."""

import ast
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tyro
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from funmatch.errors import InputError, unknown

Precision = Literal["auto", "fp32", "bf16", "fp16"]

# Knobs that say where things lie or how they are shown, not what is computed: a run may change them and go on.
UNCOMPARED = {"out", "as_json", "workers", "log_every", "epochs"}


class Knobs(BaseModel):
    """What all tables share: no unknown key, no change after the making."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    as_json: Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object on standard output, and nothing else there."""

    @field_validator("student_kwargs", "teacher_kwargs", "model_kwargs", mode="before", check_fields=False)
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        if isinstance(value, dict):
            value = [f"{key}={option!r}" for key, option in value.items()]
        return tuple(map(_canonical, value)) if isinstance(value, list | tuple) else value

    def problems(self) -> list[str]:
        """Everything that is wrong with the values, each in a sentence."""
        return []

    @classmethod
    def checked(cls, **knobs: Any) -> Self:
        """The table with these knobs, or an `InputError` that holds every problem."""
        for name in knobs:
            if name not in cls.model_fields:
                raise unknown("knob", name, cls.model_fields)
        try:
            table = cls(**{name: str(knob) if isinstance(knob, Path) else knob for name, knob in knobs.items()})
        except ValidationError as error:
            found = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}, got {e['input']!r}" for e in error.errors()]
            raise InputError("; ".join(found)) from None
        table.check()
        return table

    def check(self) -> None:
        """Raises one `InputError` that holds all problems."""
        if found := self.problems():
            raise InputError("; ".join(found))


def _canonical(option: Any) -> Any:
    """`channels=16,32` as `channels=(16, 32)`: one spelling for each value, so that the same is told to be the same."""
    key, equals, value = str(option).partition("=")
    try:
        parsed = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return option
    return f"{key}{equals}{parsed if isinstance(parsed, str) else repr(parsed)}"


class Machine(Knobs):
    """How the arithmetic is done."""

    device: str = "auto"
    """Where to compute: auto, cpu, or an accelerator as torch names it (cuda, cuda:1, mps, xpu)."""
    precision: Precision = "auto"
    """Arithmetic of the networks: auto is bf16 on accelerators that have it, fp16 with loss scaling on those that do
    not, fp32 on the CPU."""


class Train(Machine):
    """Train a model on labels alone: the honest baseline, with the views and the loop of distillation."""

    data: str
    """A folder of pictures (<split>/<class>/*.jpg, or unlabelled pictures), or fashion-mini."""
    student: str
    """The network to teach: any timm name, or fashion-mini-student."""
    out: Path
    """The run folder. The same command again goes on from its newest checkpoint."""
    student_kwargs: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--model-kwargs"])] = ()
    """Options for timm's constructor, e.g. channels=16,32,64,128 drop_rate=0.1."""
    steps: int | None = None
    """Length of the run in updates. Give this or --epochs."""
    epochs: float | None = None
    """Length of the run in passes over the training pictures. Function matching gains from thousands."""
    batch: Annotated[int, tyro.conf.arg(aliases=["-b", "--batch-size"])] = 128
    """Pictures a step. May be more than there are in the data set."""
    side: Annotated[int | None, tyro.conf.arg(aliases=["--img-size"])] = None
    """Side of the views in pixels; by default the one that the student was made for."""
    eval_resize: int | None = None
    """Evaluation resizes the short side to this many pixels, then cuts the central square of --side. By default as the
    student's own card says; at another side, 32 more than --side, but at most a quarter more."""
    crop_min_area: float = 0.05
    """The smallest share of a picture that a training crop covers."""
    cap: int = 512
    """Pictures with a longer short side are kept in the cache scaled down to this, in pixels."""
    strategy: Literal["funmatch", "same/ic"] = "funmatch"
    """What is seen: funmatch is an Inception crop, flipped and mixed; same/ic is not mixed."""
    lr: float = 3e-3
    """Adam's learning rate at the top of the schedule (warm-up, then a cosine down to 0)."""
    weight_decay: float = 1e-4
    """Share of each kernel that a step takes away at the top of the schedule, whatever the learning rate is. (Decoupled
    and independent: torch's AdamW would call it weight_decay / lr.) Biases and norms do not decay."""
    warmup_steps: int | None = None
    """Steps over which the learning rate rises; by default 1,500, or a tenth of a run shorter than 15,000."""
    clip_norm: float = 1.0
    """The global norm beyond which gradients are scaled down."""
    seed: int = 0
    """Decides the student's first weights and every random choice of every step."""
    workers: Annotated[int | None, tyro.conf.arg(aliases=["-j"])] = None
    """Threads that make views ahead of the model; by default one less than there are cores, at most 8."""
    threads: int | None = None
    """Cores that the networks use on the CPU; by default all. Tiny networks are faster on one."""
    log_every: int = 50
    """Steps between records of the loss."""
    eval_every: int = 500
    """Steps between evaluations on the validation split."""
    save_every: int = 500
    """Steps between checkpoints."""

    def problems(self) -> list[str]:
        found = [
            f"{name} must be at least {low}, got {value}"
            for name, low in _AT_LEAST.items()
            if (value := getattr(self, name)) is not None and value < low
        ]
        found += [
            f"{name} must be at most {high:,}, got {value}"
            for name, high in _AT_MOST.items()
            if (value := getattr(self, name)) is not None and value > high
        ]
        found += [
            f"{name} must be above 0, got {getattr(self, name)}" for name in _POSITIVE if not _positive(self, name)
        ]
        if (self.steps is None) == (self.epochs is None):
            found.append("give the length by either --steps or --epochs, e.g. --epochs 1000")
        if self.crop_min_area > 1:
            found.append(f"crop_min_area is a share of the picture, at most 1, got {self.crop_min_area}")
        if not 0 <= self.weight_decay < 1:
            found.append(f"weight_decay must lie in [0, 1), got {self.weight_decay}")
        if self.side and self.eval_resize and self.eval_resize < self.side:
            found.append(f"eval_resize ({self.eval_resize}) must be at least side ({self.side})")
        return found + super().problems()


_AT_LEAST = {
    "steps": 1, "batch": 1, "side": 1, "eval_resize": 1, "cap": 1, "warmup_steps": 0,
    "seed": 0, "workers": 1, "threads": 1, "log_every": 1, "eval_every": 1, "save_every": 1,
}  # fmt: skip
_AT_MOST = {
    "steps": 10**12, "epochs": 10**9, "batch": 10**6, "side": 10**4, "eval_resize": 10**4, "seed": 2**62,
    "workers": 256, "threads": 1024,
}  # fmt: skip
_POSITIVE = ("epochs", "crop_min_area", "lr", "clip_norm", "temperature")


def _positive(table: Train, name: str) -> bool:
    value = getattr(table, name, None)
    return value is None or value > 0


class Distill(Train):
    """Teach a student to be the same function as a teacher. No label is used."""

    teacher: str
    """The network to match: a run folder, a timm name, hf-hub:user/model, local-dir:path, or fashion-mini-teacher."""
    teacher_weights: Path | None = None
    """A .safetensors (or .pt) state dict for a teacher that is a timm name; its head decides the classes."""
    teacher_kwargs: tuple[str, ...] = ()
    """Options for timm's constructor of the teacher, key=value."""
    temperature: Annotated[float, tyro.conf.arg(aliases=["-T"])] = 1.0
    """Divides both networks' logits before the softmax; the loss is multiplied by its square."""
    teacher_ahead: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Compute the teacher's answers in the threads that make views: for small networks on the CPU."""
    allow_weak_teacher: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Go on with a teacher that is near chance on the labelled validation pictures."""
    trust_class_order: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Go on although the teacher's class names differ from the data's, taking both to be in the same order."""


class Evaluate(Machine):
    """Judge a run or a model: accuracy, calibration, and closeness to a teacher."""

    model: Annotated[str, tyro.conf.Positional]
    """A run folder, or any model that `distill --teacher` takes."""
    weights: Path | None = None
    """A state dict for a model that is a timm name."""
    model_kwargs: tuple[str, ...] = ()
    """Options for timm's constructor, key=value."""
    data: str | None = None
    """The pictures; by default those of the run."""
    split: str = "auto"
    """Which split: train, val or test; auto is test, else val, else train."""
    teacher: str | None = None
    """Whom to compare with; by default the run's own teacher."""
    teacher_weights: Path | None = None
    """A state dict for a teacher that is a timm name."""
    teacher_kwargs: tuple[str, ...] = ()
    """Options for timm's constructor of the teacher, key=value."""
    side: int | None = None
    """Side of the views in pixels; by default the run's or the model's own."""
    eval_resize: int | None = None
    """The short side's pixels before the central cut; by default the run's or the model's own."""
    batch: Annotated[int, tyro.conf.arg(aliases=["-b", "--batch-size"])] = 128
    """Pictures at a time."""
    cap: int | None = None
    """Pictures with a longer short side are kept in the cache scaled down to this, in pixels; by default as in the run,
    or 512."""
    trust_class_order: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Go on although the model's class names differ from the data's, taking both to be in the same order."""

    def problems(self) -> list[str]:
        names = ("side", "eval_resize", "batch", "cap")
        return [
            f"{name} must be at least 1, got {getattr(self, name)}"
            for name in names
            if getattr(self, name) is not None and getattr(self, name) < 1
        ]


class Report(Knobs):
    """Write one HTML page about one run or several: curves, figures, configuration and views."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders."""
    out: Path | None = None
    """The page; by default report.html in the first run's folder."""
    view_step: int = 0
    """The step whose views are shown."""

    def problems(self) -> list[str]:
        found = [] if self.runs else ["give at least one run folder"]
        if not 0 <= self.view_step <= 10**12:
            found.append(f"view_step must lie between 0 and {10**12:,}, got {self.view_step}")
        return found


class Demo(Machine):
    """See it work in minutes: a small student learns from labels, then from a teacher, on embedded pictures."""

    steps: int = 7000
    """Updates of each of the two runs."""
    seed: int = 0
    """Decides the student's first weights and every random choice."""
    out: Path | None = None
    """Folder for the two runs and the report; by default runs/demo-<steps>-steps-seed-<seed>."""

    def problems(self) -> list[str]:
        return [
            f"{name} must be at least {low}" for name, low in (("steps", 1), ("seed", 0)) if getattr(self, name) < low
        ]
