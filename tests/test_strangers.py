"""What a file holds is data: no command calls a function, or leaves the folder, because a file says so."""

import json
import shutil

import pytest
from make_images import FEW, paint

import funmatch
from funmatch import errors
from funmatch.cli import main
from funmatch.commands.tape import run as inspect_tape
from funmatch.config import Distill, Tape
from funmatch.data.cache import open_cache
from funmatch.errors import InputError
from funmatch.runtime import functions, log
from funmatch.runtime.disk.json_files import seal

TEACHER, STUDENT = "fashion-mini-teacher", "fashion-mini-student"
COMMAND = "subprocess:getoutput"


@pytest.fixture(autouse=True)
def nothing_allowed(monkeypatch):
    monkeypatch.setenv(functions.ALLOWED, "")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own") / "run"
    return funmatch.distill(FEW, TEACHER, STUDENT, folder, steps=2, batch=8, tape=folder.parent / "tape")


@pytest.fixture
def stranger(run, tmp_path, monkeypatch):
    """A run whose record names a shell command as its teacher."""
    folder = tmp_path / "stranger"
    shutil.copytree(run.folder, folder)
    poison(folder / "config.json", "knobs", tmp_path / "MARK")
    monkeypatch.chdir(tmp_path)
    return folder


def poison(path, key, mark):
    record = json.loads(path.read_text())
    record[key] |= {"teacher": [COMMAND], "teacher_kwargs": [f"cmd=id > {mark}"]}
    path.write_text(json.dumps(seal(record)))


def call(*words):
    """Runs a command line in this process; returns its exit code."""
    with pytest.raises(SystemExit) as ended:
        main([*map(str, words)])
    return ended.value.code


@pytest.mark.parametrize(
    "words",
    [
        ("evaluate", "stranger"), ("evaluate", "stranger", "--json"), ("evaluate", "local-dir:stranger/student"),
        ("report", "stranger"), ("predict", "stranger", "--teacher", "fashion-mini"),
        ("embed", "stranger", "fashion-mini"),
        pytest.param(("benchmark", "stranger", "--formats", "eager"), marks=pytest.mark.slow),
        ("distill", "stranger", "--quantize", "8", "--out", "new"),
        ("finetune", "--data", "FEW", "--model", "stranger", "--steps", "1", "--batch", "8", "--out", "tuned"),
    ],
    ids=" ".join,
)  # fmt: skip
@pytest.mark.usefixtures("stranger")
def test_no_command_calls_the_function_that_a_run_names(tmp_path, words):
    words = (FEW if word == "FEW" else word for word in words)  # whose path is another in each process
    assert call(*words) in (0, 1, 2)
    assert not (tmp_path / "MARK").exists()


def test_evaluate_names_the_function_and_how_to_allow_it(stranger, capsys):
    assert call("evaluate", stranger) == 0
    said = capsys.readouterr().err
    assert f"{COMMAND} is a function that a file names, and a file must not decide which code runs" in said
    assert f"{functions.ALLOWED}={COMMAND}" in said


def test_a_tape_calls_nothing(run, tmp_path):
    shutil.copytree(run.folder.parent / "tape", tmp_path / "tape")
    poison(tmp_path / "tape" / "tape.json", "run", tmp_path / "MARK")
    with pytest.raises(InputError, match="a file must not decide which code runs"):
        inspect_tape(Tape.checked(folder=tmp_path / "tape", recompute=1))
    assert not (tmp_path / "MARK").exists()


@pytest.mark.parametrize("name", ["teacher", "student", "distance", "optimizer", "augment"])
def test_a_study_and_a_file_of_options_call_nothing(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    options = {"data": "fashion-mini", "teacher": TEACHER, "student": STUDENT, "steps": 1, "lr": 0.1} | {
        name: "evil_module:f"
    }
    (tmp_path / "evil_module.py").write_text("open('MARK', 'w').close()")
    lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in options.items())
    (tmp_path / "study.toml").write_text(f'title = "t"\n[common]\n{lines}[[run]]\nname = "one"\n')
    (tmp_path / "options.toml").write_text(lines)
    for words in (("study", "study.toml", "--out", "s"), ("distill", "--config", "options.toml", "--out", "r")):
        assert call(*words) == 2
        assert "evil_module:f is a function that a file names" in capsys.readouterr().err
    assert not (tmp_path / "MARK").exists()


def test_functions_that_a_person_names_are_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kind_module.py").write_text("def f(student, teacher):\n    return (student - teacher).abs().sum(-1)\n")
    with pytest.raises(InputError, match="a file must not decide"):
        functions.find_function("kind_module:f", "distance")
    functions.allow_words(["distill", "--distance=kind_module:f"])
    assert functions.find_function("kind_module:f", "distance").__name__ == "f"
    # The words of a command line that another process wrote from a file allow nothing.
    monkeypatch.setenv(functions.ONLY_ALLOWED, "1")
    functions.allow_words(["--teacher", "other:g"])
    with pytest.raises(InputError, match="a file must not decide"):
        functions.check_allowed("other:g", "teacher")
    assert Distill.checked(data="d", teacher="other:g", student="s", out="o", steps=1).teacher == ("other:g",)


def test_a_report_opens_no_data_that_was_not_opened_before(stranger, images, cache_home, monkeypatch):
    record = json.loads((stranger / "config.json").read_text())
    record["knobs"] |= {"teacher": [TEACHER], "teacher_kwargs": []}
    (stranger / "config.json").write_text(json.dumps(seal(record)))
    assert call("report", stranger, "--view-step", "0") == 0, "which opens the data"

    def opened(*_):
        raise AssertionError("a report must not open what a record names")

    monkeypatch.setattr(open_cache, "open_dataset", opened)
    before = sorted(cache_home.rglob("*"))
    for data in (str(images), "hf:some/name"):
        record["knobs"]["data"] = [data]
        (stranger / "config.json").write_text(json.dumps(seal(record)))
        assert call("report", stranger) == 0
        assert "data:image/png" not in (stranger / "report.html").read_text()
    assert sorted(cache_home.rglob("*")) == before
    # Images that were opened here before are drawn, unless a batch of them is too large.
    for side, drawn in ((32, True), (10**9, False)):
        record["knobs"] |= {"data": [FEW], "side": side}
        (stranger / "config.json").write_text(json.dumps(seal(record)))
        assert call("report", stranger) == 0
        assert ("data:image/png" in (stranger / "report.html").read_text()) == drawn


def test_names_from_files_are_escaped_on_the_terminal(tmp_path, capsys):
    for i, name in enumerate(("\x1b[31mred\x07", "\u202edlog\u200b", "two\nlines")):
        paint(tmp_path / "images" / "train" / name / "0.png", i)
    assert call("prepare", tmp_path / "images") == 0
    assert call("evaluate", "e\x1b[31mvil\u200f") == 2
    assert call("evaluate", stranger_name := f"{tmp_path}/\u202e\x9b1m.npz") == 2
    found = capsys.readouterr()
    assert not set(found.out + found.err) & set("\x1b\x07\x9b\u202e\u200b\u200f")
    assert r"\x1b[31mred\x07" in found.out
    assert r"e\x1b[31mvil\u200f" in found.err
    assert stranger_name not in found.err


def test_a_table_keeps_its_rows(capsys):
    log.print_table("a\nb", ["name", "value"], [["one\ntwo\x1b[2J", "1"]])
    assert r"one\ntwo\x1b[2J" in capsys.readouterr().out


def test_ordinary_text_is_printed_as_it_is():
    text = "Bär, naïve, 猫, кот, قطة, 1 × 2 – “x”\n\tindented 🐈"
    assert errors.printable(text) == text
