"""Config files: precedence of values, a run's own config.json, templates, and invalid files."""

import json
import re
import shutil
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from make_images import FEW

import funmatch as package
from funmatch.cli import main, read_command
from funmatch.commands.verbs import VERBS
from funmatch.config import SEARCHED, Distill
from funmatch.config.options import Options
from funmatch.config.sources.template import template
from funmatch.errors import InputError

OLD_RUN = Path(__file__).parent / "fixtures" / "old_run"
MINI = """\
data = "fashion-mini"
teacher = ["fashion-mini-teacher"]
student = "fashion-mini-student"
batch-size = 16
steps = 3
"""
TABLES = {name: verb.table for name, verb in VERBS.items() if not verb.subjects}
TABLES |= {f"tune {name}": table for name, table in SEARCHED.items()}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text(MINI)
    return tmp_path


@pytest.fixture
def funmatch(capsys):
    """Runs `funmatch …` in this process."""

    def run(*line: str, check: int = 0) -> SimpleNamespace:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(list(line))
        out, err = capsys.readouterr()
        assert end.value.code == check, err
        return SimpleNamespace(stdout=out, stderr=err)

    return run


def read(line: str) -> tuple[Options, dict[str, str]]:
    command = read_command(line.split())
    return command.options, {name: source for name, source in command.sources.items() if source != "default"}


def test_command_line_overrides_the_file():
    options, sources = read("distill --config run.toml --out o --lr 1e-3 -b 8")
    assert isinstance(options, Distill)
    assert (options.data, options.teacher) == (("fashion-mini",), ("fashion-mini-teacher",))
    assert (options.batch, options.steps, options.lr, options.out) == (8, 3, 1e-3, Path("o"))
    assert sources["batch"] == sources["lr"] == "command line"
    assert sources["steps"] == sources["data"] == "run.toml"
    assert "temperature" not in sources


def test_option_drops_the_alternative_set_in_the_file():
    options, sources = read("distill --config run.toml --out o --epochs 2")
    assert (options.steps, options.epochs) == (None, 2.0)
    assert "steps" not in sources


def test_file_overrides_the_recipe():
    Path("r.toml").write_text('recipe = "pet37-fast"\nlr = 1e-4\nsteps = 5\n')
    options, sources = read("distill --config r.toml --temperature 3")
    assert (options.recipe, options.lr, options.steps, options.epochs) == ("pet37-fast", 1e-4, 5, None)
    assert (options.batch, options.temperature, options.out) == (512, 3.0, Path("runs/pet37-fast"))
    assert sources["lr"] == "r.toml"
    assert sources["batch"] == "recipe pet37-fast"
    assert sources["temperature"] == "command line"
    again, _ = read("distill pet37-fast --config r.toml --temperature 3")
    assert again == options
    assert read("distill pet37-fast --config run.toml --out o")[0].student == "fashion-mini-student"
    # A search beside the run, not in its folder; a plan is that of the run itself.
    assert read("tune distill --config r.toml --space lr=1,2")[0].out == Path("runs/tune-pet37-fast")
    assert read("plan pet37-fast")[0].out == Path("runs/pet37-fast")


def test_all_types_of_values_are_read(tmp_path):
    (tmp_path / "a.toml").write_text(
        MINI
        + "\nout = 'o'\nval = 0.1\nclip_norm = 'none'\nteacher_side = 48\nrandaugment = [2, 9]\nunlabelled = true\n"
        "optimizer_kwargs = ['eps=1e-6']\ndecay_steps = []\nmomentum = 0\n[student-kwargs]\nchannels = [8, 16]\n"
    )
    options, _ = read("distill --config a.toml")
    assert (options.val, options.clip_norm, options.teacher_side) == ("0.1", None, (48,))
    assert (options.randaugment, options.unlabelled, options.momentum) == ((2, 9), True, 0.0)
    assert options.student_kwargs == ("channels=[8, 16]",)
    assert options == Distill.checked(**options.model_dump() | {"config": "a.toml"}), (
        "equal to the table built from Python"
    )
    assert read("distill --config a.toml --no-unlabelled")[0].unlabelled is False


def test_every_command_reads_files():
    Path("e.toml").write_text('model = "fashion-mini-teacher"\ndata = "fashion-mini"\n')
    assert read("evaluate --config e.toml")[0].model == "fashion-mini-teacher"
    assert read("evaluate other --config e.toml")[0].model == "other"
    Path("p.toml").write_text('data = ["pet37"]\nto = "tfrecord"\nout = "shards"\nside = 64\n')
    assert read("prepare --config p.toml")[0].side == 64
    assert read("plan distill --config run.toml --out o")[0].steps == 3
    Path("t.toml").write_text(MINI + 'space = ["lr=1e-3,1e-2"]\ntrials = 2\nout = "t"\n')
    assert read("tune distill --config t.toml --trials 3")[0].trials == 3


def test_yaml_values_are_read():
    Path("y.yaml").write_text(
        "data: fashion-mini\nteacher: [fashion-mini-teacher]\nstudent: s\nout: o\nsteps: 3\n"
        "lr: 3e-4\nmixup_max: no\nclip_norm: null\n"
    )
    options, sources = read("distill --config y.yaml")
    assert (options.lr, options.mixup_max, options.clip_norm) == (3e-4, False, None)
    assert sources["lr"] == "y.yaml"


def test_config_json_of_a_run_gives_its_options():
    line = f"distill --config {OLD_RUN / 'config.json'} --out again"
    options, sources = read(line)
    record = json.loads((OLD_RUN / "config.json").read_text())
    current = options.model_dump(mode="json")
    differing = {name for name, value in record["knobs"].items() if current.get(name) != value}
    assert differing <= {"out", "as_json"}
    assert options.out == Path("again")
    assert sources["lr"] == str(OLD_RUN / "config.json")
    with pytest.raises(InputError, match="distill needs --out"):  # the folder of the run is not reused
        read(f"distill --config {OLD_RUN / 'config.json'}")


@pytest.mark.parametrize("verb", TABLES)
def test_templates_are_complete_and_valid(verb, folder):
    table = TABLES[verb]
    text = template(verb, table)
    for name in table.model_fields:
        if name not in ("config", "dry_run"):
            assert re.search(rf"^#? ?{name} = ", text, re.M), name
    assert all(len(line) <= 100 for line in text.splitlines() if line.startswith("# "))
    bare = tomllib.loads(text)
    assert bare.keys() == {name for name, field in table.model_fields.items() if field.is_required()}
    complete = re.sub(r"^#(?=\w)", "", text, flags=re.M)
    (folder / "whole.toml").write_text(complete)
    (folder / "bare.toml").write_text(text)
    command = f"{verb} --config whole.toml"
    if verb.startswith("tune"):
        command += " --space lr=1,2"
    options, sources = read(command)
    again, _ = read(command.replace("whole", "bare"))
    assert options.model_dump() == again.model_dump()
    assert len([name for name, source in sources.items() if source == "whole.toml"]) == len(tomllib.loads(complete))


def test_config_command_prints_templates(funmatch):
    text = funmatch("config", "finetune").stdout
    assert tomllib.loads(text).keys() == {"data", "student", "out"}
    assert json.loads(funmatch("config", "--json").stdout)["command"] == "distill"
    assert "#trials" not in funmatch("config", "tune", "train").stdout
    assert "# trials = …" in funmatch("config", "tune", "train").stdout
    assert "did you mean 'finetune'" in funmatch("config", "finetun", check=2).stderr
    assert "funmatch config tune distill" in funmatch("config", "tune", check=2).stderr


WRONG = {
    "missing": ("none.toml", None, ["no file none.toml"]),
    "folder": (".", None, ["is a folder"]),
    "suffix": ("run.ini", "", ["not a .toml, .yaml, .yml or .json"]),
    "not TOML": ("a.toml", "lr = 1\nsteps = = 1\n", ["not valid TOML", "line 2, column 9"]),
    "not text": ("a.toml", b"\xff\xfe", ["not text in UTF-8"]),
    "unknown": ("a.toml", "steps = 1\n\nstepz = 3\n", ["line 3", "unknown option 'stepz'", "'steps'"]),
    "text for a number": ("a.toml", 'lr = "0.1"\n', ["line 1", "lr", "wanted a number", "'0.1' (a string)"]),
    "fraction": ("a.toml", "steps = 1.5\n", ["steps: wanted a whole number, got 1.5"]),
    "truth": ("a.toml", "lr = true\n", ["lr: wanted a number, got True"]),
    "number": ("a.toml", "unlabelled = 1\n", ["unlabelled: wanted true or false, got 1"]),
    "list": ("a.toml", "lr = [1, 2]\n", ["lr: wanted a number, got [1, 2]"]),
    "pair": ("a.toml", "randaugment = [1, 2, 3]\n", ["randaugment: wanted 2 whole numbers"]),
    "no pair": ("a.yaml", "crop_ratio:\n", ["line 1", "crop_ratio: wanted 2 numbers, got None"]),
    "no pair of a run": (
        "a.json",
        json.dumps({"verb": "distill", "knobs": {"crop_ratio": None}, "facts": {}}),
        ["crop_ratio: wanted 2 numbers, got None"],
    ),
    "choice": ("a.toml", "precision = 'fp8'\n", ["wanted one of auto, fp32, bf16, fp16, got 'fp8'"]),
    "date": ("a.toml", "student = 2024-01-01\n", ["student: wanted a string"]),
    "bound": ("a.toml", "\nepochs = -1\n", ["line 2", "epochs must be above 0, got -1"]),
    "section": ("a.toml", "[tool]\nlr = 1\n", ["line 1", "tool is a section"]),
    "section of an option": ("a.toml", "[lr]\nx = 1\n", ["lr is a section"]),
    "twice": ("a.toml", "batch = 1\nbatch-size = 2\n", ["line 2", "batch is set twice"]),
    "config": ("a.toml", "config = 'b.toml'\n", ["cannot name another"]),
    "all at once": ("a.toml", "stepz = 1\nlr = 'x'\nepochs = -1\n", ["3 problems", "line 1", "line 2", "line 3"]),
    "unknown recipe": ("a.toml", "recipe = 'pet37-fats'\n", ["unknown recipe", "'pet37-fast'"]),
    "not YAML": ("a.yaml", "lr: [1\nsteps: 2\n", ["not valid YAML", "line 2"]),
    "a list of YAML": ("a.yml", "- 1\n", ["not valid YAML", "options by their names"]),
    "YAML twice": ("a.yaml", "lr: 1\nlr: 2\n", ["line 1 and again on line 2"]),
    "YAML objects": ("a.yaml", "lr: !!python/object/apply:os.getcwd []\n", ["not valid YAML"]),
    "not JSON": ("a.json", "{", ["not valid JSON"]),
    "JSON deep": ("a.json", "[" * 9999, ["not valid JSON"]),
    "JSON list": ("a.json", "[]", ["options by their names"]),
    "JSON of options": ("a.json", '{"stepz": 1}', ["unknown option 'stepz'"]),
    "another verb": (
        "a.json",
        json.dumps({"verb": "train", "knobs": {}, "facts": {}}),
        ["of a run of train", "funmatch train --config"],
    ),
    "newer": (
        "a.json",
        json.dumps({"format": 99, "verb": "distill", "knobs": {}, "facts": {}}),
        ["newer funmatch", "format 99", "another --config"],
    ),
    "damaged": ("a.json", json.dumps({"verb": "distill", "knobs": []}), ["a.json is damaged"]),
    "run with a wrong value": (
        "a.json",
        json.dumps({"verb": "distill", "knobs": {"lr": "x"}, "facts": {}}),
        ["lr: wanted a number"],
    ),
}


@pytest.mark.parametrize(("name", "text", "messages"), WRONG.values(), ids=WRONG.keys())
def test_invalid_files_get_one_message_and_leave_nothing(name, text, messages, folder, funmatch):
    if isinstance(text, bytes):
        (folder / name).write_bytes(text)
    elif text is not None:
        (folder / name).write_text(text)
    before = sorted(folder.rglob("*"))
    result = funmatch("distill", "--config", name, "--out", "o", check=2)
    assert result.stderr.startswith("funmatch: ")
    assert not result.stdout
    for message in messages:
        assert message in result.stderr
    assert sorted(folder.rglob("*")) == before


def test_conflicting_recipes_are_rejected():
    Path("r.toml").write_text('recipe = "pet37-fast"\n')
    with pytest.raises(InputError, match=r"r\.toml follows the recipe pet37-fast, but pet37-300 is given"):
        read("distill pet37-300 --config r.toml")
    with pytest.raises(InputError, match=r"r\.toml follows the recipe pet37-fast, but pet37-300 is given"):
        read("distill --recipe pet37-300 --config r.toml")


def test_config_files_from_python(folder):
    dry_run = package.distill(config="run.toml", out="o", batch_size=8, dry_run=True)
    options = dry_run.metrics["options"]
    assert (options["steps"], options["batch"]) == (
        {"value": 3, "source": "run.toml"},
        {"value": 8, "source": "Python"},
    )
    assert not (folder / "o").exists()
    with pytest.raises(InputError, match=r"no file none\.toml"):
        package.train(config="none.toml")
    with pytest.raises(InputError, match="out is missing"):
        package.distill(config="run.toml")


def test_dry_run_reports_the_run_and_writes_nothing(funmatch, folder):
    line = ("distill", "--config", "run.toml", "--out", "o", "--epochs", "2", "--dry-run")
    before = sorted(folder.rglob("*"))
    metrics = json.loads(funmatch(*line, "--json").stdout)
    assert metrics["splits"] == {"train": 200, "val": 500, "test": 2000}
    assert metrics["classes"] == 10
    assert metrics["parameters"] == {"student": 26_888, "teachers": [109_766]}
    assert (metrics["steps"], metrics["epochs"]) == (25, 2.0)
    assert metrics["options"]["epochs"] == {"value": 2.0, "source": "command line"}
    assert metrics["options"]["lr"] == {"value": 0.003, "source": "default"}
    assert metrics["options"]["student"] == {"value": "fashion-mini-student", "source": "run.toml"}
    assert Distill.model_fields.keys() - metrics["options"].keys() == {"config", "dry_run"}
    output = funmatch(*line).stdout
    for part in ("student 26,888, teacher 109,766", "200 train", "25 steps, 2 epochs", "run.toml", "temperature"):
        assert part in output
    labels = json.loads(funmatch("train", "--data", "fashion-mini", "--student", "fashion-mini-student",
                                 "--steps", "4", "--out", "o", "--dry-run", "--json").stdout)  # fmt: skip
    assert labels["parameters"]["teachers"] == []
    assert sorted(folder.rglob("*")) == before
    rejected = funmatch(*line, "--tape-top", "3", check=2)
    assert "tape_top belongs to --tape" in rejected.stderr


def test_run_repeated_from_its_config_json_gives_equal_weights(funmatch, folder):
    """config.json of a run repeats it in another folder with equal weights."""
    funmatch("distill", "--config", "run.toml", "--data", FEW, "--out", "first", "--threads", "1")
    funmatch("distill", "--config", "first/config.json", "--out", "again")
    first, second = (Path(name, "student", "model.safetensors").read_bytes() for name in ("first", "again"))
    assert first == second
    record = json.loads((folder / "first" / "config.json").read_text())
    assert not {"config", "dry_run"} & record["knobs"].keys()
    shutil.rmtree(folder / "again")
