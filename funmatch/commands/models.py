"""Lists models, and imports checkpoints as folders that timm can load."""

import warnings
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import timm

from funmatch.config import Import, Models
from funmatch.errors import InputError, unknown
from funmatch.models.bit import OTHER_SIZES
from funmatch.models.classifier import check_side, timm_config
from funmatch.models.download import PAPER_FILES
from funmatch.models.flops import gflop
from funmatch.models.load import load
from funmatch.models.names import NAMED, check_architecture
from funmatch.models.save import save
from funmatch.models.timm_models import create_empty, pretrained_config
from funmatch.reports.result import Result
from funmatch.runtime.files import cache_home, write_folder_atomically
from funmatch.runtime.log import ProgressBar, info_notes, print_table

INPUTS = {
    "0..1": ((0.0,) * 3, (1.0,) * 3),
    "-1..1": ((0.5,) * 3, (0.5,) * 3),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
"""Mean and standard deviation of input normalisations, for images in [0, 1]."""
BIT = [f"resnetv2_{size}_bit" for size in ("50x1", "50x3", "101x1", "101x3", "152x2", "152x4")]
GROUPS = {**dict.fromkeys(NAMED, "bundled"), **{f"bit:{name}": "BiT weights file" for name in PAPER_FILES}}


def import_model(config: Import) -> Result:
    """Writes a model as a folder in timm's layout.

    Returns:
        `out`, `model`, `architecture`, `parameters`, `classes`, `side`, `mean`, `std`.

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
    model = load(name, weights=config.weights, pretrained=True, inputs=inputs)
    card = replace(model.card, mean=inputs[0], std=inputs[1]) if inputs else model.card
    card = replace(card, side=config.side or card.side, crop_fraction=config.crop_fraction or card.crop_fraction)
    if config.class_file:
        card = replace(card, classes=_class_names(config.class_file.expanduser(), model.num_classes))
    check_side(model, card.side)  # before anything is written
    out.parent.mkdir(parents=True, exist_ok=True)
    with write_folder_atomically(out) as partial:
        save(model, partial, card=card, about={"imported": config.model, "top1": card.top1})
    info_notes(config.model, model.notes)
    if model.function == OTHER_SIZES:
        info_notes(str(out), ["timm has no network of this size; only funmatch can load this folder"])
    metrics = {
        "out": str(out),
        "model": config.model,
        "architecture": timm_config(model.net).get("architecture"),
        "parameters": model.count_parameters(),
        "classes": model.num_classes,
        "side": card.side,
        "mean": list(card.mean),
        "std": list(card.std),
    }
    return Result(out, metrics)


def show_imported(result: Result) -> None:
    """Prints the imported model and how to use it."""
    imported = result.metrics
    rows = [[name, f"{value:,}" if isinstance(value, int) else str(value)] for name, value in imported.items()]
    print_table(f"imported {imported['model']}", ["", "value"], rows)
    print(f"use it with --teacher {imported['out']} or --student {imported['out']}")


def _class_names(path: Path, count: int) -> tuple[str, ...]:
    try:
        # Empty lines are left out, as editors leave one at the end.
        names = tuple(line.strip() for line in path.read_text().splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the class names in {path}: {error}") from error
    # Equal names would join two classes wherever classes are matched by name.
    if len(names) != count or len(set(names)) != count:
        raise InputError(
            f"{path} has {len(set(names))} distinct names, but the network has {count} classes; give one name per line"
        )
    return names


def list_models(config: Models) -> Result:
    """Lists models by name, with their size and cost.

    Returns:
        `models`: for each its `name`, `parameters`, `gflop` (forward pass of one image, a multiply-add counts as two;
        None if unknown), `side` (pixels), `classes`, and `source`; `more`: number of names left out.

    Raises:
        InputError: no model matches the pattern.
    """
    names = match_names(config.pattern)
    found = []
    # timm's warnings about single models would break the list.
    with ProgressBar("models", len(names), 0) as bar, warnings.catch_warnings(action="ignore"):
        for number, name in enumerate(names, 1):
            found.append(_entry(name, config.side))
            bar.update(number, name)
    every = len(timm.list_models())
    return Result(None, {"models": found, "more": 0 if config.pattern else every - len(BIT)})


def show_models(result: Result) -> None:
    """Prints one line per model, with complete names that can be copied."""
    models, more = result.metrics["models"], result.metrics["more"]
    # By hand, not as a table by rich, which would cut names that are to be copied.
    width = max(len(each["name"]) for each in models)
    print(f"{'name':<{width}}  {'parameters':>13}  {'GFLOP':>7}  {'size':>4}  {'classes':>7}  source")
    for each in models:
        count = "–" if each["gflop"] is None else f"{each['gflop']:.3g}"
        cells = f"{each['parameters']:>13,}  {count:>7}  {each['side']:>4}  {each['classes']:>7,}  {each['source']}"
        print(f"{each['name']:<{width}}  {cells}")
    if more:
        print(f"and {more:,} more timm models; search them by name, e.g. funmatch models mobilenetv3")


def match_names(pattern: str) -> list[str]:
    """Finds names that match a pattern, bundled ones first. Without a pattern: bundled and BiT models."""
    if not pattern:
        return [*GROUPS, *BIT]
    # timm lists architectures and pretrained tags apart; only tags hold a dot.
    tagged = "." in pattern
    everything = [*GROUPS, *(timm.list_pretrained() if tagged else timm.list_models())]
    wide = pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
    # Lower case on both sides: BiT's files have capitals in their names.
    names = [name for name in everything if fnmatch(name.lower(), wide.lower())]
    if not names:
        raise unknown("model", pattern, everything)
    return names


def _entry(name: str, side: int | None) -> dict[str, Any]:
    """Describes one model, without allocating its weights where the network allows that."""
    own = NAMED.get(name)
    paper = PAPER_FILES.get(name.removeprefix("bit:")) if name.startswith("bit:") else None
    if own:
        model = load(name, classes=10)
        net, wanted, classes = model.net, model.card.side, model.num_classes
    else:
        architecture = f"resnetv2_{name[5:].split('_')[0]}_bit" if paper else check_architecture(name, name)
        kwargs: dict[str, Any] = {"num_classes": paper[1]} if paper else {}
        # Some networks, such as ViTs, are built for one image size.
        fixed = {"img_size": side} if side and pretrained_config(architecture).get("fixed_input_size") else {}
        try:
            net = create_empty(architecture, kwargs | fixed)
        except InputError:  # not every size fits: the list still shows the model, with its FLOPs unknown at this size
            net = create_empty(architecture, kwargs)
        cfg: dict[str, Any] = vars(net)["pretrained_cfg"]
        wanted, classes = paper[0] if paper else cfg["input_size"][-1], vars(net)["num_classes"]
    return {
        "name": name,
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "gflop": gflop(net, side or wanted),
        "side": side or wanted,
        "classes": classes,
        "source": _source(name),
    }


def _source(name: str) -> str:
    if name.startswith("bit:"):
        here = cache_home() / "weights" / f"{name.removeprefix('bit:')}.npz"
        return f"{GROUPS[name]}, {'downloaded' if here.is_file() else 'downloaded on first use'}"
    if name in NAMED:
        return GROUPS[name] + ("" if isinstance(NAMED[name], str) else ", no weights")
    tags = timm.list_pretrained(f"{name}.*") if "." not in name else [name]
    return f"timm, {len(tags)} with weights" if len(tags) > 1 else "timm, with weights" if tags else "timm, no weights"
