"""A search: the seed determines its trials, each runs once, validation alone selects, interruptions change nothing."""

import json
import os
import random
import shlex
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from make_images import FEW, paint

import funmatch
from funmatch import cli
from funmatch.commands.tune import optuna_storage, search, summary, worker
from funmatch.commands.tune import space as search_space
from funmatch.config import SEARCHED, Distill, Finetune, Train
from funmatch.errors import InputError, WorkFailed
from funmatch.training import train
from funmatch.training.run import folder as run_folder

TINY = {
    "data": FEW,
    "student": "fashion-mini-student",
    "batch": 8,
    "steps": 4,
    "eval_every": 2,
    "threads": 1,
}
TAUGHT = TINY | {"teacher": "fashion-mini-teacher"}
WORDS = [
    "distill", "--data", "fashion-mini", "--teacher", "fashion-mini-teacher", "--student", "fashion-mini-student",
    "--batch", "8", "--steps", "4", "--threads", "1",
]  # fmt: skip
LR = {"lr": "log:1e-4..1e-1"}


def told(folder: Path) -> dict:
    """The final table without times and places."""
    result = json.loads((folder / "result.json").read_text())
    for name in ("study", "best_run", "command", "storage", "name"):
        result.pop(name)
    for trial in result["trials"]:
        trial.pop("seconds")
        trial.pop("runs")
    return result


@pytest.mark.parametrize(
    ("word", "span"),
    [
        ("lr=log:1e-5..3e-3", ("lr", (), 1e-5, 3e-3, True, False)),
        ("optim.lr=1e-3,1e-2", ("lr", (1e-3, 1e-2), 0.0, 0.0, False, False)),
        ("weight-decay=0..1e-3", ("weight_decay", (), 0.0, 1e-3, False, False)),
        ("batch=8..64", ("batch", (), 8, 64, False, True)),
        ("temperature=1, 2", ("temperature", (1.0, 2.0), 0.0, 0.0, False, False)),
        ("drop_rate=none,0.1", ("drop_rate", (None, 0.1), 0.0, 0.0, False, False)),
        ("crop=mild,inception", ("crop", ("mild", "inception"), 0.0, 0.0, False, False)),
        ("student=../a,../b", ("student", ("../a", "../b"), 0.0, 0.0, False, False)),
        ("teacher-side=28,32", ("teacher_side", (28, 32), 0.0, 0.0, False, False)),
        ("grad_checkpointing=true,false", ("grad_checkpointing", (True, False), 0.0, 0.0, False, False)),
    ],
)
def test_the_grammar_of_spaces(word, span):
    assert search_space.read([word], Distill) == {span[0]: search_space.Range(*span[1:])}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("tempratur=1,2", "unknown option 'tempratur'; did you mean 'temperature'"),
        ("lr=3e-3..1e-5", "empty range"),
        ("lr=1..1", "empty range"),
        ("lr=", "no values"),
        ("lr", "no values"),
        ("lr=log:0..1", "starts above 0"),
        ("lr=log:1,2", "log: requires a range"),
        ("lr=1,x", "valid number"),
        ("lr=1..inf", "not finite"),
        ("lr=1,1", "twice"),
        ("batch=8.5..9", "not a whole number"),
        ("crop=mid,mild", "'mild'"),
        ("crop=log:a..b", "ranges are for numbers only"),
        ("seed=1,2", "cannot be searched"),
        ("val=10%", "cannot be searched"),
        ("out=a,b", "cannot be searched"),
    ],
)
def test_invalid_spaces(word, message):
    with pytest.raises(InputError, match=message):
        search_space.read([word], Distill)


def test_invalid_values_are_reported_before_the_search_starts():
    base = Distill.checked(**TAUGHT, out="x")
    space = search_space.read(["lr=0..1", "weight_decay=0.1,2"], Distill)
    with pytest.raises(InputError, match=r"lr must be above 0.*weight_decay must lie"):
        search_space.check(space, base)
    with pytest.raises(InputError, match="names lr twice"):
        search_space.read(["lr=1,2", "optim.lr=3"], Distill)


def test_the_network_to_finetune_is_searched_by_its_name_there():
    assert search_space.read(["model=a,b"], Finetune)["student"].choices == ("a", "b")


def drawn(way: str, numbers: list[int], values: dict[int, float]) -> dict[int, dict]:
    """What trials are given by a new sampler each, when those that have values are finished."""
    space = search_space.read(["lr=log:1e-5..1e-1", "temperature=1,2,5,10"], Distill)
    if way == "grid":
        space = search_space.read(["lr=1e-3,1e-2,1e-1", "temperature=1,2,5,10"], Distill)
    study = optuna.create_study(direction="maximize")
    given = {}
    for number in range(max(numbers) + 1):
        study.sampler = optuna_storage.SeededSampler(way, 3, space, None)
        trial = study.ask()
        given[number] = optuna_storage.suggest(trial, space)
        if number in values:
            study.tell(trial, values[number])
    return {number: given[number] for number in numbers}


@pytest.mark.parametrize("way", ["random", "grid", "tpe"])
def test_what_a_trial_is_given_is_a_function_of_the_seed_and_its_number(way):
    values = {number: number % 5 / 5 for number in range(10)}
    once = drawn(way, list(range(12)), values)
    assert once == drawn(way, list(range(12)), values)
    if way != "tpe":
        assert once == drawn(way, list(range(12)), {}), "whatever the others came to"
    combinations = {tuple(each.values()) for each in once.values()}
    assert len(combinations) == 12, "no two alike; of the grid's twelve, each once"


def test_a_trial_that_was_left_half_chosen_gets_the_rest():
    space = search_space.read(["lr=log:1e-5..1e-1", "temperature=1..10"], Distill)
    whole, half = (
        optuna.create_study(sampler=optuna_storage.SeededSampler("random", 0, space, None), direction="maximize")
        for _ in range(2)
    )
    wanted = optuna_storage.suggest(whole.ask(), space)
    optuna_storage.suggest(half.ask(), {"lr": space["lr"]})
    half.sampler = optuna_storage.SeededSampler("random", 0, space, None)
    assert optuna_storage.suggest(optuna_storage.resume_trial(half, 0), space) == wanted


def test_a_search_from_its_beginning_to_its_end(tmp_path, capsys):
    knobs = TAUGHT | {"space": LR, "trials": 2, "executions": 2, "seed": 5}
    done = funmatch.tune("distill", tmp_path / "study", **knobs)
    result = done.figures
    assert [trial["number"] for trial in result["trials"]] == [0, 1]
    for trial in result["trials"]:
        found = [run_folder.find_run(Path(folder)) for folder in trial["runs"]]
        assert [run.config["knobs"]["seed"] for run in found] == [5, 6]
        assert {run.config["knobs"]["lr"] for run in found} == {trial["knobs"]["lr"]}
        for run in found:
            figures = [record["top1"] for record in run.metrics.read() if record["event"] == "eval"]
            assert run.result["split"] == "val", "trials have no test images"
            assert max(figures) == run.result["best_score"]
        assert trial["value"] == pytest.approx(statistics.fmean(run.result["best_score"] for run in found))
    assert result["value"] == max(trial["value"] for trial in result["trials"])
    assert result["trials"][0]["knobs"] == {"lr": 3e-3}, "trial 0 uses the given configuration"
    best = result["trials"][result["best"]]
    assert done.knobs == best["knobs"]
    tops = [funmatch.evaluate(folder, split="test")["top1"] for folder in best["runs"]]
    assert result["test"]["top1"] == pytest.approx(statistics.fmean(tops))
    assert result["test"]["top1_spread"] == pytest.approx(statistics.stdev(tops))
    assert result["seen"] == {"val": 2 * 2 * 2}
    assert result["tested"] == [result["best"]]
    config = cli.parse(shlex.split(result["command"])[1:])
    assert (config.lr, config.steps, config.teacher) == (best["knobs"]["lr"], 4, ("fashion-mini-teacher",))
    page = done.report.read_text()
    assert page.count("<svg") >= 2
    assert "once by each of 2 students" in page
    assert (done.best_run / "report.html").is_file()
    before = (tmp_path / "study" / "journal.log").read_bytes()
    again = funmatch.tune("distill", tmp_path / "study", **knobs)
    assert again.figures == result
    assert (tmp_path / "study" / "journal.log").read_bytes() == before
    assert "is finished after 2 trials" in capsys.readouterr().err
    loaded = optuna.load_study(
        study_name="study",
        storage=optuna.storages.JournalStorage(
            optuna.storages.journal.JournalFileBackend(str(tmp_path / "study" / "journal.log"))
        ),
    )
    assert loaded.best_value == result["value"], "other programs of Optuna's family read it"


def test_trials_share_the_teachers_logits(tmp_path, capsys):
    knobs = {
        "data": (FEW,), "teacher": ("fashion-mini-teacher",), "student": "fashion-mini-student", "steps": 4,
        "batch": 8, "eval_every": 2, "trials": 2, "executions": 2, "threads": 1,
    }  # fmt: skip
    funmatch.tune("distill", **knobs, space=["lr=1e-3,1e-2", "temperature=1,2"], out=tmp_path / "shared")
    told = capsys.readouterr().err
    assert told.count("recording the teacher's logits of 4 steps") == 2, "once a seed"
    assert told.count("replaying the teacher's logits of 4 steps") == 2
    assert not (tmp_path / "shared" / "tapes").exists(), "needed by none any more"
    for words in ({"space": ["lr=1e-3,1e-2", "mixup_mode=batch,image"]}, {"space": ["lr=1e-3,1e-2"], "tapes": False}):
        funmatch.tune("distill", **knobs, **words, out=tmp_path / "-".join(words))
        assert "tape" not in capsys.readouterr().err


def test_more_trials_go_on_and_say_who_was_tested(tmp_path):
    first = funmatch.tune("train", tmp_path / "study", **TINY, space=LR, trials=2)
    more = funmatch.tune("train", tmp_path / "study", **TINY, space=LR, trials=3)
    assert more.figures["trials"][:2] == first.figures["trials"]
    assert len(more.figures["trials"]) == 3
    tested = {first.figures["best"], more.figures["best"]}
    assert set(more.figures["tested"]) == tested, "each look at the test images is counted"


class Power(BaseException):
    """The lights go out."""


def test_a_stop_at_any_run_changes_nothing(tmp_path, monkeypatch):
    knobs = TINY | {"space": LR, "trials": 2, "executions": 2}
    funmatch.tune("train", tmp_path / "whole", **knobs)
    real, dice = train.run, random.Random(3)

    def dies(config, *rest):
        if dice.random() < 0.3:
            raise Power
        figures = real(config, *rest)
        if dice.random() < 0.3:
            raise Power
        return figures

    monkeypatch.setattr(train, "run", dies)
    for _ in range(40):
        try:
            funmatch.tune("train", tmp_path / "stopped", **knobs)
            break
        except Power:
            continue
    else:
        pytest.fail("it never ends")
    assert told(tmp_path / "stopped") == told(tmp_path / "whole")
    assert {path.name for path in (tmp_path / "stopped" / "trials").iterdir()} == {"0000", "0001"}


def test_a_trial_that_another_worker_is_at_is_left_to_it(tmp_path, monkeypatch, capsys):
    asked = search.read_spec(
        SEARCHED["train"].checked(**TINY, space=("lr=1e-3,1e-2",), trials=2, out=tmp_path / "study")
    )
    with optuna_storage.working_trials(asked.place):
        study = worker.open_study(asked)
        (trial, lock), others = worker.next_trial(study, asked)
        assert (trial.number, others) == (0, [])
        (other, second), others = worker.next_trial(study, asked)
        assert (other.number, others) == (1, [0])
        assert worker.next_trial(study, asked) == (None, [0, 1])
        second.close()
        (other, second), _ = worker.next_trial(study, asked)
        assert other.number == 1, "a trial that nobody holds is taken up again under its number"
        second.close()
        monkeypatch.setattr(time, "sleep", lambda _seconds: lock.close())
        worker.work(study, asked, {})
    assert [each.state.name for each in study.trials] == ["COMPLETE", "COMPLETE"]
    assert "waiting for trial 0" in capsys.readouterr().err


def test_what_another_worker_has_just_begun_is_no_obstacle(tmp_path):
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / ".lock").touch()
    (tmp_path / "study" / ".study.json.x1.partial").write_text("{")
    assert funmatch.tune("train", tmp_path / "study", **TINY, space=LR, trials=1).figures["best"] == 0


def test_a_trial_that_ends_while_we_look_is_left_alone(tmp_path, monkeypatch):
    asked = search.read_spec(
        SEARCHED["train"].checked(**TINY, space=("lr=1e-3,1e-2",), trials=1, out=tmp_path / "study")
    )
    with optuna_storage.working_trials(asked.place):
        study = worker.open_study(asked)
        (trial, lock), _ = worker.next_trial(study, asked)
        real = worker.hold_trial

        def just_then(*which):
            if trial.number == 0 and not lock.closed:
                study.tell(trial, 0.5)
                lock.close()
            return real(*which)

        monkeypatch.setattr(worker, "hold_trial", just_then)
        assert worker.next_trial(study, asked) == (None, [])


def test_a_trial_that_fails_is_recorded_and_the_search_goes_on(tmp_path):
    done = funmatch.tune(
        "train", tmp_path / "study", **TINY, space={"lr": [1e-3, 1e38]}, sampler="grid", warmup_steps=0
    )
    states = {trial["knobs"]["lr"]: trial["state"] for trial in done.figures["trials"]}
    assert states == {1e-3: "complete", 1e38: "fail"}
    (error,) = [trial["error"] for trial in done.figures["trials"] if trial["error"]]
    assert "no longer finite" in error
    assert "no longer finite" in done.report.read_text()


def test_if_all_fail_it_says_why(tmp_path, monkeypatch, capsys):
    def full(*_rest):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(train, "run", full)
    with pytest.raises(WorkFailed, match="all 2 trials failed, the first so: RuntimeError: out of memory"):
        funmatch.tune("train", tmp_path / "study", **TINY, space={"lr": [1e-3, 1e-2]}, sampler="grid")
    words = [word for word in WORDS if "teacher" not in word][1:]
    with pytest.raises(SystemExit) as end:
        cli.main(["tune", "train", *words, "--space", "lr=1e-3", "--trials", "1", "--out", str(tmp_path / "other")])
    assert end.value.code == 1
    assert "out of memory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give a command to tune: train, finetune, distill"),
        (["distil"], "did you mean 'distill'"),
        (["pet37-fats"], "did you mean 'pet37-fast'"),
        ([*WORDS], "pass what to search"),
        ([*WORDS, "--space", "tempratur=1"], "did you mean 'temperature'"),
        ([*WORDS, "--space", "lr=2..1"], "empty range"),
        ([*WORDS, "--space", "lr=1", "--executions", "0"], "executions must be at least 1, got 0"),
        ([*WORDS, "--space", "lr=1", "--trials", "0"], "trials must be at least 1, got 0"),
        ([*WORDS, "--space", "lr=1..2", "--sampler", "grid"], "a grid needs listed values"),
        ([*WORDS, "--space", "lr=1,2", "--storage", "sqlite:////no/such/folder/x.db"], "cannot be reached"),
        ([*WORDS, "--space", "lr=1,2", "--storage", "nonsense://x"], "cannot be reached"),
        ([*WORDS, "--space", "lr=1,2", "--storage", "notes.txt"], "is not a journal of Optuna"),
        ([*WORDS, "--space", "lr=1,2", "--storage", "no/such/folder/x.log"], "No such file"),
        ([*WORDS, "--space", "lr=1,2", "--data", "nowhere/at/all"], "nowhere/at/all"),
        (["pet37-fast", "--data", "nowhere/at/all"], "nowhere/at/all"),
    ],
)
def test_invalid_arguments_get_one_message_and_leave_nothing(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("precious")
    with pytest.raises(SystemExit) as end:
        cli.main(["tune", *words, *(["--out", "study"] if words else [])])
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert message in err
    assert not out
    assert Path("notes.txt").read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_without_optuna_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.delitem(sys.modules, "funmatch.commands.tune.optuna_storage")
    monkeypatch.delattr(funmatch.commands.tune, "optuna_storage")
    with pytest.raises(InputError, match=r"pip install 'funmatch\[tune\]'"):
        funmatch.tune("train", tmp_path / "study", **TINY, space=LR)


def test_a_study_of_something_else_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(optuna_storage, "PATIENCE_SECONDS", 0.3)
    place = f"sqlite:///{tmp_path}/all.db"
    knobs = TINY | {"space": LR, "trials": 1, "storage": place}
    funmatch.tune("train", tmp_path / "study", **knobs)
    with pytest.raises(
        InputError, match=r"(?s)lr: log:0.0001..0.1 in the search, 1.0,2.0 now.*executions: 1 in the search, 2 now"
    ) as end:
        funmatch.tune("train", tmp_path / "study", **knobs | {"space": {"lr": [1, 2]}, "executions": 2})
    assert "choose another out" in str(end.value)
    with pytest.raises(InputError, match="holds a study 'study' that is not the one of"):
        funmatch.tune("train", tmp_path / "elsewhere" / "study", **knobs)
    assert not (tmp_path / "elsewhere" / "study").exists()
    holder = sqlite3.connect(tmp_path / "all.db")
    holder.execute("begin exclusive")
    with pytest.raises(InputError, match="database is locked"):
        funmatch.tune("train", tmp_path / "other", **knobs)
    holder.close()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="exists and is not a search"):
        funmatch.tune("train", tmp_path / "mine", **knobs)


def test_a_journal_that_is_locked_is_told_and_half_a_line_is_mended(tmp_path, monkeypatch):
    monkeypatch.setattr(optuna_storage, "PATIENCE_SECONDS", 0.3)
    funmatch.tune("train", tmp_path / "study", **TINY, space=LR, trials=1)
    journal = tmp_path / "study" / "journal.log"
    with optuna_storage.try_lock_file(journal), pytest.raises(InputError, match="locked by another process"):
        funmatch.tune("train", tmp_path / "study", **TINY, space=LR, trials=2)
    with open(journal, "a") as file:
        file.write('{"op_code":4,"wor')
    done = funmatch.tune("train", tmp_path / "study", **TINY, space=LR, trials=2)
    assert len(done.figures["trials"]) == 2
    assert all(json.loads(line) for line in journal.read_text().splitlines())


def test_passwords_are_written_nowhere():
    assert "secret" not in optuna_storage.display_url("postgresql+psycopg://me:secret@host/db")
    with pytest.raises(InputError) as end:
        optuna_storage.check_reachable("postgresql+psycopg://me:secret@127.0.0.1:1/db")
    assert "secret" not in str(end.value)


def some_images(root: Path, splits: dict[str, int]) -> Path:
    for s, (split, count) in enumerate(splits.items()):
        for c, name in enumerate(("ant", "bee")):
            for i in range(count):
                paint(root / split / name / f"{i}.png", 100 * s + 50 * c + i, (28, 28))
    return root


def test_without_validation_images_some_are_cut_off(tmp_path, capsys):
    data = some_images(tmp_path / "pictures", {"train": 20, "test": 3})
    done = funmatch.tune("train", tmp_path / "study", **TINY | {"data": data}, space=LR, trials=2)
    assert "holding out 10% of the training images" in capsys.readouterr().err
    assert run_folder.find_run(done.best_run).config["knobs"]["val"] == "10%"
    assert done.figures["seen"] == {"val": 4}
    assert done.figures["test"]["pictures"] == 6
    assert "--val" not in done.figures["command"], "in full is with all training images"
    assert "10% of the training images were held out" in done.report.read_text()


def test_test_images_are_never_chosen_by(tmp_path):
    judged = some_images(tmp_path / "judged", {"test": 3})
    with pytest.raises(InputError, match="must not choose by test images"):
        funmatch.tune("distill", tmp_path / "study", **TAUGHT, eval_data=judged, space=LR)


def test_without_labels_it_is_chosen_by_agreement(tmp_path):
    done = funmatch.tune("distill", tmp_path / "study", **TAUGHT, unlabelled=True, space=LR, trials=1)
    assert done.figures["score"] == "agreement"
    assert done.figures["test"]["top1"] is None
    assert done.figures["test"]["agreement"] is not None


def test_a_pruner_ends_trials_that_fall_behind(tmp_path, monkeypatch):
    real = train.run

    def as_good_as_its_rate(config, given, trial):
        return real(config, given, replace(trial, report=lambda step, _score: trial.report(step, config.lr)))

    monkeypatch.setattr(train, "run", as_good_as_its_rate)
    knobs = TINY | {"eval_every": 1, "lr": 1e-3}
    done = funmatch.tune("train", tmp_path / "study", **knobs, space=LR, trials=3, pruner="asha")
    first, second, third = (trial["knobs"]["lr"] for trial in done.figures["trials"])
    assert second < first < third
    assert [trial["state"] for trial in done.figures["trials"]] == ["complete", "pruned", "complete"]
    assert not Path(done.figures["trials"][1]["runs"][0], "result.json").exists()
    assert "pruned" in done.report.read_text()


def test_a_recipe_brings_its_space(tmp_path):
    knobs = {"data": FEW, "teacher": "fashion-mini-teacher", "student": "fashion-mini-student", "side": 28}
    config = cli.parse(shlex.split(
        "tune pet37-fast --data fashion-mini --teacher fashion-mini-teacher --student fashion-mini-student --side 28 "
        "--eval-resize 28 --steps 2 --batch 8 --weight-decay 1e-4 --space lr=1e-3,1e-2 --sampler grid"
    ))  # fmt: skip
    assert config.out == Path("runs/tune-pet37-fast")
    asked = search.read_spec(config)
    assert asked.space["lr"].choices == (1e-3, 1e-2)
    assert asked.space["temperature"].choices == (1.0, 2.0, 5.0, 10.0)
    assert "weight_decay" not in asked.space, "an option that is given is not searched"
    assert asked.trials == 8
    done = funmatch.tune("pet37-fast", tmp_path / "study", **knobs, eval_resize=28, steps=2, batch=8, trials=1)
    assert done.figures["recipe"] == "pet37-fast"
    assert set(done.knobs) == {"lr", "temperature", "weight_decay"}
    assert done.knobs == {"lr": 1e-2, "temperature": 5.0, "weight_decay": 1e-3}, "trial 0 is the recipe itself"
    in_full = cli.parse(shlex.split(done.figures["command"])[1:])
    assert in_full.epochs == 1000
    assert in_full.steps is None


def test_the_complete_command_of_a_run():
    base = Train.checked(**TINY | {"val": "10%", "patience": 3}, out="x")
    asked = search.SearchSpec("train", base, search_space.read(["steps=2,3"], Train), None, Path("/s"), 1)
    words = summary.command(asked, {"steps": 3})
    assert words.startswith("funmatch train ")
    assert "--steps 3" in words
    assert "--val 10%" in words
    assert "--patience" not in words
    assert words.endswith("--out /s-best")


def start(out: Path, *words: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "funmatch", "tune", *WORDS, "--steps", "60", "--eval-every", "20", "--save-every", "5",
         "--workers", "1", "--executions", "2", "--space", "lr=log:1e-4..1e-1", "temperature=1,2,5", "--json",
         *words, "--out", str(out)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ,
    )  # fmt: skip


def finish(*processes: subprocess.Popen) -> list[dict]:
    figures = []
    for process in processes:
        out, err = process.communicate(timeout=500)
        assert process.returncode == 0, err.decode()
        assert "Traceback" not in err.decode()
        assert "Warning" not in err.decode()
        figures.append(json.loads(out))
    return figures


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "words"),
    [
        (1, ("--trials", "4")),
        (2, ("--trials", "6")),
        (2, ("--trials", "6", "--storage", "sqlite:///{}/all.db")),
        (1, ("--trials", "13", "--executions", "1", "--sampler", "tpe", "--steps", "20")),
    ],
)
def test_kills_at_random_instants_change_nothing_but_the_times(tmp_path, workers, words):
    words = [word.format(tmp_path) for word in words]
    other = [word.replace("all.db", "other.db") for word in words]
    finish(start(tmp_path / "whole", *words))
    rng = random.Random(0)
    at_work = [start(tmp_path / "killed", *other) for _ in range(workers)]
    for _ in range(5):
        time.sleep(rng.uniform(4, 8))
        which = rng.randrange(workers)
        at_work[which].kill()
        at_work[which].communicate()
        at_work[which] = start(tmp_path / "killed", *other)
    finish(*at_work)
    assert told(tmp_path / "whole") == told(tmp_path / "killed")


@pytest.fixture(name="postgres")
def database():
    """A PostgreSQL server of its own, as Debian's package has it; its URL."""
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    pytest.importorskip("psycopg")
    if not binaries:
        pytest.skip("PostgreSQL is not installed")
    folder = Path(tempfile.mkdtemp(prefix="funmatch-postgres-"))
    user = {"user": "postgres"} if os.geteuid() == 0 else {}
    if user:
        shutil.chown(folder, "postgres")

    def control(*words: str) -> None:
        subprocess.run([binaries[-1] / words[0], *words[1:]], check=True, capture_output=True, cwd=folder, **user)

    control("initdb", "-D", f"{folder}/data", "-A", "trust", "-U", "me")
    options = f"-k {folder} -c listen_addresses=''"
    control("pg_ctl", "-D", f"{folder}/data", "-o", options, "-l", f"{folder}/log", "-w", "start")
    yield f"postgresql+psycopg://me@/postgres?host={folder}"
    control("pg_ctl", "-D", f"{folder}/data", "-m", "immediate", "stop")
    shutil.rmtree(folder)


@pytest.mark.slow
def test_two_workers_on_postgresql(tmp_path, postgres):
    finish(start(tmp_path / "one", "--trials", "4"))
    words = "--trials", "4", "--storage", postgres
    first, second = finish(*(start(tmp_path / "two", *words) for _ in range(2)))
    assert first == second
    assert told(tmp_path / "two") == told(tmp_path / "one")
