"""Studies: files are checked as a whole, every run is trained once, and plots need only the recorded results."""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar, TextIO

import pytest
from make_images import FEW

import funmatch
from funmatch import cli
from funmatch.commands.study import files as study_files
from funmatch.commands.study import results as study_results
from funmatch.commands.study import runner, spec
from funmatch.config import Study
from funmatch.config.choices import STRATEGIES
from funmatch.errors import InputError, WorkFailed
from funmatch.reports import study_page, study_plots
from funmatch.runtime import time_limit
from funmatch.training.run import compare
from funmatch.training.run import folder as run_folder
from funmatch.training.teachers import recording

COMMON = f"""
[common]
data = "{FEW}"
teacher = "fashion-mini-teacher"
student = "fashion-mini-student"
steps = 4
batch = 8
threads = 1
log_every = 2
eval_every = 2
"""
TINY = f"""
title = "Tiny"
question = "Does it work?"
seeds = [0, 1]
{COMMON}
[[run]]
name = "same/ic"
strategy = "same/ic"

[[run]]
name = "T = {{temperature}}"
group = "funmatch"
each = {{ temperature = [1.0, 2.0] }}

[[run]]
name = "labels"
verb = "train"

[[run]]
name = "from labels"
student = "run:labels"
mixup_max = false

[[figure]]
kind = "ends"
value = "top1"

[[figure]]
kind = "against"
value = "kl"
knob = "temperature"

[[figure]]
kind = "curves"
event = "step"
value = "loss"

[[figure]]
kind = "scatter"
value = "top1"
across = "views_kl"
"""


def write_study(folder: Path, text: str) -> str:
    (folder / "tiny.toml").write_text(text)
    return str(folder / "tiny.toml")


@pytest.mark.parametrize("name", study_files.built_in())
def test_built_in_studies_are_valid(name):
    plan = study_files.load_spec(Study.checked(name=name))
    assert len({entry.seed for entry in plan.entries}) >= 3
    assert plan.title
    assert plan.question
    assert plan.figures


def test_runs_of_consistency_differ_in_strategy_only():
    plan = study_files.load_spec(Study.checked(name="consistency"))
    assert {each.name for each in plan.entries} == {*STRATEGIES, "funmatch (λ a picture)"}
    others = {
        json.dumps({**entry.knobs, "strategy": ""}, default=str) for entry in plan.entries if "λ" not in entry.name
    }
    assert len(others) == 1


def test_study_file_expands_to_runs_with_seeds_and_references(tmp_path):
    plan = study_files.load_spec(
        Study.checked(name=write_study(tmp_path, TINY), set=("epochs=2", "lr=0.5"), seeds=(3, 4))
    )
    names = list(dict.fromkeys(entry.name for entry in plan.entries))
    assert names == ["same/ic", "T = 1.0", "T = 2.0", "labels", "from labels"]
    assert [entry.place for entry in plan.entries][:2] == ["same-ic-seed-3", "same-ic-seed-4"]
    assert {entry.group for entry in plan.entries} == {"same/ic", "funmatch", "labels", "from labels"}
    for entry in plan.entries:
        assert (entry.knobs["epochs"], entry.knobs["lr"]) == (2, 0.5)
        assert "steps" not in entry.knobs
        assert ("teacher" in entry.knobs) == (entry.verb == "distill")
    last = plan.entries[-1]
    assert last.needs == ("labels-seed-4",)
    assert spec.resolve_references(last, Path("/s/runs"))["student"] == "/s/runs/labels-seed-4"
    chosen = study_files.load_spec(Study.checked(name=write_study(tmp_path, TINY), only=("from*",)))
    assert [entry.place for entry in chosen.entries] == [
        "labels-seed-0", "labels-seed-1", "from-labels-seed-0", "from-labels-seed-1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("seeds = [0, 1]", "seeds = [0"), "not valid TOML"),
        (("title", "titel"), "unknown key 'titel'; did you mean 'title'"),
        (('strategy = "same/ic"', 'strategy = "same/id"'), "same/ic: unknown strategy 'same/id'"),
        (
            ('strategy = "same/ic"', 'strategie = "same/ic"'),
            "same/ic: unknown option 'strategie'; did you mean 'strategy'",
        ),
        (("batch = 8", "batchs = 8"), "unknown option in .common. or --set 'batchs'; did you mean 'batch'"),
        (('name = "labels"', 'name = "same/ic"'), "same-ic-seed-0: two runs have this name"),
        (('name = "labels"', ""), "run 3 has no name"),
        (("run:labels", "run:label"), "run:label does not name another run of the study"),
        (('verb = "train"', 'verb = "trian"'), "unknown command 'trian'"),
        (("temperature = [1.0, 2.0]", "temperature = 1.0"), "each must give a list"),
        (("temperature = [1.0, 2.0]", "temperature = [1.0, 0.0]"), "T = 0.0: temperature must be above 0"),
        (('kind = "ends"', 'kind = "end"'), "figure 1: unknown kind 'end'; did you mean 'ends'"),
        (('across = "views_kl"', ""), "figure 4: scatter needs across"),
        (('across = "views_kl"', 'across = "view_kl"'), "figure 4: unknown across 'view_kl'; did you mean 'views_kl'"),
        (('value = "top1"', 'value = "top-1"'), "figure 1: unknown value 'top-1'; did you mean 'top1'"),
        (('knob = "temperature"', 'knob = "temprature"'), "figure 2: unknown knob 'temprature'"),
        (
            ('value = "loss"', 'value = "kl"'),
            "figure 3: unknown value 'kl'; known: features, images_per_second, loss, lr, tokens",
        ),
        (('event = "step"', 'event = "steps"'), "figure 3: unknown event 'steps'; did you mean 'step'"),
        (("seeds = [0, 1]", "seeds = [0, -1]"), "a seed is a whole number"),
        (("each = { temperature = [1.0, 2.0] }", "each = 3"), "each must give a list"),
        (("seeds = [0, 1]", "seeds = [true]"), "a seed is a whole number"),
        (('verb = "train"', 'verb = ["train"]'), "unknown command"),
        (('name = "labels"', 'name = "labels"\nseeds = 3'), "seeds must be a list of one or more numbers, got 3"),
        (("threads = 1", 'out = "x"'), "unknown option|set by the study itself"),
        ((f'data = "{FEW}"', 'data = "-mini"'), "same/ic: data -mini starts with a dash"),
    ],
)
def test_invalid_files_are_rejected(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        study_files.load_spec(Study.checked(name=write_study(tmp_path, TINY.replace(*change, 1))))


def test_set_for_one_run_and_runs_that_are_not_shown(tmp_path):
    text = TINY.replace('name = "labels"', 'name = "labels"\nshown = false')
    plan = study_files.load_spec(Study.checked(name=write_study(tmp_path, text), set=("labels.lr=0.25", "lr=0.5")))
    rates = {entry.name: entry.knobs["lr"] for entry in plan.entries}
    assert rates == {"same/ic": 0.5, "T = 1.0": 0.5, "T = 2.0": 0.5, "labels": 0.25, "from labels": 0.5}
    assert [entry.name for entry in plan.entries if not entry.shown] == ["labels"] * 2
    listed = study_page.visible([{"name": "a", "shown": False}, {"name": "b", "shown": True}, {"name": "c"}])
    assert [each["name"] for each in listed] == ["b", "c"]
    with pytest.raises(InputError, match="unknown run in --set 'label'; did you mean 'labels'"):
        study_files.load_spec(Study.checked(name=write_study(tmp_path, text), set=("label.lr=1",)))
    with pytest.raises(InputError, match="'lrr'; did you mean 'lr'"):
        study_files.load_spec(Study.checked(name=write_study(tmp_path, text), set=("labels.lrr=1",)))


@pytest.mark.parametrize(
    ("setting", "option", "value"),
    [
        ("optimizer-kwargs=eps=1e-7", "optimizer_kwargs", ("eps=1e-07",)),
        ("optimizer_kwargs=betas=(0.8,0.9),eps=1e-7", "optimizer_kwargs", ("betas=(0.8, 0.9)", "eps=1e-07")),
        (
            "student_kwargs=channels=8,8,16,16,stem_width=8",
            "student_kwargs",
            ("channels=(8, 8, 16, 16)", "stem_width=8"),
        ),
        ('student_kwargs={"stem_width": 8}', "student_kwargs", ("stem_width=8",)),
        ("data=a,b", "data", ("a", "b")),
        ("data='a,b'", "data", ("a,b",)),
        ("teacher-ahead=false", "teacher_ahead", False),
        ("steps=10", "steps", 10),
    ],
)
def test_set_values_are_parsed(tmp_path, setting, option, value):
    text = TINY.replace('student = "run:labels"\n', "")
    plan = study_files.load_spec(Study.checked(name=write_study(tmp_path, text), set=(setting,), only=("same/ic",)))
    assert plan.entries[0].knobs[option] == value


def test_all_problems_are_reported_before_anything_starts(tmp_path):
    text = TINY.replace("same/ic", "same/id").replace("run:labels", "run:nobody").replace('kind = "ends"', 'kind = "x"')
    with pytest.raises(InputError) as error:
        funmatch.study(write_study(tmp_path, text), out=tmp_path / "out")
    for message in ("unknown strategy 'same/id'", "run:nobody does not name another run", "figure 1: unknown kind 'x'"):
        assert message in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds = [0, 1]", "seeds = []", "seeds must be a list of one or more numbers"),
        ('name = "labels"', 'name = "labels {temprature}"', "unknown placeholder {temprature}; each has no options"),
        ('verb = "train"', 'verb = "eat"', "unknown command 'eat'"),
    ],
)
def test_invalid_lines_are_reported_and_leave_no_folder(tmp_path, old, new, message):
    assert old in TINY
    with pytest.raises(InputError) as error:
        funmatch.study(write_study(tmp_path, TINY.replace(old, new, 1)), out=tmp_path / "out")
    assert message in str(error.value)
    assert "unknown option in [common]" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_unknown_studies_and_folders_without_a_study_are_rejected(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="unknown study 'consistancy'; did you mean 'consistency'"):
        study_files.load_spec(Study.checked(name="consistancy"))
    with pytest.raises(InputError, match="option=value"):
        study_files.load_spec(Study.checked(name="consistency", set=("epochs",)))
    with pytest.raises(InputError, match=r"no run is named nobody; known: fix/rs, fix/cc.*, funmatch, funmatch"):
        study_files.load_spec(Study.checked(name="consistency", only=("nobody",)))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="holds no results"):
        funmatch.study("consistency", draw=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").touch()
    with pytest.raises(InputError, match="exists and is not a study"):
        funmatch.study("consistency", out=tmp_path / "mine")


def comparable_results(folder: Path) -> list[dict]:
    """Results of each run, without the times."""
    listed = []
    for result in study_results.results(folder):
        figures = {k: v for k, v in result["figures"].items() if k not in ("seconds",)}
        curves = {k: {n: v for n, v in c.items() if n != "images_per_second"} for k, c in result["curves"].items()}
        listed.append({"place": result["place"], "figures": figures, "curves": curves})
    return listed


class HereAndNow:
    """Stands for the process of a run, which it carries out in this one, without loading libraries for each run."""

    def __init__(self, words: list[str], *, stdout: TextIO, **_):
        assert words[:3] == [sys.executable, "-m", "funmatch"]
        self.words, self.returncode = words[3:], None
        with redirect_stdout(stdout), redirect_stderr(stdout), pytest.raises(SystemExit) as end:
            cli.main(self.words)
        self.returncode = end.value.code

    def poll(self) -> int:
        return self.returncode


@pytest.fixture(scope="module")
def studied(tmp_path_factory) -> Path:
    """The folder of a finished study, beside its file `tiny.toml`; every test leaves it as it is."""
    text = TINY.replace("seeds = [0, 1]", "seeds = [1]").replace('"same/ic"\n', '"same/ic"\nseeds = [0, 1]\n', 1)
    own = 'teacher = "run:labels"\nallow_weak_teacher = true\nsave_every = 2\n'
    text = text.replace('student = "run:labels"\n', f'student = "run:labels"\n{own}')
    folder = tmp_path_factory.mktemp("studied")
    with pytest.MonkeyPatch.context() as changed:
        changed.setenv("FUNMATCH_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        changed.setattr(runner, "subprocess", SimpleNamespace(Popen=HereAndNow, DEVNULL=subprocess.DEVNULL))
        outcome = funmatch.study(write_study(folder, text), out=folder / "whole", jobs=2)
    assert (outcome["runs"], outcome["finished"], outcome["failed"]) == (6, 6, {})
    return folder / "whole"


def test_study_runs_once_and_its_page_needs_only_the_results(studied, tmp_path):
    name, folder = str(studied.parent / "tiny.toml"), studied
    results = study_results.results(folder)
    assert [each["place"] for each in results] == [
        entry.place for entry in study_files.load_spec(Study.checked(name=name)).entries
    ]
    for each in results:
        result = json.loads((folder / "runs" / each["place"] / "result.json").read_text())
        assert each["figures"]["top1"] == result["top1"]
        assert each["curves"]["step"]["step"] == [2, 4]
    config = json.loads((folder / "runs" / "from-labels-seed-1" / "config.json").read_text())
    assert config["knobs"]["student"].endswith("labels-seed-1")
    assert config["knobs"]["mixup_max"] is False

    rows = dict(zip((row[0] for row in study_page.rows(results)), study_page.rows(results), strict=True))
    own = [100 * each["figures"]["top1"] for each in results if each["name"] == "same/ic"]
    assert rows["same/ic"][:3] == ["same/ic", "2", f"{statistics.mean(own):.2f} ± {statistics.stdev(own):.2f} %"]
    assert rows["labels"][3] == "–", "a student trained on labels has no teacher to agree with"

    before = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*") if path.is_file()}
    again = funmatch.study(name, out=folder, jobs=2)
    assert again["finished"] == 6
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*") if path.is_file()}

    folder = shutil.copytree(studied, tmp_path / "out")
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 4
    assert "http" not in page.replace("http://www.w3.org", "").replace("https://www.w3.org", "").replace(
        "http://purl.org", ""
    ).replace("http://creativecommons.org", ""), "the page loads nothing from the network"
    for part in ("runs", "logs", "report.html", "table.md"):
        path = folder / part
        os.rename(path, tmp_path / f"gone-{part}")
    drawn = funmatch.study(str(folder), draw=True)
    assert Path(drawn["report"]).read_text() == page
    assert (folder / "table.md").read_text() == (tmp_path / "gone-table.md").read_text()
    (tmp_path / "gone-runs").rename(folder / "runs")
    with pytest.raises(InputError, match="same-ic-seed-0: batch: 8 in the study, 16 now"):
        funmatch.study(name, out=folder, set=("batch=16",))


@pytest.mark.slow
def test_runs_with_the_same_views_and_teacher_share_a_tape(tmp_path):
    name = write_study(tmp_path, TINY.replace("seeds = [0, 1]", "seeds = [0]"))
    plan = study_files.load_spec(Study.checked(name=name))
    shared = runner.shared_tapes(runner.StudyRunner(plan, tmp_path / "out", 1))
    assert {run_name: path.parent.name for run_name, path in shared.items()} == dict.fromkeys(
        ["T---1.0-seed-0", "T---2.0-seed-0"], "tapes"
    ), "runs with other views or on labels have none"
    assert len(set(shared.values())) == 1

    funmatch.study(name, out=tmp_path / "out", jobs=2)
    first, second = ((tmp_path / "out" / "logs" / f"T---{t}.0-seed-0.log").read_text() for t in (1, 2))
    assert "recording the teacher's logits of 4 steps" in first
    assert "replaying the teacher's logits of 4 steps" in second
    assert not any((tmp_path / "out" / "tapes").iterdir()), "removed once no run needs it"
    live = funmatch.distill(
        data=FEW, teacher="fashion-mini-teacher", student="fashion-mini-student", steps=4, batch=8,
        threads=1, eval_every=2, temperature=2.0, tape=tmp_path / "own", out=tmp_path / "live",
    )  # fmt: skip
    weights = "student/model.safetensors"
    replayed = tmp_path / "out" / "runs" / "T---2.0-seed-0" / weights
    assert replayed.read_bytes() == (live.folder / weights).read_bytes()

    funmatch.study(name, out=tmp_path / "without", jobs=2, tapes=False)
    assert not (tmp_path / "without" / "tapes").exists()
    with_tape = json.loads((tmp_path / "out/runs/T---2.0-seed-0/config.json").read_text())
    without = json.loads((tmp_path / "without/runs/T---2.0-seed-0/config.json").read_text())
    assert (with_tape["facts"]["rounded"], without["facts"]["rounded"]) == ("fp16", None)


def test_run_that_started_without_a_tape_resumes_without_one(tmp_path):
    name = write_study(tmp_path, TINY)
    plan = study_files.load_spec(Study.checked(name=name))
    own = tmp_path / "out" / "runs" / "T---1.0-seed-0"
    own.mkdir(parents=True)
    (own / "config.json").write_text(json.dumps({"verb": "distill", "knobs": {"tape": None}, "facts": {}}))
    shared = runner.shared_tapes(runner.StudyRunner(plan, tmp_path / "out", 1))
    assert sorted(shared) == ["T---1.0-seed-1", "T---2.0-seed-0", "T---2.0-seed-1"]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"lr": 0.1, "side": 32, "student": "a"}, {"steps": 9, "side": 32, "student": "b"}, True),
        ({"student": "a"}, {"student": "b"}, False),  # two students may have two default sides
        ({"temperature": 1.0}, {"temperature": 2.0}, True),
        (
            {"teacher": ("a", "b"), "combine": "mean-probabilities", "temperature": 1.0},
            {"teacher": ("a", "b"), "combine": "mean-probabilities", "temperature": 2.0},
            False,
        ),
        ({"batch": 8}, {"batch": 16}, False),
        ({"mixup_mode": "image"}, {}, False),
        ({"val": 0.1}, {}, False),  # other training images
        ({"teacher": "a"}, {"teacher": "b"}, False),
    ],
)
def test_which_runs_can_share_a_tape(one, other, same):
    assert (recording.shared_by(one) == recording.shared_by(other)) is same


def test_runs_that_need_or_have_no_shared_tape():
    assert recording.shared_by({"strategy": "fix/rs"}) is None
    assert recording.shared_by({"tape": "mine"}) is None


def start_study(name: str, out: Path, **options) -> subprocess.Popen:
    argv = [sys.executable, "-m", "funmatch", "study", name, "--out", str(out), "--jobs", "2"]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def finished_places(folder: Path) -> set[str]:
    return {path.parent.name for path in folder.glob("runs/*/result.json")}


def wait_for(count: int, folder: Path, process: subprocess.Popen) -> None:
    until = time.monotonic() + 300
    while len(finished_places(folder)) < count and time.monotonic() < until and process.poll() is None:
        time.sleep(0.05)
    assert len(finished_places(folder)) >= count


@pytest.mark.slow
def test_killed_study_repeats_no_finished_run_and_changes_no_result(tmp_path):
    name = write_study(tmp_path, TINY.replace("steps = 4", "steps = 30"))
    uninterrupted = funmatch.study(name, out=tmp_path / "whole", jobs=2)
    assert uninterrupted["finished"] == 10
    out = tmp_path / "killed"
    for count, number in ((2, signal.SIGKILL), (5, signal.SIGINT), (7, signal.SIGTERM)):
        process = start_study(name, out)
        wait_for(count, out, process)
        process.send_signal(number)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number), output
        if number != signal.SIGKILL:
            assert "run the same command again to resume" in output
    finished = finished_places(out)
    before = {each: (out / "runs" / each / "result.json").stat().st_mtime_ns for each in finished}
    last = funmatch.study(name, out=out, jobs=2)
    assert last["finished"] == 10
    for run_name, stamp in before.items():
        assert (out / "runs" / run_name / "result.json").stat().st_mtime_ns == stamp
    assert comparable_results(out) == comparable_results(tmp_path / "whole")


@pytest.mark.slow
def test_failed_run_does_not_stop_the_others(tmp_path, monkeypatch):
    def start(words: list[str], **options):
        # What fails does so in a process of its own, as all runs do, before it loads PyTorch.
        return (HereAndNow if any("sound-seed" in word for word in words) else subprocess.Popen)(words, **options)

    monkeypatch.setattr(runner, "subprocess", SimpleNamespace(Popen=start, DEVNULL=subprocess.DEVNULL))
    text = f"""
title = "Half of it fails"
{COMMON}
[[run]]
name = "sound"

[[run]]
name = "no such teacher"
teacher = "nobody"

[[run]]
name = "needs it"
student = "run:no such teacher"
"""
    with pytest.raises(WorkFailed, match="2 of 3 runs failed") as error:
        funmatch.study(write_study(tmp_path, text), out=tmp_path / "out", jobs=2)
    assert "exit 2" in str(error.value)
    assert "unknown model 'nobody'" in str(error.value) or "nobody" in str(error.value)
    assert "it needs no-such-teacher-seed-0, which failed" in str(error.value)
    assert finished_places(tmp_path / "out") == {"sound-seed-0"}
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.slow
def test_damaged_and_missing_runs_are_repeated(tmp_path):
    name = write_study(tmp_path, TINY.replace('student = "fashion-mini-student"\n', ""))
    options = {"out": tmp_path / "out", "only": ("same/ic",), "set": ("student=fashion-mini-student",), "seeds": (0, 1)}
    funmatch.study(name, **options)
    before = comparable_results(tmp_path / "out")
    first, second = (tmp_path / "out" / "runs" / f"same-ic-seed-{seed}" for seed in (0, 1))
    (first / "result.json").write_text("{")
    shutil.rmtree(second)
    (tmp_path / "out" / "results.jsonl").write_text("{")
    (tmp_path / "out" / "plan.json").write_text("{")
    assert funmatch.study(name, **options)["finished"] == 2
    assert comparable_results(tmp_path / "out") == before
    shutil.rmtree(second)
    second.write_text("in the way")
    with pytest.raises(WorkFailed, match="exists and is not a run"):
        funmatch.study(name, **options)
    assert [each["place"] for each in study_results.results(tmp_path / "out")] == ["same-ic-seed-0"]


@pytest.mark.slow
def test_moved_study_resumes(studied, tmp_path):
    name, folder = str(studied.parent / "tiny.toml"), shutil.copytree(studied, tmp_path / "moved")
    (folder / "runs" / "from-labels-seed-1" / "result.json").unlink()
    gone = studied.rename(studied.parent / "gone")
    try:
        assert funmatch.study(name, out=folder, jobs=1)["finished"] == 6
    finally:
        gone.rename(studied)
    assert comparable_results(folder) == comparable_results(studied)
    # Only places may differ after a move, so another teacher under another path is a difference.
    options = run_folder.find_run(studied / "runs" / "from-labels-seed-1").config
    other = options | {"facts": options["facts"] | {"teacher": "another"}}
    other["knobs"] = other["knobs"] | {"teacher": ["/elsewhere/labels"]}
    assert len(compare.differences(options, other)) == 2


def test_long_curves_are_thinned_but_keep_the_last_point():
    records = [{"event": "step", "step": step, "loss": float(step)} for step in range(1, 1204)]
    columns = study_results.columns(records, "step")
    assert len(columns["step"]) <= study_results.POINTS
    assert columns["step"][-1] == columns["loss"][-1] == 1203
    assert study_results.columns([], "eval") == {}


def test_lines_of_a_plot_look_different():
    styles = [tuple(map(str, study_plots.look_of(number).values())) for number in range(24)]
    assert len(set(styles)) == 24


class TimedOut:
    """Stands for the process of a run that has saved shortly before its time limit."""

    words: ClassVar[list[list[str]]] = []
    returncode = 0

    def __init__(self, words, **_):
        self.words.append(words)

    def poll(self):
        return self.returncode

    terminate = wait = poll


def test_time_limit_is_passed_down_and_the_study_says_how_to_resume(tmp_path, monkeypatch):
    monkeypatch.setattr(runner.subprocess, "Popen", TimedOut)
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(time_limit, "_began", time.monotonic())
    TimedOut.words.clear()
    with pytest.raises(
        time_limit.TimeLimitReached, match=r"0 of 5 runs are over, .* run the same command again"
    ) as raised:
        funmatch.study(
            write_study(tmp_path, TINY.replace("[0, 1]", "[0]")), out=tmp_path / "out", jobs=1, time_limit="1h"
        )
    assert raised.value.exit_code == 0
    (words,) = TimedOut.words  # after one run had to stop, no other was begun
    left = int(words[words.index("--time-limit") + 1])
    assert 3000 < left < 3600
