"""Lists the models that can be named; their parameters and operations are counted without building them."""

import warnings
from fnmatch import fnmatch
from typing import Any

from funmatch.config import Models
from funmatch.errors import InputError, unknown
from funmatch.models.names import NAMED, check_architecture, timm_names
from funmatch.models.origins.download import PAPER_FILES
from funmatch.reports.result import Result
from funmatch.runtime.disk.files import cache_home
from funmatch.runtime.log import ProgressBar, info_loading, print_line

BIT = [f"resnetv2_{size}_bit" for size in ("50x1", "50x3", "101x1", "101x3", "152x2", "152x4")]
GROUPS = {**dict.fromkeys(NAMED, "bundled"), **{f"bit:{name}": "BiT weights file" for name in PAPER_FILES}}
FEW = 20
"""Models whose figures are counted unasked: it takes about a second each."""


def list_models(config: Models) -> Result:
    """Lists models by name, with their size and, where they are few or `figures` is set, their cost.

    Returns:
        `models`: for each its `name`, `parameters`, `gflop` (forward pass of one image, a multiply-add counts as two),
        `side` (pixels), `classes`, and `source`; figures are None where they are not counted or cannot be; `more`:
        number of names left out; `counted`: whether figures were counted.

    Raises:
        InputError: no model matches the pattern.
    """
    names = match_names(config.pattern)
    counted = config.figures or config.side is not None or len(names) <= FEW
    # Names alone are listed at once, without either.
    if counted:
        info_loading("models", "PyTorch and timm")
    found = []
    # timm's warnings about single models would break the list.
    with ProgressBar("models", len(names), 0) as bar, warnings.catch_warnings(action="ignore"):
        for number, name in enumerate(names, 1):
            side, classes = _size(name)
            figures = _figures(name, config.side or side) if counted else dict.fromkeys(("parameters", "gflop"))
            found.append({
                "name": name, **figures, "side": config.side or side, "classes": classes, "source": _source(name),
            })  # fmt: skip
            bar.update(number, name)
    more = 0 if config.pattern else len(timm_names()["models"]) - len(BIT)
    return Result(None, {"models": found, "more": more, "counted": counted})


def show_models(result: Result) -> None:
    """Prints one line per model, with complete names that can be copied."""
    models, more, counted = (result.metrics[key] for key in ("models", "more", "counted"))
    # By hand, not as a table by rich, which would cut names that are to be copied.
    width = max(len(each["name"]) for each in models)
    costs = f"  {'parameters':>13}  {'GFLOP':>7}" if counted else ""
    print_line(f"{'name':<{width}}{costs}  {'size':>4}  {'classes':>7}  source")
    for each in models:
        parameters, gflop = each["parameters"], each["gflop"]
        cells = [f"{parameters:>13,}" if parameters else f"{'–':>13}", f"{gflop:>7.3g}" if gflop else f"{'–':>7}"]
        cells = [*(cells if counted else ()), f"{each['side']:>4}", f"{each['classes']:>7,}", each["source"]]
        print_line("  ".join([f"{each['name']:<{width}}", *cells]))
    if not counted:
        print_line(f"{len(models):,} models; --figures counts the parameters and operations of each")
    if more:
        print_line(f"and {more:,} more timm models; search them by name, e.g. funmatch models mobilenetv3")


def match_names(pattern: str) -> list[str]:
    """Finds names that match a pattern, bundled ones first. Without a pattern: bundled and BiT models."""
    if not pattern:
        return [*GROUPS, *BIT]
    # timm lists architectures and pretrained tags apart; only tags hold a dot.
    tagged = "." in pattern
    everything = [*GROUPS, *timm_names()["tagged" if tagged else "models"]]
    wide = pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
    # Lower case on both sides: BiT's files have capitals in their names.
    names = [name for name in everything if fnmatch(name.lower(), wide.lower())]
    if not names:
        raise unknown("model", pattern, everything)
    return names


def _size(name: str) -> tuple[int, int]:
    """Returns the image size of a model, in pixels, and its number of classes."""
    if name in NAMED:
        return 32, 10  # both are made for the embedded images
    return PAPER_FILES[name.removeprefix("bit:")] if name.startswith("bit:") else tuple(timm_names()["sizes"][name])


def _figures(name: str, side: int) -> dict[str, Any]:
    """Counts a model's parameters and operations on the device `meta`, where even the largest takes no memory."""
    # Here, so that names alone are listed at once.
    from funmatch.models.flops import gflop
    from funmatch.models.load import load
    from funmatch.models.timm_models import create_meta, pretrained_config

    if name in NAMED:
        net = load(name, classes=_size(name)[1]).net
    else:
        is_paper = name.startswith("bit:")
        architecture = f"resnetv2_{name[5:].split('_')[0]}_bit" if is_paper else check_architecture(name, name)
        kwargs: dict[str, Any] = {"num_classes": _size(name)[1]} if is_paper else {}
        # Some networks, such as ViTs, are built for one image size.
        fixed = {"img_size": side} if pretrained_config(architecture).get("fixed_input_size") else {}
        try:
            net = create_meta(architecture, kwargs | fixed)
        except InputError:  # not every size fits every network, and some cannot be built without numbers
            return {"parameters": None, "gflop": None}
    return {"parameters": sum(parameter.numel() for parameter in net.parameters()), "gflop": gflop(net, side)}


def _source(name: str) -> str:
    if name.startswith("bit:"):
        here = cache_home() / "weights" / f"{name.removeprefix('bit:')}.npz"
        return f"{GROUPS[name]}, {'downloaded' if here.is_file() else 'downloaded on first use'}"
    if name in NAMED:
        return GROUPS[name] + ("" if isinstance(NAMED[name], str) else ", no weights")
    tags = [name] if "." in name else [each for each in timm_names()["tagged"] if each.startswith(f"{name}.")]
    return f"timm, {len(tags)} with weights" if len(tags) > 1 else "timm, with weights" if tags else "timm, no weights"
