"""Help texts list every option by group, within the terminal's width and without the parser's markup."""

import re
import shlex

import pytest

from funmatch.cli import parse
from funmatch.commands.verbs import TABLES
from funmatch.config import SEARCHED, Distill, Evaluate, Finetune, Report, help
from funmatch.config.help import default_of, help_of, label, metavar, overview

ALL = {**TABLES, **{f"tune {verb}": table for verb, table in SEARCHED.items()}}


@pytest.fixture(params=[80, 120], name="columns")
def terminal_width(request, monkeypatch) -> int:
    monkeypatch.setenv("COLUMNS", str(request.param))
    return request.param


@pytest.mark.parametrize("verb", ALL)
def test_help_all_lists_every_option_within_the_terminal_width(verb, columns):
    table = ALL[verb]
    text = help_of(verb, table, everything=True)
    for name in table.model_fields:
        assert re.search(rf"^  {re.escape(label(table, name))}( |$)", text, re.M), name
        description = table.description(name)
        assert description in " ".join(text.split()), name
    long = [line for line in text.splitlines() if len(line) > columns]
    assert not [line for line in long if len(line.split()) > 1 and not line.startswith("  --")], long
    for sign in ("{None}", "STR", "INT", "FLOAT", "None}", "default: )", "\x1b", "╭"):
        assert sign not in text, sign


def test_help_shows_the_most_important_options_first(columns):
    text = help_of("distill", Distill, usage="distill [RECIPE]")
    usage = " ".join(text.partition("\n\n")[0].split())
    assert usage.startswith("Usage: funmatch distill [RECIPE] --data DATA …")
    for needed in ("--student MODEL", "--teacher MODEL …", "--out FOLDER"):
        assert needed in usage
    last = " ".join(text.split("\n\n")[-1].split())
    assert f"`funmatch distill --help-all` shows all {len(Distill.model_fields)} options, by group: Data," in last
    assert all(heading in last for heading, _ in help.grouped(Distill))
    first = re.findall(r"^  (-[^ ]*(?:, -[^ ]*)*)", text, re.M)
    assert 8 <= len(first) <= 13, first
    assert [each.split(",")[0] for each in first[:4]] == ["--data", "--student", "--teacher", "--out"]
    assert {"--lr", "--steps", "--epochs", "--val"} <= {word for each in first for word in each.split(", ")}
    assert "Examples:\n  funmatch distill --data" in text
    assert len(text.splitlines()) <= (70 if columns == 80 else 50)


@pytest.mark.usefixtures("columns")
def test_groups_are_in_order():
    text = help_of("distill", Distill, everything=True)
    order = ["Data", "Student", "Teacher", "Views", "Optimizer", "Loop", "Machine", "Output"]
    places = [text.index(f"\n{group}:\n") for group in order]
    assert places == sorted(places)
    assert "\nModel:\n" in help_of("finetune", Finetune, everything=True)
    assert "--model MODEL" in help_of("finetune", Finetune)
    assert "\nSearch:\n" in help_of("tune train", SEARCHED["train"], everything=True)
    assert "--help-all" not in help_of("report", Report), "--help already lists every option of a small command"


@pytest.mark.parametrize(
    ("table", "name", "shown", "default"),
    [
        (Distill, "lr", "--lr X", "default: 0.003"),
        (Distill, "batch", "-b, --batch, --batch-size N", "default: 128"),
        (Distill, "precision", "--precision auto|fp32|bf16|fp16", "default: auto"),
        (Distill, "mixup_max", "--mixup-max, --no-mixup-max", "default: on"),
        (Distill, "standardise", "--standardise", None),
        (Distill, "as_json", "--json", None),
        (Distill, "teacher", "--teacher MODEL …", "required"),
        (Distill, "teacher_side", "--teacher-side N …", "default: the student's"),
        (Distill, "out", "--out FOLDER", "required"),
        (Distill, "warmup_steps", "--warmup-steps N", "default: 1,500, but at most 1/10 of the run"),
        (Distill, "weight_decay", "--weight-decay X", "default: 0.0001"),
        (Finetune, "batch", "-b, --batch, --batch-size N", "default: 512"),
        (Evaluate, "model", "MODEL", "required"),
    ],
)
def test_flags_and_defaults(table, name, shown, default):
    assert label(table, name) == shown
    assert default_of(table, name) == default


@pytest.mark.parametrize("verb", ALL)
def test_every_option_shows_a_default_or_is_a_switch(verb):
    table = ALL[verb]
    for name, field in table.model_fields.items():
        default = default_of(table, name)
        assert default is None or (default not in ("default: None", "default: ", "default: ()")), name
        assert default or field.annotation is bool, name
        assert metavar(table, name) or field.annotation is bool, name


def test_overview_groups_the_commands(columns):
    text = overview(TABLES)
    assert [line[:-1] for line in text.splitlines() if re.fullmatch(r"\w+:", line)] == [
        "Start", "Use", "Data", "Models", "Science",
    ]  # fmt: skip
    start = text.partition("Start:")[2].partition("\n\n")[0]
    assert re.findall(r"^  (\w+)", start, re.M) == ["demo", "finetune", "distill", "train", "evaluate", "config"]
    assert all(re.search(rf"^  {verb} ", text, re.M) for verb in TABLES)
    assert max(map(len, text.splitlines())) <= columns


def test_examples_are_valid_commands():
    """Every example can be parsed, with its paths as they are."""
    for table in {*ALL.values()}:
        for example in table.examples:
            argv = shlex.split(example)
            assert argv[0] == "funmatch"
            assert parse(argv[1:]) is not None, example


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--help"], "Start:"),
        (["help"], "Start:"),
        ([], "Start:"),
        (["help", "distill"], "`funmatch distill --help-all` shows all"),
        (["distill", "-h"], "Options that matter most:"),
        (["distill", "pet37-fast", "--lr", "3", "--help-all"], "--weight-decay X"),
        (["tune", "--help"], "`funmatch tune distill --help-all` shows all"),
        (["tune", "finetune", "--help"], "--space OPTION=VALUES …"),
        (["plan", "finetune", "--help"], "--model MODEL"),
        (["recipes", "--help"], "funmatch recipes pet37-fast"),
    ],
)
def test_help_can_be_called_in_several_ways(capsys, argv, expected):
    with pytest.raises(SystemExit) as end:
        parse(argv)
    assert end.value.code == 0
    assert expected in capsys.readouterr().out


def test_colour_only_on_a_terminal(monkeypatch):
    assert "\x1b" not in help_of("report", Report)
    monkeypatch.setattr(help.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = help_of("report", Report)
    assert "\x1b[1m" in coloured
    assert re.sub(r"\x1b\[\d*m", "", coloured) == _plain(monkeypatch)


def _plain(monkeypatch) -> str:
    monkeypatch.setenv("NO_COLOR", "1")
    plain = help_of("report", Report)
    assert "\x1b" not in plain
    return plain


def test_defaults_in_words_match_the_code():
    """Where a rule sets a default, the help describes it in words, which must stay in step with the code."""
    from funmatch.config.optim import FINETUNE_LR, LR
    from funmatch.ops.optim import hyperrule
    from funmatch.ops.optim.factory import resolve_momentum
    from funmatch.ops.optim.schedules import cooldown_length
    from funmatch.runtime.devices import spare_threads
    from funmatch.training.defaults import PIXEL_SHARE

    def usual_words(table, name) -> str:
        return str(table.opt(name).usual)

    assert (
        usual_words(Distill, "momentum")
        == f"{resolve_momentum('adamw', None)}; for muon {resolve_momentum('muon', None)}"
    )
    assert usual_words(Distill, "lr") == f"{LR:g}"
    assert usual_words(Distill, "cooldown_steps") == "a fifth of the run"
    assert cooldown_length(1000, None) == 1000 // 5
    assert usual_words(Distill, "device_gb") == "a quarter of its memory"
    assert PIXEL_SHARE == 1 / 4
    assert "at most 8" in usual_words(Distill, "workers")
    assert 1 <= spare_threads() <= 8
    lengths = [f"{hyperrule.steps(images):,}" for images in (100, 100_000, 1_000_000)]
    assert usual_words(Finetune, "steps").startswith("{}, {} or {}".format(*lengths))
    assert usual_words(Finetune, "lr") == f"{hyperrule.lr(512)} × batch / 512 for sgd, {FINETUNE_LR:g} for others"
    assert usual_words(Finetune, "mixup") == f"{hyperrule.mixup(20_000)} from 20,000 training images on, else 0"
    assert usual_words(Finetune, "side") == (
        f"{hyperrule.sides(95 * 96)[1]} for images of fewer than 96 × 96 pixels, else {hyperrule.sides(96 * 96)[1]}"
    )
    assert usual_words(Finetune, "resize").startswith(
        f"{hyperrule.sides(1)[0]} for --side {hyperrule.sides(1)[1]}, 512 for"
    )
    assert usual_words(Finetune, "warmup_steps") == (
        f"{hyperrule.warmup_steps(100)} for fewer than 20,000 training images, else {hyperrule.warmup_steps(20_000)}"
    )
