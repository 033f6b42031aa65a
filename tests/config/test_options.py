"""Options are described completely where they are declared, and their bounds are enforced."""

import ast
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest

from funmatch import config
from funmatch.config import SEARCHED, TAUGHT, Changes, Distill, Evaluate, Finetune, Train, options_changing, tools
from funmatch.config.metadata import Group, Opt
from funmatch.config.options import Machine, Options, alternatives, like, listed, replaced_by
from funmatch.errors import InputError

EVERY = [*vars(config).values(), *vars(tools).values()]
TABLES = [*dict.fromkeys(each for each in EVERY if isinstance(each, type) and issubclass(each, Options))]
PACKAGE = Path(config.__file__).parent.parent
BASE: dict[str, Any] = {"data": "d", "teacher": "t", "student": "s", "out": "o", "steps": 3}


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.__name__)
def test_every_option_has_help_group_and_bounds_that_fit_its_type(table):
    for name, field in table.model_fields.items():
        opt = table.opt(name)
        assert (text := table.description(name)), f"{name} has no help"
        assert text[0].isupper() or " " in text, name
        assert opt.changes, f"{name} changes nothing"
        assert isinstance(opt.group, Group)
        if field.default in (None, (), "") and not field.is_required():
            assert opt.usual is not None, f"{table.__name__}.{name}: `usual` must describe the default in words"
        if bounds := [each for each in (opt.at_least, opt.at_most, opt.above, opt.below) if each is not None]:
            assert {int, float} & set(_types(field.annotation)), f"{name} is not a number, yet has bounds {bounds}"
        assert not (opt.at_least is not None and opt.above is not None)
        assert not (opt.at_most is not None and opt.below is not None)


def _types(annotation: Any) -> list[Any]:
    inner = [each for each in get_args(annotation) if each is not ...]
    return [found for each in inner for found in _types(each)] if inner else [annotation]


def test_misspelt_option_name_in_the_code_raises_at_once():
    """A list of names kept apart from the options would silently ignore a misspelt one."""
    with pytest.raises(TypeError, match="replaces 'epoch', which is not an option"):

        class _Misspelt(Train):
            steps: Annotated[int | None, like(Train, "steps", replaces=("epoch",))] = None
            """Length."""

    with pytest.raises(TypeError, match=r"_Silent.warmth has no Opt"):

        class _Silent(Options):
            warmth: float = 1.0
            """Warmth."""

    for call in (
        lambda: like(Train, "temprature"),
        lambda: Train.opt("temprature"),
        lambda: Train.checked(**_train()).moved("temprature"),
        lambda: Train.checked(**_train()).value_problems("temprature"),
    ):
        with pytest.raises((KeyError, AttributeError), match="temprature"):
            call()
    with pytest.raises(TypeError, match="at_leest"):
        Opt(group=Group.LOOP, changes=Changes.STUDENT, at_leest=1)  # pyrefly: ignore[unexpected-keyword]


def _train() -> dict[str, Any]:
    return {name: value for name, value in BASE.items() if name != "teacher"}


def test_bounds_apply_to_an_option_under_another_name():
    """A bound belongs to its option, so the option is checked under any name."""

    class Renamed(Options):
        speed: Annotated[float, like(Train, "lr")] = 1.0
        """Speed."""

    with pytest.raises(InputError, match="speed must be above 0, got -1"):
        Renamed.checked(speed=-1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr must be above 0, got 0.0"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"batch": 10**7}, "batch must be at most 1,000,000, got 10000000"),
        ({"epochs": 0.0, "steps": None}, "epochs must be above 0, got 0.0"),
        ({"crop_min_area": 0.0}, r"crop_min_area must lie in \(0, 1\], got 0.0"),
        ({"crop_min_area": 1.5}, r"crop_min_area must lie in \(0, 1\], got 1.5"),
        ({"weight_decay": 1.0}, r"weight_decay must lie in \[0, 1\), got 1.0"),
        ({"ema": -0.1}, r"ema must lie in \[0, 1\), got -0.1"),
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\), got 1.0"),
        ({"label_weight": -0.5}, r"label_weight must lie in \[0, 1\], got -0.5"),
        ({"teacher_side": (224, 0)}, "teacher_side must be at least 1, got 0"),
        ({"teacher_share": (0.5, -1.0), "teacher": ("a", "b")}, "teacher_share must be above 0, got -1.0"),
        ({"decay_factors": (-0.1,), "decay_steps": (3,), "schedule": "staircase"}, "decay_factors must be at least 0"),
        ({"teacher": ""}, "teacher is empty"),
        ({"student": ""}, "student is empty"),
        ({"classes": ""}, "classes is empty"),
        ({"lr": float("nan")}, "lr must be a finite number, got nan"),
    ],
)
def test_values_beyond_the_bounds_are_rejected(options, message):
    with pytest.raises(InputError, match=message):
        Distill.checked(**BASE | options)


@pytest.mark.parametrize("table", [each for each in TABLES if each not in (Machine,)], ids=lambda table: table.__name__)
def test_every_bound_is_enforced(table):
    """For every option with bounds, a value beyond them is a problem and a value at them is not."""
    for name, opt in table.opts():
        kind = table.model_fields[name].annotation
        is_integer = float not in _types(kind)
        wrap = (lambda value: (value,)) if get_origin(kind) is tuple else (lambda value: value)
        step = 1 if is_integer else 1e-3
        options = table.model_construct()
        for bad, good in (
            (None if opt.at_least is None else opt.at_least - step, opt.at_least),
            (None if opt.at_most is None else opt.at_most + step, opt.at_most),
            (opt.above, None if opt.above is None else opt.above + step),
            (opt.below, None if opt.below is None else opt.below - step),
        ):
            if bad is not None:
                assert options.model_copy(update={name: wrap(bad)}).value_problems(name), (name, bad)
                assert not options.model_copy(update={name: wrap(good)}).value_problems(name), (name, good)


def test_several_problems_are_listed_one_per_line():
    assert listed(["a is b"]) == "a is b"
    assert listed(["a is b", "c is d"]) == "2 problems:\n  a is b\n  c is d"


def test_options_by_what_they_change():
    own = {*Distill.model_fields} - options_changing(Distill, Changes.VIEWS | Changes.TEACHER | Changes.DATA)
    assert {"lr", "steps", "optimizer", "distance", "out", "precision"} <= own
    assert not own & {"seed", "batch", "side", "crop", "teacher", "data", "val", "cap", "decoder", "student", "compile"}
    uncompared = Distill.where(lambda opt: not opt.is_compared)
    assert {"out", "epochs", "data", "workers", "log_every", "eval_every", "save_every", "tape"} <= uncompared
    assert not uncompared & {"lr", "steps", "seed", "threads", "teacher", "val", "compile"}
    searchable = Distill.where(lambda opt: opt.is_searchable)
    assert {"lr", "steps", "epochs", "temperature", "side", "student", "drop_rate", "batch"} <= searchable
    assert not searchable & {
        "seed",
        "out",
        "val",
        "device",
        "precision",
        "eval_every",
        "teacher_batch",
        "trust_class_order",
    }
    assert Train.where(lambda opt: opt.extends) == {"steps", "cooldown_steps"}
    assert Train.where(lambda opt: not opt.study) == {
        "out", "seed", "as_json", "config", "dry_run", "time_limit", "save_signals", "hang_timeout",
    }  # fmt: skip


def test_recipe_settings_that_an_option_replaces():
    assert replaced_by(Distill, ["steps", "crop"]) == {"epochs", "resize"}
    assert replaced_by(Finetune, ["student"]) == {"student_weights", "student_kwargs"}
    assert replaced_by(Train, ["lr", "nothing"]) == frozenset()
    assert alternatives(Train, "steps") == {"epochs"}
    assert alternatives(Train, "epochs") == {"steps"}
    assert alternatives(Train, "decay_steps") == frozenset()


def test_aliases_lead_to_one_option():
    assert Finetune.field_of("--model") == Finetune.field_of("student") == Train.field_of("model") == "student"
    assert Train.field_of("--batch-size") == Train.field_of("-b") == Train.field_of("batch_size") == "batch"
    assert Train.field_of("--json") == "as_json"
    assert Train.field_of("colour") is None
    assert Train.checked(**_train(), batch_size=7, img_size=64).batch == 7
    with pytest.raises(InputError, match="batch is set twice, once as batch_size"):
        Train.checked(**_train(), batch=3, batch_size=7)
    for table in TABLES:
        flags = [word for name, opt in table.opts() for word in (opt.flag or name, *opt.aliases)]
        assert len(flags) == len(set(flags)), table


def test_an_option_is_the_same_in_every_table():
    """The same option has the same group and bounds in every table; only defaults differ."""
    for tables in (TAUGHT, SEARCHED):
        for table in tables.values():
            for name, opt in table.opts():
                if name in Train.model_fields and name != "as_json":
                    ours = Train.opt(name)
                    same = (opt.group, opt.changes, opt.at_least, opt.at_most, opt.above, opt.below, opt.replaces)
                    assert same == (
                        ours.group, ours.changes, ours.at_least, ours.at_most, ours.above, ours.below, ours.replaces
                    ), (table, name)  # fmt: skip


def test_no_list_of_option_names_outside_config():
    """What an option may do is declared with the option; a list elsewhere would go stale when one is added."""
    names = {name for table in TABLES for name in table.model_fields}
    for path in PACKAGE.rglob("*.py"):
        if path.is_relative_to(PACKAGE / "config"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            parts = node.elts if isinstance(node, ast.Set | ast.Tuple | ast.List) else []
            values = [part.value for part in parts if isinstance(part, ast.Constant)]
            if len(values) >= 4 and len(values) == len(parts) and set(values) <= names:
                pytest.fail(
                    f"{path.relative_to(PACKAGE)}:{node.lineno} lists options: {values}; ask `where(…)` instead"
                )


def test_config_imports_no_heavy_library():
    # A fresh interpreter, because this one has loaded these libraries for other tests.
    code = "import sys, funmatch.config; print(*sorted(sys.modules))"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert not loaded & {"torch", "timm", "tyro", "numpy", "rich"}


def test_old_names_stay_importable():
    assert config.Pictures is config.Images
    assert vars(config).keys() >= {
        "Machine", "Images", "Train", "Finetune", "Teaching", "Distill", "Evaluate", "Named", "Prepare", "Data",
        "Report", "Demo", "Study", "Plan", "Tape", "Import", "Models", "Recipes", "Search", "SearchTrain",
        "SearchFinetune", "SearchDistill", "TAUGHT", "SEARCHED", "UNCOMPARED", "Words", "Precision",
    }  # fmt: skip
    assert set(Evaluate.where(lambda opt: opt.changes == Changes.TEACHER)) >= {"teacher", "combine", "classes"}
