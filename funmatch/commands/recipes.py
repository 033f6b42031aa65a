"""Lists recipes and estimates their cost on this machine: FLOPs are counted, and a few real steps are measured."""

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
from funmatch.models.inference.frozen import Frozen
from funmatch.models.inference.modes import InferenceMode
from funmatch.models.names import is_function
from funmatch.models.timm_models import create, create_meta
from funmatch.ops.optim import hyperrule
from funmatch.reports.result import Result
from funmatch.runtime import devices
from funmatch.runtime.log import info, print_line, print_table
from funmatch.runtime.text import percent

SECONDS = 8.0  # measuring time for each network, approximately
IMAGES = {"cpu": 8}  # batch size by device type; 128 on others
RUN_ARCHITECTURE = "resnetv2_101x3_bit"
"""Architecture of teachers that a recipe names by their run folders: a BiT R101x3."""


def run(config: Recipes) -> Result:
    """Lists recipes, or describes one with its duration on this machine.

    Returns:
        `recipes`: for each its `name`, `command`, `top1` and `teacher_top1` as published (in [0, 1] or None), `source`,
        `note`; for a single recipe also `knobs` (all options), `words` (the complete command), `steps`, `images`,
        `gflop` (of each network's forward pass for one image) and, if measured, `hours` and `images_per_second`.

    Raises:
        InputError: no recipe matches the name.
    """
    # The exact name first: teacher-pet37 is also part of other names.
    found = [recipes.RECIPES[config.name]] if config.name in recipes.RECIPES else recipes.matching(config.name)
    if len(found) > 1:
        return Result(None, {"recipes": [_line(recipe) for recipe in found]})
    return Result(None, {"recipes": [_line(found[0]) | costs(found[0], config)]})


def _line(recipe: Recipe) -> dict[str, Any]:
    published = {
        # Shares, as in everything that is printed as JSON; rounded, since 88.01 / 100 is 0.8801000000000001.
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
    """Expands one recipe and estimates its cost; see `run`."""
    options = recipe.table()
    count = CATALOG[options.data[0]].counts["train"]
    # As the runs resolve their length: steps, else epochs, else BiT-HyperRule by the number of images.
    by_epochs = round((options.epochs or 0) * count / options.batch)
    steps = options.steps or by_epochs or hyperrule.steps(count)
    # From the catalog, so that recipes can be listed without their data.
    classes = CATALOG[options.data[0]].classes
    student = network(options.student, classes, counted=not config.measure)
    sides = options.teacher_side if isinstance(options, Distill) else ()
    teachers = [
        (network(name, classes, counted=not config.measure), sides[number] if sides else options.side or 0)
        for number, name in enumerate(options.teacher if isinstance(options, Distill) else ())
    ]
    estimate: dict[str, Any] = {
        "knobs": options.model_dump(mode="json"),
        "words": recipes.words(recipe),
        "steps": steps,
        "images": steps * options.batch,
        "gflop": {"student": gflop(student, options.side or 0), "teachers": [gflop(*each) for each in teachers]},
    }
    if not config.measure:
        return estimate
    device = devices.pick_device(config.device)
    info(f"measuring {options.student} and its teachers on {device}, about {SECONDS * (1 + len(teachers)):.0f} s")
    precision = devices.resolve_precision(config.precision, device)
    seconds = student_seconds(student, options, device, precision)
    seconds += sum(teacher_seconds(net, side, device) for net, side in teachers)
    return estimate | {
        "images_per_second": 1 / seconds,
        "hours": estimate["images"] * seconds / 3600,
        "device": str(device),
        "precision": precision,
    }


def network(name: str, classes: int, *, counted: bool = False) -> nn.Module:
    """Builds the architecture that a recipe names with arbitrary weights, or without weights to count FLOPs."""
    # `bit:` has a colon too, as the functions of modules have.
    if is_function(name) and not name.startswith("bit:"):
        return custom.call_function(name, {}, classes)
    if name.startswith("bit:"):
        name = f"resnetv2_{name.removeprefix('bit:R').partition('_')[0]}_bit"
    # Counting needs no weights, of which a BiT R152x2 has nearly a gigabyte.
    build = create_meta if counted else create
    return build(RUN_ARCHITECTURE if name.startswith("runs/") else name.partition(".")[0], {"num_classes": classes})


def student_seconds(net: nn.Module, options: Train, device: torch.device, precision: str) -> float:
    """Measures training time in seconds per image: forward, backward and update at the recipe's image size."""
    student = _classifier(net).to(device).train()
    # With a rate of 0, random weights stay finite however many steps are measured; the cost is the same.
    optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
    images = _images(options.side or 0, device)

    def step() -> None:
        with devices.autocast(device, precision):
            loss = student(images).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return median(step, device) / len(images)


def teacher_seconds(net: nn.Module, side: int, device: torch.device) -> float:
    """Measures a teacher's forward time in seconds per image, folded and in the device's fastest precision."""
    # Without the parity check of a run: random weights say nothing about rounding.
    precision = devices.teacher_precisions("auto", device)[0]
    teacher = Frozen(_classifier(net).to(device), InferenceMode(precision=precision))
    images = _images(side, device)
    return median(lambda: teacher(images), device) / len(images)


def median(work: Callable[[], object], device: torch.device) -> float:
    """Measures the median duration of a call in seconds, over about `SECONDS` and at least three calls."""
    work()  # the first call compiles kernels and allocates memory
    times, started = [], time.monotonic()
    # By the clock, not by a number of calls: networks differ by orders of magnitude.
    while len(times) < 3 or time.monotonic() - started < SECONDS:
        start = time.perf_counter()
        work()
        devices.synchronize(device)  # kernels run asynchronously on a GPU
        times.append(time.perf_counter() - start)
    # The median: other programs slow single calls down.
    return statistics.median(times)


def _images(side: int, device: torch.device) -> Tensor:
    return torch.rand(IMAGES.get(device.type, 128), 3, side, side, device=device)


def _classifier(net: nn.Module) -> Classifier:
    return custom.wrap_module("estimated", net, None)


def show(result: Result) -> None:
    """Prints one line per recipe, or all details of a single one."""
    found = result.metrics["recipes"]
    if len(found) > 1:
        # By hand, not as a table by rich, which would wrap commands that are to be copied.
        width = max(len(each["command"]) for each in found)
        print_line(f"{'command':<{width}}   top-1  teacher  published by")
        for each in found:
            tops = f"{percent(each['top1']):>7}  {percent(each['teacher_top1']):>7}"
            print_line(f"{each['command']:<{width}} {tops}  {each['source']}")
        print_line("`funmatch recipes NAME` shows one recipe in full and estimates its duration on this machine")
        return
    one = found[0]
    gigas = [one["gflop"]["student"], *one["gflop"]["teachers"]]
    rows = [
        [
            "published",
            f"top-1 {percent(one['top1'])}, teacher {percent(one['teacher_top1'])} ({one['source']})",
        ],
        ["length", f"{one['steps']:,} steps, {one['images']:,} images"],
        ["FLOPs", " + ".join(f"{giga:.3g}" for giga in gigas) + " GFLOP per image (forward; student + teachers)"],
    ]
    if "hours" in one:
        rate = f"{one['images_per_second']:,.3g} images/s on {one['device']} in {one['precision']}"
        rows.append(["on this machine", f"{one['hours']:,.1f} hours at {rate}, without image loading"])
    if one["note"]:
        rows.append(["note", one["note"]])
    print_table(one["command"], ["", ""], rows)
    print_line(f"full command:\n  {one['words']}")
