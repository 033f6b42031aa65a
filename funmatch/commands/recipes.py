"""What a recipe costs on this machine: its arithmetic, counted, and a few real steps, measured."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from funmatch.config import Distill, Recipes, Train, recipes
from funmatch.config.recipes import Recipe
from funmatch.data.readers.catalog import CATALOG
from funmatch.models import custom
from funmatch.models.classifier import Classifier
from funmatch.models.flops import gflop
from funmatch.models.inference.frozen import Frozen, InferenceMode
from funmatch.models.timm_models import create, create_empty
from funmatch.ops.optim import hyperrule
from funmatch.reports.result import Result
from funmatch.runtime import devices
from funmatch.runtime.log import info, print_table
from funmatch.runtime.text import percent

SECONDS = 8.0  # of measurement for each network, about
IMAGES = {"cpu": 8}  # at a time on a device; elsewhere 128
OF_A_RUN = "resnetv2_101x3_bit"
"""The architecture of the teachers that a recipe names by their run folders: the earlier project's."""


def run(config: Recipes) -> Result:
    """Lists recipes, or shows one with the time that it takes here.

    Returns:
        `recipes`: for each its `name`, `command`, `top1` and `teacher_top1` as published (in [0, 1] or None), `source`,
        `note`; for one alone also `knobs` (complete), `words` (the command in full), `steps`, `images`, `gflop` (of
        each network's forward pass for one image) and, if it is measured, `hours` and `images_per_second`.

    Raises:
        InputError: there is no such recipe.
    """
    found = [recipes.RECIPES[config.name]] if config.name in recipes.RECIPES else recipes.matching(config.name)
    if len(found) > 1:
        return Result(None, {"recipes": [_line(recipe) for recipe in found]})
    return Result(None, {"recipes": [_line(found[0]) | costs(found[0], config)]})


def _line(recipe: Recipe) -> dict[str, Any]:
    published = {
        name: None if top1 is None else round(top1 / 100, 6)
        for name, top1 in (("top1", recipe.top1), ("teacher_top1", recipe.teacher_top1))
    }
    return {
        "name": recipe.name,
        "verb": recipe.verb,
        "command": recipe.command,
        **published,
        "source": recipe.source,
        "note": recipe.note,
    }


def costs(recipe: Recipe, config: Recipes) -> dict[str, Any]:
    """What one recipe says in full, and what it takes: see `run`."""
    knobs = recipe.table()
    count = CATALOG[knobs.data[0]].counts["train"]
    by_epochs = round((knobs.epochs or 0) * count / knobs.batch)
    steps = knobs.steps or by_epochs or hyperrule.steps(count)
    classes = CATALOG[knobs.data[0]].classes
    student = network(knobs.student, classes, counted=not config.measure)
    sides = knobs.teacher_side if isinstance(knobs, Distill) else ()
    taught_by = [
        (network(name, classes, counted=not config.measure), sides[number] if sides else knobs.side or 0)
        for number, name in enumerate(knobs.teacher if isinstance(knobs, Distill) else ())
    ]
    figures: dict[str, Any] = {
        "knobs": knobs.model_dump(mode="json"),
        "words": recipes.words(recipe),
        "steps": steps,
        "images": steps * knobs.batch,
        "gflop": {"student": gflop(student, knobs.side or 0), "teachers": [gflop(*each) for each in taught_by]},
    }
    if not config.measure:
        return figures
    device = devices.pick_device(config.device)
    info(f"measuring {knobs.student} and its teachers on {device}, about {SECONDS * (1 + len(taught_by)):.0f} s")
    precision = devices.resolve_precision(config.precision, device)
    seconds = student_seconds(student, knobs, device, precision)
    seconds += sum(teacher_seconds(net, side, device) for net, side in taught_by)
    return figures | {
        "images_per_second": 1 / seconds,
        "hours": figures["images"] * seconds / 3600,
        "device": str(device),
        "precision": precision,
    }


def network(name: str, classes: int, *, counted: bool = False) -> nn.Module:
    """The architecture that a recipe names, with weights that do not matter here; with none, if it is only counted."""
    if custom.is_function(name) and not name.startswith("bit:"):
        return custom.call_function(name, {}, classes)
    if name.startswith("bit:"):
        name = f"resnetv2_{name.removeprefix('bit:R').partition('_')[0]}_bit"
    made = create_empty if counted else create
    return made(OF_A_RUN if name.startswith("runs/") else name.partition(".")[0], {"num_classes": classes})


def student_seconds(net: nn.Module, knobs: Train, device: torch.device, precision: str) -> float:
    """Seconds an image to teach a network: forward, backward and update, on views of the recipe's side."""
    student = _classifier(net).to(device).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
    images = _images(knobs.side or 0, device)

    def step() -> None:
        with devices.autocast(device, precision):
            loss = student(images).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return median(step, device) / len(images)


def teacher_seconds(net: nn.Module, side: int, device: torch.device) -> float:
    """Seconds an image to ask a frozen teacher, in the usual form: folded, in the fastest arithmetic of the device."""
    precision = devices.teacher_precisions("auto", device)[0]
    teacher = Frozen(_classifier(net).to(device), InferenceMode(precision=precision))
    images = _images(side, device)
    return median(lambda: teacher(images), device) / len(images)


def median(work: Callable[[], object], device: torch.device) -> float:
    """The median of the seconds that something takes, over `SECONDS`, at least three times, after a first one."""
    work()
    times, begun = [], time.monotonic()
    while len(times) < 3 or time.monotonic() - begun < SECONDS:
        start = time.perf_counter()
        work()
        devices.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _images(side: int, device: torch.device) -> Tensor:
    return torch.rand(IMAGES.get(device.type, 128), 3, side, side, device=device)


def _classifier(net: nn.Module) -> Classifier:
    return custom.wrap_module("estimated", net, None)


def show(result: Result) -> None:
    """Prints a line a recipe, or all about one."""
    found = result.metrics["recipes"]
    if len(found) > 1:
        width = max(len(each["command"]) for each in found)
        print(f"{'command':<{width}}   top-1  teacher  published by")
        for each in found:
            tops = f"{percent(each['top1']):>7}  {percent(each['teacher_top1']):>7}"
            print(f"{each['command']:<{width}} {tops}  {each['source']}")
        print("`funmatch recipes NAME` shows one in full, with the hours that it takes on this machine")
        return
    one = found[0]
    gigas = [one["gflop"]["student"], *one["gflop"]["teachers"]]
    rows = [
        [
            "published",
            f"top-1 {percent(one['top1'])}, teacher {percent(one['teacher_top1'])} ({one['source']})",
        ],
        ["length", f"{one['steps']:,} steps, {one['images']:,} images"],
        ["arithmetic", " + ".join(f"{giga:.3g}" for giga in gigas) + " GFLOP an image (student + teachers, forward)"],
    ]
    if "hours" in one:
        rate = f"{one['images_per_second']:,.3g} pictures/s on {one['device']} in {one['precision']}"
        rows.append(["on this machine", f"{one['hours']:,.1f} hours at {rate}, views not counted"])
    if one["note"]:
        rows.append(["note", one["note"]])
    print_table(one["command"], ["", ""], rows)
    print(f"which is short for\n  {one['words']}")
