"""Recipes are complete and found by name; options override them, and a run records the changes."""

import json
import shlex

import pytest
import timm
import torch
from make_images import FEW

import funmatch
from funmatch.cli import parse
from funmatch.commands import recipes
from funmatch.config import Recipes
from funmatch.config.recipes import RECIPES, find, words
from funmatch.errors import InputError
from funmatch.models.groupnorm import mobilenetv3_large_gn

TINY = ["--data", FEW, "--side", "32", "--batch", "16", "--threads", "1"]


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_equals_its_command_written_out(name):
    recipe = RECIPES[name]
    short, long = parse([recipe.verb, name]), parse(shlex.split(words(recipe))[1:])
    assert short.recipe == name
    assert short.model_copy(update={"recipe": None}) == long
    assert short == recipe.table()


def test_all_published_rows_have_recipes():
    for data, count in (("flowers102", 4), ("pet37", 5), ("food101", 3), ("sun397", 3)):
        rows = [recipe for name, recipe in RECIPES.items() if name.startswith(f"{data}-")]
        assert len(rows) == count
        assert all(recipe.teacher_top1 for recipe in rows)
        assert {f"teacher-{data}", f"teacher-{data}-r101x3"} <= RECIPES.keys()
    fast = find("flowers102-fast").table()
    assert (fast.epochs, fast.lr, fast.weight_decay, fast.temperature) == (10_000, 3e-3, 3e-4, 10)
    assert (fast.batch, fast.side, fast.eval_resize, fast.warmup_steps) == (512, 128, 160, 1500)
    assert find("imagenet-1200").table().batch == 4096
    assert {name for name in RECIPES if name.startswith("tf-")} == {
        "tf-teacher-flowers102", "tf-teacher-pet37", "tf-teacher-food101",
        "tf-flowers102-1000", "tf-pet37-300", "tf-pet37-1000", "tf-food101-100",
    }  # fmt: skip


def test_options_override_a_recipe():
    config = parse(["distill", "pet37-fast", "--steps", "10", "--teacher", "runs/mine", "--lr", "0.5"])
    assert (config.steps, config.epochs, config.teacher, config.lr) == (10, None, ("runs/mine",), 0.5)
    assert config.temperature == 5
    assert parse(["finetune", "--recipe", "tf-teacher-pet37", "--model", "resnet18"]).student == "resnet18"
    assert parse(["finetune", "--recipe=teacher-pet37"]).student == "resnetv2_152x2_bit.goog_in21k"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["distill", "pet37-fats"], "did you mean 'pet37-fast'"),
        (["finetune", "pet37-fast"], "funmatch distill pet37-fast"),
        (["distill", "pet37-fast", "--recipe", "pet37-long"], "two recipes"),
    ],
)
def test_wrong_recipe_names_are_rejected(argv, message):
    with pytest.raises(InputError, match=message):
        parse(argv)


def test_run_records_its_changes_from_the_recipe(funmatch, tmp_path):
    options = [*TINY, "--model", "resnet10t", "--model-kwargs", "channels=8,8,16,16", "stem_width=8", "--resize", "40"]
    options += ["--steps", "4", "--eval-every", "2", "--decay-steps", "2"]
    done = funmatch("finetune", "tf-teacher-pet37", *options, "--out", "run", "--json")
    metrics = json.loads(done.stdout)
    assert metrics["split"] == "test"
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["knobs"]["recipe"] == "tf-teacher-pet37"
    changed = config["facts"]["overridden"]
    assert changed["steps"] == [450, 4]
    assert changed["data"] == [["pet37"], [FEW]]
    assert changed["decay_steps"] == [[200, 300, 400], [2]]
    assert not {"lr", "eval_resize", "out", "threads", "crop"} & changed.keys()
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Options that differ from the recipe" in page
    assert "tf-teacher-pet37" in page
    again = funmatch("finetune", "tf-teacher-pet37", *options, "--out", "run")
    assert "nothing to do" in again.stderr


def test_recipe_from_python(tmp_path):
    run = funmatch.recipe(
        "pet37-fast", data=FEW, teacher="fashion-mini-teacher", student="fashion-mini-student", side=32,
        eval_resize=32, steps=2, batch=8, out=tmp_path / "run",
    )  # fmt: skip
    assert run.figures["step"] == 2


def test_recipes_command_lists_all_and_shows_one_in_full(funmatch):
    listed = json.loads(funmatch("recipes", "--json").stdout)["recipes"]
    assert len(listed) == len(RECIPES)
    (one,) = json.loads(funmatch("recipes", "pet37-fast", "--no-measure", "--json").stdout)["recipes"]
    assert (one["top1"], one["teacher_top1"]) == (0.8801, 0.9103)
    assert one["images"] == one["steps"] * 512
    assert one["steps"] == round(3312 * 1000 / 512)
    assert one["gflop"]["student"] == pytest.approx(2.67, rel=0.01)
    assert one["gflop"]["teachers"] == [pytest.approx(29.9, rel=0.01)]
    assert "unknown recipe" in funmatch("recipes", "nothing-like-it", check=2).stderr


def test_estimated_hours_are_images_over_measured_throughput(monkeypatch):
    monkeypatch.setattr(recipes, "SECONDS", 0.01)
    monkeypatch.setattr(
        recipes, "network", lambda _name, classes, **_: timm.create_model("resnet10t", num_classes=classes)
    )
    (one,) = recipes.run(Recipes(name="flowers102-fast")).metrics["recipes"]
    assert one["hours"] == pytest.approx(one["images"] / one["images_per_second"] / 3600)


def test_groupnorm_mobilenet_has_no_batch_norm():
    net = mobilenetv3_large_gn(num_classes=7).eval()
    assert not [m for m in net.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert len([m for m in net.modules() if isinstance(m, torch.nn.GroupNorm)]) == len(
        [m for m in timm.create_model("mobilenetv3_large_100").modules() if isinstance(m, torch.nn.BatchNorm2d)]
    )
    assert net(torch.zeros(1, 3, 64, 64)).shape == (1, 7)
