"""The shelf of models: what can be named, and checkpoints turned into folders that timm loads."""

import warnings
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import timm

from funmatch.config import Import, Models
from funmatch.errors import InputError, unknown
from funmatch.models.classifier import OTHER_SIZES, check_side, save, timm_config
from funmatch.models.download import PAPER_FILES
from funmatch.models.flops import gflop
from funmatch.models.load import NAMED, load
from funmatch.models.timm_models import create_empty, is_known, net_config
from funmatch.reports.result import Result
from funmatch.runtime.files import cache_home, write_folder_atomically
from funmatch.runtime.log import ProgressBar, info_notes, print_table

INPUTS = {
    "0..1": ((0.0,) * 3, (1.0,) * 3),
    "-1..1": ((0.5,) * 3, (0.5,) * 3),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
"""Mean and standard deviation, for images in [0, 1], of what networks are trained on."""
BIT = [f"resnetv2_{size}_bit" for size in ("50x1", "50x3", "101x1", "101x3", "152x2", "152x4")]
GROUPS = {**dict.fromkeys(NAMED, "embedded"), **{f"bit:{name}": "the paper's own file" for name in PAPER_FILES}}


def import_model(config: Import) -> Result:
    """Writes a model as a folder in timm's own layout.

    Returns:
        `out`, `model`, `architecture`, `parameters`, `classes`, `side`, `mean`, `std`.

    Raises:
        InputError: the model cannot be loaded, or the folder is taken.
    """
    out = config.out.expanduser()
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise InputError(f"{out} exists; choose another --out")
    path = Path(config.model).expanduser()
    name = f"savedmodel:{config.model}" if (path / "saved_model.pb").is_file() else config.model
    inputs = INPUTS.get(config.inputs)
    model = load(name, weights=config.weights, pretrained=True, inputs=inputs)
    card = replace(model.card, mean=inputs[0], std=inputs[1]) if inputs else model.card
    card = replace(card, side=config.side or card.side, crop_fraction=config.crop_fraction or card.crop_fraction)
    if config.class_file:
        card = replace(card, classes=_class_names(config.class_file.expanduser(), model.num_classes))
    check_side(model, card.side)
    out.parent.mkdir(parents=True, exist_ok=True)
    with write_folder_atomically(out) as partial:
        save(model, partial, card=card, about={"imported": config.model, "top1": card.top1})
    info_notes(config.model, model.notes)
    if model.function == OTHER_SIZES:
        info_notes(str(out), ["timm has no network of this size; funmatch alone can load it"])
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
    """Prints what was imported, and by which name it is loaded."""
    figures = result.metrics
    rows = [[name, f"{value:,}" if isinstance(value, int) else str(value)] for name, value in figures.items()]
    print_table(f"{figures['model']}, imported", ["what", "value"], rows)
    print(f"name it as {figures['out']}")


def _class_names(path: Path, count: int) -> tuple[str, ...]:
    try:
        names = tuple(line.strip() for line in path.read_text().splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the class names in {path}: {error}") from error
    if len(names) != count or len(set(names)) != count:
        raise InputError(f"{path} has {len(set(names))} names, the network {count} classes; wanted a line for each")
    return names


def list_models(config: Models) -> Result:
    """What can be named, with what it costs.

    Returns:
        `models`: for each its `name`, `parameters`, `gflop` (forward, one image, a multiply-add is two; None where
        it cannot be counted), `side` (pixels), `classes`, and `source`; `more`: how many names are left out.

    Raises:
        InputError: nothing matches the pattern.
    """
    names = match_names(config.pattern)
    found = []
    with ProgressBar("models", len(names), 0) as bar, warnings.catch_warnings(action="ignore"):
        for number, name in enumerate(names, 1):
            found.append(_entry(name, config.side))
            bar.update(number, name)
    every = len(timm.list_models())
    return Result(None, {"models": found, "more": 0 if config.pattern else every - len(BIT)})


def show_models(result: Result) -> None:
    """A line a model, names in full so that they can be copied."""
    figures = result.metrics
    models = figures["models"]
    width = max(len(each["name"]) for each in models)
    print(f"{'name':<{width}}  {'parameters':>13}  {'GFLOP':>7}  {'side':>4}  {'classes':>7}  source")
    for each in models:
        count = "–" if each["gflop"] is None else f"{each['gflop']:.3g}"
        cells = f"{each['parameters']:>13,}  {count:>7}  {each['side']:>4}  {each['classes']:>7,}  {each['source']}"
        print(f"{each['name']:<{width}}  {cells}")
    if figures["more"]:
        print(f"and {figures['more']:,} more of timm: give a part of their name, e.g. funmatch models mobilenetv3")


def match_names(pattern: str) -> list[str]:
    """Names that hold a pattern, ours first. Without one: ours, the paper's files and BiT."""
    if not pattern:
        return [*GROUPS, *BIT]
    tagged = "." in pattern
    everything = [*GROUPS, *(timm.list_pretrained() if tagged else timm.list_models())]
    wide = pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
    names = [name for name in everything if fnmatch(name.lower(), wide.lower())]
    if not names:
        raise unknown("model", pattern, everything)
    return names


def _entry(name: str, side: int | None) -> dict[str, Any]:
    """One line of the list, computed without memory for weights where the network allows that."""
    own = NAMED.get(name)
    paper = PAPER_FILES.get(name.removeprefix("bit:")) if name.startswith("bit:") else None
    if own:
        model = load(name, classes=10)
        net, wanted, classes = model.net, model.card.side, model.num_classes
    else:
        architecture = f"resnetv2_{name[5:].split('_')[0]}_bit" if paper else is_known(name, name)
        kwargs: dict[str, Any] = {"num_classes": paper[1]} if paper else {}
        fixed = {"img_size": side} if side and net_config(architecture).get("fixed_input_size") else {}
        try:
            net = create_empty(architecture, kwargs | fixed)
        except InputError:  # its arithmetic at this side is then not counted
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
        return f"{GROUPS[name]}, {'here' if here.is_file() else 'fetched on first use'}"
    if name in NAMED:
        return GROUPS[name] + ("" if isinstance(NAMED[name], str) else ", no weights")
    tags = timm.list_pretrained(f"{name}.*") if "." not in name else [name]
    return f"timm, {len(tags)} with weights" if len(tags) > 1 else "timm, with weights" if tags else "timm, no weights"
