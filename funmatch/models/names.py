"""Tells what the name of a model means, and refuses wrong names before any heavy library is imported."""

import importlib.metadata
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

from funmatch.errors import InputError, unknown
from funmatch.models.clip import names as clip_names
from funmatch.models.origins.download import PAPER_FILES
from funmatch.runtime.functions import check_allowed
from funmatch.runtime.log import info
from funmatch.runtime.measured import Measurement

EMBEDDED = Path(__file__).parent.parent / "embedded"
NAMED: dict[str, str | tuple[str, dict[str, Any]]] = {
    "fashion-mini-teacher": f"local-dir:{EMBEDDED / 'fashion-mini-teacher'}",
    "fashion-mini-student": ("resnet10t", {"channels": (16, 20, 20, 16), "stem_width": 8}),
}
"""Our own model names: a folder with weights, or an architecture and the arguments of its constructor."""

OWN_CARDS = {"fashion-mini-student": {"input_size": (3, 32, 32), "crop_pct": 1.0}}
"""Input of our own architectures, where timm's default of 224 pixels makes no sense."""

SAVEDMODEL, BIT, HUB, LOCAL = "savedmodel:", "bit:", clip_names.HUB, clip_names.LOCAL
GIVEN = "python:"
"""Prefix of the name of a module that was given from Python, for records of runs."""
WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar", ".pkl", ".th", ".npz")
"""Endings of files that hold weights alone."""
KERAS = (".keras", ".h5", ".hdf5")
"""Endings of the files of Keras, from which BiT networks are read."""
FOREIGN = {".onnx": "ONNX", ".tflite": "TensorFlow Lite", ".pb": "TensorFlow"}
"""Endings of models of other libraries."""
TIMM_SHAPE = {"models": [str], "tagged": [str], "renamed": dict[str, str], "sizes": dict[str, list]}


def is_function(name: str) -> bool:
    """Returns whether a name has the form `package.module:function`."""
    module, colon, function = name.partition(":")
    # Else a name of OpenCLIP, such as clip:RN50, would look like one.
    return (
        bool(colon)
        and not clip_names.is_clip(name)
        and function.isidentifier()
        and all(part.isidentifier() for part in module.split("."))
    )


@cache
def timm_names() -> dict[str, Any]:
    """Returns timm's `models`, those with `tagged` weights, `renamed`: its earlier names and what they are now, and the
    `sizes` of all: image size in pixels and number of classes.

    They are kept in the cache: importing timm for them takes seconds.
    """
    version = importlib.metadata.version("timm")
    kept = Measurement("timm", f"names and sizes of timm {version}", "the names of timm's models")
    if (names := kept.read(TIMM_SHAPE)) is None:
        if "timm" not in sys.modules:
            info("listing the names of timm's models, which takes some seconds the first time …")
        import timm
        from timm.models import _registry

        tagged = timm.list_pretrained()
        # timm's table of them has tags that have been renamed since: `.sam` is `.sam_in1k`.
        renamed = {
            old: next((name for name in (new, *tagged) if name in tagged and name.startswith(new)), new)
            for old, new in _registry._deprecated_models.items()
            if new
        }
        models = [name for name in timm.list_models() if name not in renamed]
        cards = {name: timm.get_pretrained_cfg(name) for name in (*models, *tagged)}
        sizes = {name: [card.input_size[-1], card.num_classes] for name, card in cards.items() if card}
        names = {"models": models, "tagged": tagged, "renamed": renamed, "sizes": sizes}
        kept.write(names)
    return names


def current_name(architecture: str) -> str:
    """Returns timm's present name of an architecture: another, often with a tag, for one that timm has renamed."""
    return timm_names()["renamed"].get(architecture, architecture)


def check_architecture(architecture: str, name: str) -> str:
    """Returns timm's present name of an architecture.

    Args:
        architecture: timm's name, with or without a tag.
        name: as the user gave it, for the message.

    Raises:
        InputError: timm does not have it, or not with this tag; near names are listed.
    """
    names, now = timm_names(), current_name(architecture)
    base, _, tag = now.partition(".")
    if base not in names["models"] and not _is_registered(base):
        raise _unknown_model(name)
    if tag and now not in names["tagged"] and not _is_registered(now, "is_model_pretrained"):
        raise unknown("pretrained tag", name, [each for each in names["tagged"] if each.startswith(f"{base}.")])
    return now


def _unknown_model(name: str) -> InputError:
    return unknown("model", name, [*NAMED, *timm_names()["models"]], hint="`funmatch models PATTERN` lists them")


def own_architecture(name: str, kwargs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Returns what one of our own names stands for, and the constructor's arguments; any other name as it is."""
    own = NAMED.get(name, name)
    # The user's arguments last: they may change those of our own names.
    return (own[0], {**own[1], **kwargs}) if isinstance(own, tuple) else (own, kwargs)


def renaming_note(name: str, architecture: str) -> tuple[str, ...]:
    """Returns a note where timm calls the architecture of a name otherwise now; nothing where it does not."""
    renamed = architecture.partition(".")[0] != name.partition(".")[0]
    return (f"timm calls {name} {architecture} now",) if renamed else ()


def _is_registered(name: str, test: str = "is_model") -> bool:
    """Returns whether timm has a name by its own test: the program that imports us may have registered a model."""
    return "timm" in sys.modules and getattr(sys.modules["timm"].models, test)(name)


def is_timm_name(name: str) -> bool:
    """Returns whether timm has an architecture of this name, whatever its tag."""
    base = current_name(name).partition(".")[0]
    return base in timm_names()["models"] or _is_registered(base)


def check_model_name(name: str) -> None:
    """Refuses the name of a model that cannot be one, by what is known without building any.

    Raises:
        InputError: there is no such model, file or folder.
    """
    if clip_names.is_clip(name):
        clip_names.parse(name)
        return
    # `bit:` and `savedmodel:` first: what follows them may look like a function's name.
    if name.startswith(BIT):
        if name.removeprefix(BIT) not in PAPER_FILES:
            raise unknown("file of the paper", name.removeprefix(BIT), PAPER_FILES)
        return
    prefix = next((prefix for prefix in (SAVEDMODEL, LOCAL) if name.startswith(prefix)), "")
    if is_function(name) and not prefix and not name.startswith((GIVEN, HUB)):
        check_allowed(name, "model")
        return
    if name in NAMED or name.startswith((GIVEN, HUB)):
        return
    path = Path(name.removeprefix(prefix)).expanduser()
    # A timm name wins over a folder of the same name in the working directory; ./name means the folder.
    if not prefix and is_timm_name(name):
        check_architecture(name, name)
    # Published BiT checkpoints and files of Keras are the files that say what their architecture is.
    elif not path.exists() or (path.is_file() and prefix != SAVEDMODEL and path.suffix.lower() not in (".npz", *KERAS)):
        raise no_model_at(name, path, prefix)


def no_model_at(name: str, path: Path, prefix: str = "") -> InputError:
    """Builds the error for a name that leads to no model: what there is at its path, and what was probably meant."""
    suffix = path.suffix.lower()
    if suffix in FOREIGN:
        return InputError(
            f"{name} is a model of {FOREIGN[suffix]}, which cannot be loaded; expected a timm name, a folder of timm "
            f"or transformers, {SAVEDMODEL}FOLDER or a file of Keras of a BiT network, or package.module:function"
        )
    if path.is_file():
        return InputError(
            f"{name} holds only weights; pass the name of its architecture, and the file as its weights"
            if suffix in WEIGHTS
            else f"{name} is a file; expected the folder of a run or of a model, or a timm name"
        )
    if page := re.match(r"(?:https?://)?huggingface\.co/([^/]+/[^/]+)", name):
        return InputError(f"{name} is the page of a model; pass {HUB}{page[1]} if it is an image network")
    parts = name.split("/")
    if not prefix and len(parts) == 2 and all(parts) and parts[0] not in (".", "..", "~"):
        return InputError(
            f"there is no folder {name}; for a model on the Hugging Face Hub, pass {HUB}{name}, and for a "
            "local one the folder of a run or of a model"
        )
    if suffix in KERAS:
        return InputError(f"{path} is missing; expected a file of Keras with a BiT network")
    if prefix or "/" in name or suffix in WEIGHTS:
        return InputError(
            f"{path} is missing; expected the folder of a run or of a model, or {HUB}user/model for a model on "
            "the Hugging Face Hub"
        )
    return _unknown_model(name)
