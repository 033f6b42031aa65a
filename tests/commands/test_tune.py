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
DISTILL = TINY | {"teacher": "fashion-mini-teacher"}
ARGV = [
    "distill", "--data", FEW, "--teacher", "fashion-mini-teacher", "--student", "fashion-mini-student",
    "--batch", "8", "--steps", "4", "--threads", "1",
]  # fmt: skip
LR = {"lr": "log:1e-4..1e-1"}


def comparable_result(folder: Path) -> dict:
    """The final result without times and paths, which differ between two searches."""
    result = json.loads((folder / "result.json").read_text())
    for name in ("study", "best_run", "command", "storage", "name"):
        result.pop(name)
    for trial in result["trials"]:
        trial.pop("seconds")
        trial.pop("runs")
    return result


@pytest.mark.parametrize(
    ("argument", "span"),
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
def test_ranges_and_choices_are_parsed(argument, span):
    assert search_space.read([argument], Distill) == {span[0]: search_space.Range(*span[1:])}


@pytest.mark.parametrize(
    ("argument", "message"),
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
def test_invalid_spaces_are_rejected(argument, message):
    with pytest.raises(InputError, match=message):
        search_space.read([argument], Distill)


def test_invalid_values_are_reported_before_the_search_starts():
    base = Distill.checked(**DISTILL, out="x")
    space = search_space.read(["lr=0..1", "weight_decay=0.1,2"], Distill)
    with pytest.raises(InputError, match=r"lr must be above 0.*weight_decay must lie"):
        search_space.check(space, base)
    with pytest.raises(InputError, match="names lr twice"):
        search_space.read(["lr=1,2", "optim.lr=3"], Distill)


def test_space_of_finetune_calls_the_network_model():
    assert search_space.read(["model=a,b"], Finetune)["student"].choices == ("a", "b")


def draw_trials(way: str, numbers: list[int], values: dict[int, float]) -> dict[int, dict]:
    """Options of trials, each drawn by a new sampler as a resumed search does; trials with values are finished."""
    space = search_space.read(["lr=log:1e-5..1e-1", "temperature=1,2,5,10"], Distill)
    if way == "grid":
        space = search_space.read(["lr=1e-3,1e-2,1e-1", "temperature=1,2,5,10"], Distill)
    study = optuna.create_study(direction="maximize")
    suggested = {}
    for number in range(max(numbers) + 1):
        study.sampler = optuna_storage.SeededSampler(way, 3, space, None)
        trial = study.ask()
        suggested[number] = optuna_storage.suggest(trial, space)
        if number in values:
            study.tell(trial, values[number])
    return {number: suggested[number] for number in numbers}


@pytest.mark.parametrize("way", ["random", "grid", "tpe"])
def test_trial_options_are_a_function_of_seed_and_number(way):
    values = {number: number % 5 / 5 for number in range(10)}
    once = draw_trials(way, list(range(12)), values)
    assert once == draw_trials(way, list(range(12)), values)
    if way != "tpe":
        assert once == draw_trials(way, list(range(12)), {}), "the other trials' results do not matter"
    combinations = {tuple(each.values()) for each in once.values()}
    assert len(combinations) == 12, "no two trials are alike, and the grid has exactly twelve points"


def test_half_suggested_trial_gets_the_remaining_options():
    space = search_space.read(["lr=log:1e-5..1e-1", "temperature=1..10"], Distill)
    uninterrupted, half = (
        optuna.create_study(sampler=optuna_storage.SeededSampler("random", 0, space, None), direction="maximize")
        for _ in range(2)
    )
    expected = optuna_storage.suggest(uninterrupted.ask(), space)
    optuna_storage.suggest(half.ask(), {"lr": space["lr"]})
    half.sampler = optuna_storage.SeededSampler("random", 0, space, None)
    assert optuna_storage.suggest(optuna_storage.resume_trial(half, 0), space) == expected


def test_search_reports_its_trials_and_repeats_nothing(tmp_path, capsys):
    options = DISTILL | {"space": LR, "trials": 2, "executions": 2, "seed": 5}
    tuned = funmatch.tune("distill", tmp_path / "study", **options)
    result = tuned.figures
    assert [trial["number"] for trial in result["trials"]] == [0, 1]
    for trial in result["trials"]:
        found = [run_folder.find_run(Path(folder)) for folder in trial["runs"]]
        assert [run.config["knobs"]["seed"] for run in found] == [5, 6]
        assert {run.config["knobs"]["lr"] for run in found} == {trial["knobs"]["lr"]}
        for run in found:
            results = [record["top1"] for record in run.metrics.read() if record["event"] == "eval"]
            assert run.result["split"] == "val", "trials have no test images"
            assert max(results) == run.result["best_score"]
        assert trial["value"] == pytest.approx(statistics.fmean(run.result["best_score"] for run in found))
    assert result["value"] == max(trial["value"] for trial in result["trials"])
    assert result["trials"][0]["knobs"] == {"lr": 3e-3}, "trial 0 uses the given configuration"
    best = result["trials"][result["best"]]
    assert tuned.knobs == best["knobs"]
    tops = [funmatch.evaluate(folder, split="test")["top1"] for folder in best["runs"]]
    assert result["test"]["top1"] == pytest.approx(statistics.fmean(tops))
    assert result["test"]["top1_spread"] == pytest.approx(statistics.stdev(tops))
    assert result["seen"] == {"val": 2 * 2 * 2}
    assert result["tested"] == [result["best"]]
    config = cli.parse(shlex.split(result["command"])[1:])
    assert (config.lr, config.steps, config.teacher) == (best["knobs"]["lr"], 4, ("fashion-mini-teacher",))
    page = tuned.report.read_text()
    assert page.count("<svg") >= 2
    assert "once by each of 2 students" in page
    assert (tuned.best_run / "report.html").is_file()
    before = (tmp_path / "study" / "journal.log").read_bytes()
    again = funmatch.tune("distill", tmp_path / "study", **options)
    assert again.figures == result
    assert (tmp_path / "study" / "journal.log").read_bytes() == before
    assert "is finished after 2 trials" in capsys.readouterr().err
    loaded = optuna.load_study(
        study_name="study",
        storage=optuna.storages.JournalStorage(
            optuna.storages.journal.JournalFileBackend(str(tmp_path / "study" / "journal.log"))
        ),
    )
    assert loaded.best_value == result["value"], "Optuna's own tools read the journal"


@pytest.mark.slow
def test_trials_share_the_teachers_logits(tmp_path, capsys):
    options = {
        "data": (FEW,), "teacher": ("fashion-mini-teacher",), "student": "fashion-mini-student", "steps": 4,
        "batch": 8, "eval_every": 2, "trials": 2, "threads": 1,
    }  # fmt: skip
    funmatch.tune(
        "distill", **options, executions=2, space=["lr=1e-3,1e-2", "temperature=1,2"], out=tmp_path / "shared"
    )
    output = capsys.readouterr().err
    assert output.count("recording the teacher's logits of 4 steps") == 2, "once a seed"
    assert output.count("replaying the teacher's logits of 4 steps") == 2
    assert not (tmp_path / "shared" / "tapes").exists(), "removed once no trial needs them"
    for words in ({"space": ["lr=1e-3,1e-2", "mixup_mode=batch,image"]}, {"space": ["lr=1e-3,1e-2"], "tapes": False}):
        funmatch.tune("distill", **options, **words, out=tmp_path / "-".join(words))
        assert "tape" not in capsys.readouterr().err


@pytest.mark.slow
def test_more_trials_continue_a_search_and_every_tested_trial_is_listed(tmp_path):
    first = funmatch.tune("train", tmp_path / "study", **TINY, space=LR, trials=2)
    extended = funmatch.tune("train", tmp_path / "study", **TINY, space=LR, trials=3)
    assert extended.figures["trials"][:2] == first.figures["trials"]
    assert len(extended.figures["trials"]) == 3
    tested = {first.figures["best"], extended.figures["best"]}
    assert set(extended.figures["tested"]) == tested, "every evaluation on the test images is counted"


class PowerLoss(BaseException):
    """Stands for a power loss: no handler of ours catches it."""


def test_search_stopped_at_any_run_gives_the_same_result(tmp_path, monkeypatch):
    options = TINY | {"space": LR, "trials": 2, "executions": 2}
    funmatch.tune("train", tmp_path / "whole", **options)
    original, rng = train.run, random.Random(3)

    def run_or_lose_power(config, *args):
        if rng.random() < 0.3:
            raise PowerLoss
        results = original(config, *args)
        if rng.random() < 0.3:
            raise PowerLoss
        return results

    monkeypatch.setattr(train, "run", run_or_lose_power)
    for _ in range(40):
        try:
            funmatch.tune("train", tmp_path / "stopped", **options)
            break
        except PowerLoss:
            continue
    else:
        pytest.fail("the search never finishes")
    assert comparable_result(tmp_path / "stopped") == comparable_result(tmp_path / "whole")
    assert {path.name for path in (tmp_path / "stopped" / "trials").iterdir()} == {"0000", "0001"}


@pytest.mark.slow
def test_trial_held_by_another_worker_is_not_taken(tmp_path, monkeypatch, capsys):
    search_spec = search.read_spec(
        SEARCHED["train"].checked(**TINY, space=("lr=1e-3,1e-2",), trials=2, out=tmp_path / "study")
    )
    with optuna_storage.working_trials(search_spec.place):
        study = worker.open_study(search_spec)
        (trial, lock), others = worker.next_trial(study, search_spec)
        assert (trial.number, others) == (0, [])
        (other, second), others = worker.next_trial(study, search_spec)
        assert (other.number, others) == (1, [0])
        assert worker.next_trial(study, search_spec) == (None, [0, 1])
        second.close()
        (other, second), _ = worker.next_trial(study, search_spec)
        assert other.number == 1, "a released trial is resumed under its number"
        second.close()
        monkeypatch.setattr(time, "sleep", lambda _seconds: lock.close())
        worker.work(study, search_spec, {})
    assert [each.state.name for each in study.trials] == ["COMPLETE", "COMPLETE"]
    assert "waiting for trial 0" in capsys.readouterr().err


def test_partial_files_of_another_worker_do_not_stop_a_search(tmp_path):
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / ".lock").touch()
    (tmp_path / "study" / ".study.json.x1.partial").write_text("{")
    assert funmatch.tune("train", tmp_path / "study", **TINY, space=LR, trials=1).figures["best"] == 0


def test_trial_that_finishes_meanwhile_is_not_repeated(tmp_path, monkeypatch):
    search_spec = search.read_spec(
        SEARCHED["train"].checked(**TINY, space=("lr=1e-3,1e-2",), trials=1, out=tmp_path / "study")
    )
    with optuna_storage.working_trials(search_spec.place):
        study = worker.open_study(search_spec)
        (trial, lock), _ = worker.next_trial(study, search_spec)
        original = worker.hold_trial

        def finish_first(*which):
            if trial.number == 0 and not lock.closed:
                study.tell(trial, 0.5)
                lock.close()
            return original(*which)

        monkeypatch.setattr(worker, "hold_trial", finish_first)
        assert worker.next_trial(study, search_spec) == (None, [])


def test_failed_trial_is_recorded_and_the_search_continues(tmp_path):
    tuned = funmatch.tune(
        "train", tmp_path / "study", **TINY, space={"lr": [1e-3, 1e38]}, sampler="grid", warmup_steps=0
    )
    states = {trial["knobs"]["lr"]: trial["state"] for trial in tuned.figures["trials"]}
    assert states == {1e-3: "complete", 1e38: "fail"}
    (error,) = [trial["error"] for trial in tuned.figures["trials"] if trial["error"]]
    assert "no longer finite" in error
    assert "no longer finite" in tuned.report.read_text()


def test_error_names_the_cause_if_all_trials_fail(tmp_path, monkeypatch, capsys):
    def fails(*_rest):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(train, "run", fails)
    with pytest.raises(WorkFailed, match="all 2 trials failed, the first so: RuntimeError: out of memory"):
        funmatch.tune("train", tmp_path / "study", **TINY, space={"lr": [1e-3, 1e-2]}, sampler="grid")
    words = [argument for argument in ARGV if "teacher" not in argument][1:]
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
        ([*ARGV], "pass what to search"),
        ([*ARGV, "--space", "tempratur=1"], "did you mean 'temperature'"),
        ([*ARGV, "--space", "lr=2..1"], "empty range"),
        ([*ARGV, "--space", "lr=1", "--executions", "0"], "executions must be at least 1, got 0"),
        ([*ARGV, "--space", "lr=1", "--trials", "0"], "trials must be at least 1, got 0"),
        ([*ARGV, "--space", "lr=1..2", "--sampler", "grid"], "a grid needs listed values"),
        ([*ARGV, "--space", "lr=1,2", "--storage", "sqlite:////no/such/folder/x.db"], "cannot be reached"),
        ([*ARGV, "--space", "lr=1,2", "--storage", "nonsense://x"], "cannot be reached"),
        ([*ARGV, "--space", "lr=1,2", "--storage", "notes.txt"], "is not a journal of Optuna"),
        ([*ARGV, "--space", "lr=1,2", "--storage", "no/such/folder/x.log"], "No such file"),
        ([*ARGV, "--space", "lr=1,2", "--data", "nowhere/at/all"], "nowhere/at/all"),
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


def test_error_without_optuna_names_the_package_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.delitem(sys.modules, "funmatch.commands.tune.optuna_storage")
    monkeypatch.delattr(funmatch.commands.tune, "optuna_storage")
    with pytest.raises(InputError, match=r"pip install 'funmatch\[tune\]'"):
        funmatch.tune("train", tmp_path / "study", **TINY, space=LR)


@pytest.mark.slow
def test_folder_or_study_of_another_search_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(optuna_storage, "PATIENCE_SECONDS", 0.3)
    url = f"sqlite:///{tmp_path}/all.db"
    options = TINY | {"space": LR, "trials": 1, "storage": url}
    funmatch.tune("train", tmp_path / "study", **options)
    with pytest.raises(
        InputError, match=r"(?s)lr: log:0.0001..0.1 in the search, 1.0,2.0 now.*executions: 1 in the search, 2 now"
    ) as end:
        funmatch.tune("train", tmp_path / "study", **options | {"space": {"lr": [1, 2]}, "executions": 2})
    assert "choose another out" in str(end.value)
    with pytest.raises(InputError, match="holds a study 'study' that is not the one of"):
        funmatch.tune("train", tmp_path / "elsewhere" / "study", **options)
    assert not (tmp_path / "elsewhere" / "study").exists()
    holder = sqlite3.connect(tmp_path / "all.db")
    holder.execute("begin exclusive")
    with pytest.raises(InputError, match="database is locked"):
        funmatch.tune("train", tmp_path / "other", **options)
    holder.close()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="exists and is not a search"):
        funmatch.tune("train", tmp_path / "mine", **options)


@pytest.mark.slow
def test_locked_journal_is_reported_and_a_partial_line_is_repaired(tmp_path, monkeypatch):
    monkeypatch.setattr(optuna_storage, "PATIENCE_SECONDS", 0.3)
    funmatch.tune("train", tmp_path / "study", **TINY, space=LR, trials=1)
    journal = tmp_path / "study" / "journal.log"
    with optuna_storage.try_lock_file(journal), pytest.raises(InputError, match="locked by another process"):
        funmatch.tune("train", tmp_path / "study", **TINY, space=LR, trials=2)
    with open(journal, "a") as file:
        file.write('{"op_code":4,"wor')
    tuned = funmatch.tune("train", tmp_path / "study", **TINY, space=LR, trials=2)
    assert len(tuned.figures["trials"]) == 2
    assert all(json.loads(line) for line in journal.read_text().splitlines())


def test_passwords_are_not_shown():
    assert "secret" not in optuna_storage.display_url("postgresql+psycopg://me:secret@host/db")
    with pytest.raises(InputError) as end:
        optuna_storage.check_reachable("postgresql+psycopg://me:secret@127.0.0.1:1/db")
    assert "secret" not in str(end.value)


def write_images(root: Path, splits: dict[str, int]) -> Path:
    for s, (split, count) in enumerate(splits.items()):
        for c, name in enumerate(("ant", "bee")):
            for i in range(count):
                paint(root / split / name / f"{i}.png", 100 * s + 50 * c + i, (28, 28))
    return root


def test_without_a_validation_split_training_images_are_held_out(tmp_path, capsys):
    data = write_images(tmp_path / "pictures", {"train": 20, "test": 3})
    tuned = funmatch.tune("train", tmp_path / "study", **TINY | {"data": data}, space=LR, trials=2)
    assert "holding out 10% of the training images" in capsys.readouterr().err
    assert run_folder.find_run(tuned.best_run).config["knobs"]["val"] == "10%"
    assert tuned.figures["seen"] == {"val": 4}
    assert tuned.figures["test"]["pictures"] == 6
    assert "--val" not in tuned.figures["command"]
    full = funmatch.train(**TINY | {"data": data}, out=tmp_path / "full")
    facts = [run_folder.find_run(folder).config["facts"]["data"] for folder in (tuned.best_run, full.folder)]
    assert facts[0] == facts[1], "the full run holds out the images that the search chose by"
    assert "10% of the training images were held out" in tuned.report.read_text()


def test_selection_by_test_images_is_refused(tmp_path):
    test_only = write_images(tmp_path / "judged", {"test": 3})
    with pytest.raises(InputError, match="must not choose by test images"):
        funmatch.tune("distill", tmp_path / "study", **DISTILL, eval_data=test_only, space=LR)


def test_without_labels_agreement_selects(tmp_path):
    tuned = funmatch.tune("distill", tmp_path / "study", **DISTILL, unlabelled=True, space=LR, trials=1)
    assert tuned.figures["score"] == "agreement"
    assert tuned.figures["test"]["top1"] is None
    assert tuned.figures["test"]["agreement"] is not None


def test_pruner_stops_trials_that_fall_behind(tmp_path, monkeypatch):
    original = train.run

    def score_by_learning_rate(config, suggested, trial):
        return original(config, suggested, replace(trial, report=lambda step, _score: trial.report(step, config.lr)))

    monkeypatch.setattr(train, "run", score_by_learning_rate)
    options = TINY | {"eval_every": 1, "lr": 1e-3}
    tuned = funmatch.tune("train", tmp_path / "study", **options, space=LR, trials=3, pruner="asha")
    first, second, third = (trial["knobs"]["lr"] for trial in tuned.figures["trials"])
    assert second < first < third
    assert [trial["state"] for trial in tuned.figures["trials"]] == ["complete", "pruned", "complete"]
    assert not Path(tuned.figures["trials"][1]["runs"][0], "result.json").exists()
    assert "pruned" in tuned.report.read_text()


def test_recipe_has_a_search_space(tmp_path):
    options = {"data": FEW, "teacher": "fashion-mini-teacher", "student": "fashion-mini-student", "side": 28}
    config = cli.parse(shlex.split(
        "tune pet37-fast --data fashion-mini --teacher fashion-mini-teacher --student fashion-mini-student --side 28 "
        "--eval-resize 28 --steps 2 --batch 8 --weight-decay 1e-4 --space lr=1e-3,1e-2 --sampler grid"
    ))  # fmt: skip
    assert config.out == Path("runs/tune-pet37-fast")
    search_spec = search.read_spec(config)
    assert search_spec.space["lr"].choices == (1e-3, 1e-2)
    assert search_spec.space["temperature"].choices == (1.0, 2.0, 5.0, 10.0)
    assert "weight_decay" not in search_spec.space, "an option that is given is not searched"
    assert search_spec.trials == 8
    tuned = funmatch.tune("pet37-fast", tmp_path / "study", **options, eval_resize=28, steps=2, batch=8, trials=1)
    assert tuned.figures["recipe"] == "pet37-fast"
    assert set(tuned.knobs) == {"lr", "temperature", "weight_decay"}
    assert tuned.knobs == {"lr": 1e-2, "temperature": 5.0, "weight_decay": 1e-3}, "trial 0 is the recipe itself"
    full_length = cli.parse(shlex.split(tuned.figures["command"])[1:])
    assert full_length.epochs == 1000
    assert full_length.steps is None


def test_command_of_the_best_trial_is_complete():
    base = Train.checked(**TINY | {"val": "10%", "patience": 3}, out="x")
    search_spec = search.SearchSpec("train", base, search_space.read(["steps=2,3"], Train), None, Path("/s"), 1)
    words = summary.command(search_spec, {"steps": 3})
    assert words.startswith("funmatch train ")
    assert "--steps 3" in words
    assert "--val 10%" in words
    assert "--patience" not in words
    assert words.endswith("--out /s-best")


def start_worker(out: Path, *words: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "funmatch", "tune", *ARGV, "--steps", "60", "--eval-every", "20", "--save-every", "5",
         "--workers", "1", "--executions", "2", "--space", "lr=log:1e-4..1e-1", "temperature=1,2,5", "--json",
         *words, "--out", str(out)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ,
    )  # fmt: skip


def wait_for_workers(*processes: subprocess.Popen) -> list[dict]:
    results = []
    for process in processes:
        out, err = process.communicate(timeout=500)
        assert process.returncode == 0, err.decode()
        assert "Traceback" not in err.decode()
        assert "Warning" not in err.decode()
        results.append(json.loads(out))
    return results


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
def test_kills_at_random_times_change_no_result(tmp_path, workers, words):
    words = [argument.format(tmp_path) for argument in words]
    other = [argument.replace("all.db", "other.db") for argument in words]
    wait_for_workers(start_worker(tmp_path / "whole", *words))
    rng = random.Random(0)
    workers_running = [start_worker(tmp_path / "killed", *other) for _ in range(workers)]
    for _ in range(5):
        time.sleep(rng.uniform(4, 8))
        which = rng.randrange(workers)
        workers_running[which].kill()
        workers_running[which].communicate()
        workers_running[which] = start_worker(tmp_path / "killed", *other)
    wait_for_workers(*workers_running)
    assert comparable_result(tmp_path / "whole") == comparable_result(tmp_path / "killed")


@pytest.fixture(name="postgres")
def postgres_server():
    """URL of a PostgreSQL server started from Debian's package for this test, on a Unix socket only."""
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
    wait_for_workers(start_worker(tmp_path / "one", "--trials", "4"))
    words = "--trials", "4", "--storage", postgres
    first, second = wait_for_workers(*(start_worker(tmp_path / "two", *words) for _ in range(2)))
    assert first == second
    assert comparable_result(tmp_path / "two") == comparable_result(tmp_path / "one")
