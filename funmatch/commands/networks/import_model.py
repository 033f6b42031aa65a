"""Imports checkpoints of any kind as folders that timm can load."""

from dataclasses import replace
from pathlib import Path

from funmatch.config import Import
from funmatch.data.remote.single import local_file
from funmatch.errors import InputError
from funmatch.models import bit
from funmatch.models.classifier import Classifier, check_side, timm_config
from funmatch.models.clip import network as clip_network
from funmatch.models.clip.class_texts import class_texts_of
from funmatch.models.load import load
from funmatch.models.save import save
from funmatch.reports.result import Result
from funmatch.runtime.disk.files import read_lines, write_folder_atomically
from funmatch.runtime.log import info_notes, print_line, print_table, track

INPUTS = {
    "0..1": ((0.0,) * 3, (1.0,) * 3),
    "-1..1": ((0.5,) * 3, (0.5,) * 3),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
"""Mean and standard deviation of input normalisations, for images in [0, 1]."""


def import_model(config: Import) -> Result:
    """Writes a model as a folder in timm's layout.

    Returns:
        `out`, `model`, `architecture`, `parameters`, `classes`, `side`, `side_known`, `mean`, `std`.

    Raises:
        InputError: the model cannot be loaded, or the folder is not empty.
    """
    out = config.out.expanduser()
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise InputError(f"{out} exists; choose another --out")
    path = Path(config.model).expanduser()
    # A folder of TensorFlow needs no prefix here; as a teacher it does.
    name = f"savedmodel:{config.model}" if (path / "saved_model.pb").is_file() else config.model
    inputs = INPUTS.get(config.inputs)
    texts = class_texts_of(config, [name])
    model = load(name, weights=config.weights, options=config.model_kwargs, pretrained=True, inputs=inputs, texts=texts)
    card = replace(model.card, mean=inputs[0], std=inputs[1]) if inputs else model.card
    card = replace(card, side=config.side or card.side, crop_fraction=config.crop_fraction or card.crop_fraction)
    card = replace(card, side_known=card.side_known or config.side is not None)
    if file := local_file(config.class_file, track):
        card = replace(card, classes=_class_names(file, model.num_classes))
    check_side(model, card.side)  # before anything is written
    out.parent.mkdir(parents=True, exist_ok=True)
    with write_folder_atomically(out) as partial:
        about = {"imported": config.model, "top1": card.top1} | ({} if card.side_known else {"side_known": False})
        save(model, partial, card=card, about=about)
    info_notes(config.model, [*model.notes, *card.side_notes])
    info_notes(str(out), _notes_of_folder(model))
    metrics = {
        "out": str(out),
        "model": config.model,
        "architecture": timm_config(model.net).get("architecture") or model.function or vars(model.net).get("kind"),
        "parameters": model.count_parameters(),
        "classes": model.num_classes,
        "side": card.side,
        "side_known": card.side_known,
        "mean": list(card.mean),
        "std": list(card.std),
    }
    return Result(out, metrics)


def _notes_of_folder(model: Classifier) -> list[str]:
    """Says where a folder in timm's layout holds a network that timm does not have."""
    if model.function == bit.OWN:
        reason = "with this padding" if model.options.get(bit.PADDING) == "-inf" else "of this size"
        return [f"timm has no network {reason}; only funmatch can load this folder (export --format timm folds it)"]
    if model.function == clip_network.OWN:
        needs = "funmatch[clip]" if model.options["tower"]["kind"] == "open_clip" else "funmatch"
        return [f"only {needs} can load this folder: its embeddings are scaled to length 1 before its head"]
    return []


def show_imported(result: Result) -> None:
    """Prints the imported model and how to use it."""
    imported = result.metrics
    # A size that is not known is said in a sentence.
    facts = {name: value for name, value in imported.items() if name != "side_known"}
    rows = [[name, f"{value:,}" if isinstance(value, int) else str(value)] for name, value in facts.items()]
    print_table(f"imported {imported['model']}", ["", "value"], rows)
    print_line(f"use it with --teacher {imported['out']} or --student {imported['out']}")


def _class_names(path: Path, count: int) -> tuple[str, ...]:
    names = tuple(read_lines(path, "the class names"))
    # Equal names would join two classes wherever classes are matched by name.
    if len(names) != count or len(set(names)) != count:
        raise InputError(
            f"{path} has {len(set(names))} distinct names, but the network has {count} classes; give one name per line"
        )
    return names
