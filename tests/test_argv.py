"""Parsing of arguments: repeated options, aliases, recipes, and messages about invalid values."""

import re
import sys

import pytest

from funmatch.argv import merge_repeated, split_students
from funmatch.cli import parse, read_command
from funmatch.commands.common import neighbours
from funmatch.commands.common.words import value_problems
from funmatch.commands.verbs import TABLES
from funmatch.config import Distill, Evaluate, Report
from funmatch.config.help import flags_of
from funmatch.config.recipes import find
from funmatch.errors import InputError

BASE = ["distill", "--data", "d", "--teacher", "t", "--student", "s", "--out", "o", "--steps", "3"]


@pytest.mark.parametrize(
    ("arguments", "merged"),
    [
        ("--teacher a --teacher b", "--teacher a b"),
        ("--teacher=a --lr 1 --teacher b c", "--teacher a b c --lr 1"),
        ("--teacher a -b 3 --teacher b", "--teacher a b -b 3"),
        ("--student-kwargs a=1 --model-kwargs b=2 --no-mixup-max", "--student-kwargs a=1 b=2 --no-mixup-max"),
        ("--teacher-share 0.5 --teacher-share -1", "--teacher-share 0.5 -1"),
        ("pet37-fast --lr 1 --lr 2", "pet37-fast --lr 1 --lr 2"),
    ],
)
def test_repeated_options_are_merged(arguments, merged):
    assert merge_repeated(arguments.split(), Distill) == merged.split()


def test_positional_values_keep_their_place():
    assert merge_repeated(["a", "b", "--out", "c"], Report) == ["a", "b", "--out", "c"]


def test_students_are_split_off_under_any_flag():
    assert split_students(["--student", "a", "--lr", "1", "--model=b"]) == (["--student", "a", "--lr", "1"], ("a", "b"))
    command = read_command([*BASE, "--student", "other"])
    assert isinstance(command.options, Distill)
    assert command.students == ("s", "other")


def test_arguments_are_parsed_to_values():
    config = parse([
        *BASE, "-b", "2", "--teacher", "u", "--teacher-share", ".5", "1", "--decay-steps", "1", "2", "--schedule",
        "staircase", "--clip-norm", "none", "--randaugment", "2", "9", "--no-mixup-max", "--opt", "sgd", "-T", "2",
        "--img-size", "64", "--loss", "js", "-j", "1", "--json",
    ])  # fmt: skip
    assert isinstance(config, Distill)
    assert (config.batch, config.teacher, config.teacher_share, config.decay_steps) == (2, ("t", "u"), (0.5, 1), (1, 2))
    assert (config.clip_norm, config.randaugment, config.mixup_max, config.optimizer) == (None, (2, 9), False, "sgd")
    assert (config.temperature, config.side, config.distance, config.workers) == (2.0, 64, "js", 1)
    assert config.as_json


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--lr 3e-3,1e-3", "--lr: wanted a number, got '3e-3,1e-3'; `funmatch tune … --space` tries several values"),
        ("--batch 1.5", "--batch: wanted a whole number, got '1.5'"),
        ("-b=x", "-b: wanted a whole number, got 'x'"),
        ("--randaugment 2", "--randaugment: wanted 2 numbers, got 1: 2"),
        ("--side 96 128", "--side: takes one number, got 96 128; run the command once for each"),
        ("--decay-steps 2 x", "--decay-steps: wanted a whole number, got 'x'"),
        ("--crop bigg", "--crop: unknown value 'bigg'; known: inception, mild, squash, whole"),
        ("--schedule cosin", "--schedule: unknown value 'cosin'; did you mean 'cosine'?; known: "),
        ("--seed", "--seed: needs a value (N)"),
        ("--lr x --crop y --lrr 3", "3 problems:\n  unknown option '--lrr'"),
    ],
)
def test_invalid_values_are_named_before_the_parser_is_imported(arguments, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "tyro", None)  # importing it fails
    with pytest.raises(InputError) as error:
        parse([*BASE, *arguments.split()])
    assert message in str(error.value)


def test_words_after_a_value_can_be_the_commands_own():
    assert value_problems(["--side", "96", "runs/s"], Evaluate) == []
    assert value_problems(["--side", "none", "runs/s"], Evaluate) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*BASE, "--tacher", "t"], "unknown option '--tacher'; did you mean '--teacher'"),
        (["distill", "--out", "o", "--lrr=3"], "2 problems:\n  unknown option '--lrr'; did you mean '--lr'"),
        (["distill", "--out", "o"], "distill needs --student, --data, --teacher; see `funmatch distill --help`"),
        ([*BASE, "--wandb"], "unknown option '--wandb'; every metric is in metrics.jsonl"),
        ([*BASE, "--image-size", "64"], "unknown option '--image-size'; use --side"),
        ([*BASE, "--learning-rate", "1"], "unknown option '--learning-rate'; use --lr"),
        ([*BASE, "--temp", "2"], "unknown option '--temp'; use --temperature"),
        (["train", "--arch", "resnet18"], "unknown option '--arch'; use --student"),
        (["finetune", "--arch", "resnet18"], "unknown option '--arch'; use --model"),
        (["evaluate", "--arch", "resnet18"], "unknown option '--arch'; give MODEL as the first word"),
        ([*BASE, "--gpus", "2"], "torchrun --nproc-per-node N"),
        ([*BASE, "--resume"], "the same command resumes"),
        ([*BASE, "--max_hours=8"], "saves first, and the same command resumes it"),
        (["validate", "runs/x"], "unknown command 'validate'; here it is `funmatch evaluate`"),
        (["--data", "d"], "'--data' is an option; the command comes first: funmatch distill --data …"),
        (["--install-completion"], "funmatch --print-completion bash"),
        (["distill", "--tyro-print-completion", "bash"], "funmatch --print-completion bash"),
        (["evaluate", "r", "--per-class"], "metrics of each class"),
        ([*BASE, "--multi-label"], "one class"),
        ([*BASE, "--push-to-hub"], "RUN/student"),
        (["infer", "runs/x"], "here it is `funmatch predict`"),
        (["predict"], "predict needs MODEL PATH … as its first words; see `funmatch predict --help`"),
        (["serve", "runs/x"], "timm.create_model('local-dir:RUN/student', pretrained=True)"),
        (["evaluate"], "evaluate needs MODEL as its first word; see `funmatch evaluate --help`"),
        (["tune", "distill", "--spac", "x"], "unknown option '--spac'; did you mean '--space'"),
        (["distill", "pet37-fast", "--batch-sise", "2"], "unknown option '--batch-sise'; did you mean '--batch-size'"),
    ],
)
def test_unknown_and_missing_options_are_all_named_before_anything_is_imported(arguments, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "tyro", None)  # importing it fails
    with pytest.raises(InputError) as error:
        parse(arguments)
    assert message in str(error.value)


def test_options_override_a_recipe_under_any_name():
    recipe = find("pet37-fast")
    assert recipe.table(batch_size=16, img_size=32).batch == 16
    assert parse(["distill", "pet37-fast", "--model", "mine"]).student == "mine"
    assert "epochs" not in recipe.over(["steps"])


def test_words_of_other_tools_are_not_ours():
    """A word that becomes one of ours must leave the list, and each sentence names options that exist."""
    every = {
        flag.lstrip("-") for table in TABLES.values() for name in table.model_fields for flag in flags_of(table, name)
    }
    for sentence, theirs in neighbours.OPTIONS.items():
        assert not set(theirs) & {*Distill.words(), *(word.replace("_", "-") for word in Distill.words())}
        assert {word.lstrip("-") for word in re.findall(r"--[a-z][a-z-]*", sentence)} <= {
            *every,
            "nproc-per-node",
            "print-completion",
        }
    assert (
        not {word for theirs in neighbours.COMMANDS.values() for word in (*theirs, *neighbours.USE_IT)} & TABLES.keys()
    )
    assert neighbours.COMMANDS.keys() <= TABLES.keys()
    assert not neighbours.option_hint("--wd", Evaluate), "it has no such option"
