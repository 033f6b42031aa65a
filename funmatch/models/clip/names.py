"""Tells what a name `clip:MODEL` means, without importing the library that has the model."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from funmatch.config.teaching import CLIP
from funmatch.errors import InputError, unknown

HUB, LOCAL = "hf-hub:", "local-dir:"
OPEN_CLIP_CONFIG, TRANSFORMERS_CONFIG = "open_clip_config.json", "config.json"
"""The file by which a folder is known as a model of OpenCLIP, or of transformers."""
EXTRA = "pip install 'funmatch[clip]'"


@dataclass(frozen=True)
class ClipName:
    """What a name means.

    Attributes:
        architecture: OpenCLIP's name of it; empty for a folder or a repository.
        tag: of its published weights; empty for weights in a file.
        folder: a local one, or None.
        repository: `user/model` on the Hugging Face Hub; empty for others.
    """

    architecture: str = ""
    tag: str = ""
    folder: Path | None = None
    repository: str = ""


def is_clip(name: object) -> bool:
    """Returns whether a name means a network of image and text."""
    return isinstance(name, str) and name.startswith(CLIP)


def is_fetched(name: str) -> bool:
    """Returns whether a name `clip:MODEL` means files that are downloaded unless they are on this machine."""
    return is_clip(name) and not Path(name.removeprefix(CLIP).removeprefix(LOCAL)).expanduser().exists()


def parse(name: str) -> ClipName:
    """Reads a name such as `clip:ViT-B-32/laion2b_s34b_b79k`, `clip:hf-hub:user/model` or `clip:folder`.

    Raises:
        InputError: there is no such architecture or folder (near names are listed), or OpenCLIP is not installed.
    """
    model = name.removeprefix(CLIP)
    if not model:
        raise InputError(f"{name} names no model; expected one of OpenCLIP, {HUB}user/model, or a folder")
    if model.startswith(HUB):
        if repository := model.removeprefix(HUB):
            return ClipName(repository=repository)
        raise InputError(f"{name} names no model; expected {CLIP}{HUB}user/model")
    path = Path(model.removeprefix(LOCAL)).expanduser()
    if not model.startswith((LOCAL, ".", "/", "~")):
        # A name of OpenCLIP wins over a folder of the same name; ./name means the folder.
        known = architectures()
        if (found := _architecture(model, known)) is not None:
            return found
        if not path.exists():
            raise _unknown(name, model, known)
    if path.is_dir():
        return ClipName(folder=path)
    if path.is_file():
        raise InputError(
            f"{name} holds only weights; pass {CLIP} and the name of its architecture, and the file as its weights"
        )
    raise InputError(f"{path} is missing; expected a folder with {OPEN_CLIP_CONFIG}, or a model of transformers")


def architectures() -> list[str]:
    """Returns the names of OpenCLIP's architectures; none where it is not installed."""
    # By its files: importing the library takes seconds.
    spec = importlib.util.find_spec("open_clip")
    folders = spec.submodule_search_locations if spec else None
    return sorted(path.stem for folder in folders or () for path in (Path(folder) / "model_configs").glob("*.json"))


def has_open_clip() -> bool:
    """Returns whether OpenCLIP is installed."""
    return importlib.util.find_spec("open_clip") is not None


def require_open_clip(name: str) -> None:
    """Raises `InputError` unless OpenCLIP is installed, which a model needs."""
    if not has_open_clip():
        raise InputError(f"{name} is a model of OpenCLIP, which is not installed: {EXTRA}")


def absolute(name: str) -> str:
    """Returns a name that no longer depends on the working directory."""
    try:
        folder = parse(name).folder
    except InputError:
        return name
    return f"{CLIP}{folder.resolve()}" if folder else name


def _architecture(model: str, known: list[str]) -> ClipName | None:
    """Returns the architecture and the tag of OpenCLIP's own names; None where it has no such architecture."""
    # OpenCLIP takes ViT-B/32 for ViT-B-32, too.
    if (whole := model.replace("/", "-")) in known:
        return ClipName(whole)
    for mark in ":/":
        architecture, _, tag = model.rpartition(mark)
        if architecture.replace("/", "-") in known:
            return ClipName(architecture.replace("/", "-"), tag)
    return None


def _unknown(name: str, model: str, known: list[str]) -> InputError:
    if not known:
        return InputError(f"{name} is neither a folder nor {CLIP}{HUB}user/model; names of OpenCLIP need {EXTRA}")
    parts = model.split("/")
    hint = f"for a repository on the Hugging Face Hub, pass {CLIP}{HUB}{model}" if len(parts) == 2 else ""
    # Without what may be a tag, so that near names of the architecture are found.
    return unknown("model of OpenCLIP", model.rpartition("/")[0] or model.partition(":")[0], known, hint=hint)
