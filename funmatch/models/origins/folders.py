"""Origins of models in folders: timm's layout, those that we saved, and weights beside a user's function."""

from pathlib import Path
from typing import Any

from funmatch.errors import InputError, first_line
from funmatch.models import custom
from funmatch.models.checkpoints.checkpoint import open_checkpoint, weights_in
from funmatch.models.names import GIVEN, HUB, LOCAL, SAVEDMODEL, is_function, is_timm_name, no_model_at
from funmatch.models.origins.origin import CONFIG_KEYS, Origin, own_entries
from funmatch.models.tensorflow.preprocessing import AS_GIVEN
from funmatch.models.transformers.config import read_entries
from funmatch.models.transformers.folder import transformers_origin
from funmatch.runtime.disk import records
from funmatch.runtime.disk.checksums import MANIFEST, verify_folder
from funmatch.runtime.disk.json_files import Damaged, parse_json

MODEL = {"architecture": str, "model_args?": dict, "funmatch?": dict, "pretrained_cfg?": dict}
"""What the `config.json` of a model holds in timm's layout; `timm_models.card_of` checks the rest."""
CARD = {
    "pretrained_cfg": dict.fromkeys(CONFIG_KEYS, Any),
    "num_classes?": int | None,
    "model_args?": dict | None,
    "funmatch?": dict | None,
}
"""What the `config.json` of a network that is not timm's holds."""


def model_folder(name: str) -> Path | None:
    """Returns the folder with `config.json` and weights that a name means; None if it means none."""
    # A timm name wins over a folder of the same name in the working directory; ./name means the folder.
    if name.startswith(HUB) or is_function(name) or is_timm_name(name):
        return None
    path = Path(name.removeprefix(LOCAL)).expanduser()
    if not path.is_dir():
        raise no_model_at(name, path, LOCAL if name.startswith(LOCAL) else "")
    for folder in (path / "student", path):
        if weights_in(folder) and (folder / "config.json").is_file():
            return folder
    if records.is_run(path):
        raise InputError(
            f"the run {path} is unfinished, so it has no student yet; start its command again to resume it"
        )
    if (path / "saved_model.pb").is_file():
        raise InputError(f"{path} is a SavedModel of Keras; pass {SAVEDMODEL}{path}")
    if found := weights_in(path):
        raise InputError(f"{path} has no config.json; pass the name of its architecture, and {found} as its weights")
    raise InputError(f"{path} is neither a run nor a model: it has no config.json with model.safetensors")


def folder_origin(folder: Path, kwargs: dict[str, Any], side: int | None = None) -> Origin:
    """Returns the origin of a folder in timm's layout, or in that of transformers.

    Args:
        kwargs: arguments of the constructor.
        side: of the views, pixels, where the user chose it.
    """
    path = folder / "config.json"
    verify_model(folder)
    if (entries := read_entries(path)) is not None:
        return transformers_origin(folder, entries, kwargs, side)
    try:
        config = parse_json(path.read_bytes(), MODEL)
    except ValueError as error:
        raise InputError(_bad_config(path, error)) from None
    kwargs = config.get("model_args", {}) | kwargs
    architecture, card = config["architecture"], own_entries(config.get("funmatch", {}))
    weights = weights_in(folder) or folder / "model.safetensors"
    if architecture.startswith(GIVEN):
        raise InputError(f"{folder} has the weights of a module that was given from Python; load them from there")
    if architecture in custom.OWN:
        return Origin(str(folder), architecture, open_checkpoint(weights), kwargs, card | _read_card(path))
    # A file that was downloaded must not decide which code runs, so the user has to name the function.
    if is_function(architecture):
        raise InputError(
            f"{folder} is a network made by the function {architecture}; if you trust that code, name it yourself: "
            f"{architecture}, with the weights {weights}"
        )
    # An import of a file that did not say it (`funmatch import`).
    known = config.get("funmatch", {}).get("side_known") is not False
    return Origin(str(folder), f"{LOCAL}{folder}", open_checkpoint(weights), kwargs, card, side_known=known)


def verify_model(folder: Path) -> None:
    """Raises `InputError` if the files of a model's folder are not those that were written; see `verify_folder`."""
    _verify(folder, None)


def verify_weights(path: Path) -> None:
    """Raises `InputError` if a file of weights in a folder of ours, as a student's, is not as it was written."""
    _verify(path.parent, path.name)


def _verify(folder: Path, only: str | None) -> None:
    try:
        verify_folder(folder, only)
    except Damaged as error:
        mend = "start the command of its run again" if records.is_run(folder.parent) else "copy the folder again"
        raise InputError(f"{error}; {mend}, or remove {folder / MANIFEST} if you changed it yourself") from None


def _bad_config(path: Path, error: Exception) -> str:
    """Returns the message for a `config.json` that is not in timm's layout."""
    return f"{path} is not the configuration of a model ({first_line(error)})"


def function_origin(name: str, path: Path, kwargs: dict[str, Any], side: int | None, key: Any) -> Origin:
    """Returns the origin of weights, those under `key` in a file, for a network that the user's function makes."""
    # A run that trained such a network wrote its card beside the weights.
    config = path.parent / "config.json"
    card = _read_card(config) if config.is_file() else {}
    side = side or custom.DEFAULT_SIDE
    plain = {"input_size": (3, side, side), "mean": AS_GIVEN[0], "std": AS_GIVEN[1]}
    verify_weights(path)
    return Origin(str(path), name, open_checkpoint(path, key), card.pop("model_args", {}) | kwargs, plain | card)


def _read_card(path: Path) -> dict[str, Any]:
    """Reads the card of a network that is not timm's from its `config.json`."""
    try:
        config = parse_json(path.read_bytes(), CARD)
    except ValueError as error:
        raise InputError(_bad_config(path, error)) from None
    # How images were cropped, too; folders that were saved before it was a choice do not say it.
    card = {key: value for key, value in config["pretrained_cfg"].items() if key in (*CONFIG_KEYS, "crop_mode")}
    card |= {key: config.get(key) for key in ("num_classes", "label_names", "model_args") if config.get(key)}
    task = (config.get("funmatch") or {}).get("task")
    return card | ({"task": task} if task else {})
