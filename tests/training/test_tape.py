"""Tapes (stored teacher logits): rows are exact or rejected, and a replayed student equals the recorded one."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from make_images import FEW
from safetensors.torch import load_file

import funmatch
from funmatch.commands import tape as tape_command
from funmatch.config import Tape as TapeOptions
from funmatch.errors import InputError, WorkFailed
from funmatch.models.ensemble import TeacherEnsemble
from funmatch.runtime.disk.json_files import seal
from funmatch.runtime.disk.locks import try_lock_file
from funmatch.training.run import folder as run_folder
from funmatch.training.teachers import tape
from funmatch.training.teachers.tape import Layout

OPTIONS = {
    "data": FEW, "teacher": "fashion-mini-teacher", "student": "fashion-mini-student", "steps": 14,
    "batch": 32, "threads": 1, "log_every": 2, "eval_every": 7, "save_every": 5, "lr": 0.01,
}  # fmt: skip


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "student" / "model.safetensors")


def same_weights(first, second) -> bool:
    one, other = weights(first), weights(second)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def random_logits(count: int, classes: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 4, (count, classes)).astype(np.float32))


def open_new_tape(folder, layout: Layout, **key_changes) -> tape.Tape:
    key = {"seed": 0, "batch": layout.batch, "side": 28, "crop": "mild"} | key_changes
    provenance = {"device": "cpu", "forms": [], "run": {"teacher": [], "data": []}}
    found = tape.open_tape(folder, layout, key, provenance)
    found.recording = True
    return found


@pytest.fixture
def teacher_calls(monkeypatch):
    """Counts forward passes of teachers."""
    counter = SimpleNamespace(count=0)
    original = TeacherEnsemble.forward

    def forward(self, views, temperature=1.0):
        counter.count += 1
        return original(self, views, temperature)

    monkeypatch.setattr(TeacherEnsemble, "forward", forward)
    return counter


def test_full_logits_are_stored_in_half_precision(tmp_path):
    layout, logits = Layout(4, 7), random_logits(8, 7)
    found = open_new_tape(tmp_path, layout)
    for step in (0, 1):
        found.write(step, 0, *layout.packed(logits[4 * step : 4 * step + 4]))
    expected = logits.numpy().astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(torch.cat([found.read(0, 0, 4), found.read(1, 0, 4)]).numpy(), expected)
    np.testing.assert_array_equal(found.read(1, 1, 2).numpy(), expected[5:7])
    assert found.read(2, 0, 4) is None
    assert (tmp_path / "answers.bin").stat().st_size == 8 * (7 * 2 + 4) == layout.bytes_of(2)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_classes_beyond_the_top_are_stored_as_one_probability(temperature):
    top, classes = 3, 12
    layout = Layout(1, classes, top, temperature)
    teacher_logits, student = random_logits(50, classes), random_logits(50, classes, 1)
    stored = layout.unpacked(*layout.packed(teacher_logits))

    def probabilities(logits, order):
        """Of the teacher's top classes, and of all others together, in double precision."""
        each = logits.double().numpy() / temperature
        each = np.exp(each - each.max(1, keepdims=True))
        each = np.take_along_axis(each / each.sum(1, keepdims=True), order, 1)
        return np.concatenate([each[:, :top], each[:, top:].sum(1, keepdims=True)], 1)

    order = np.argsort(-teacher_logits.numpy(), 1)
    teacher, student_probabilities = probabilities(teacher_logits, order), probabilities(student, order)
    np.testing.assert_allclose(probabilities(stored, order), teacher, atol=2e-3)
    narrow = tape.fold_dropped_classes(student, stored, top, temperature)
    np.testing.assert_allclose((narrow[0] / temperature).softmax(-1).numpy(), student_probabilities, atol=1e-6)
    np.testing.assert_allclose((narrow[1] / temperature).softmax(-1).numpy(), teacher, atol=2e-3)
    kl = (teacher * np.log(teacher / student_probabilities)).sum(1)
    complete = (teacher_logits.double() / temperature).softmax(-1)
    other = (student.double() / temperature).softmax(-1)
    assert (kl <= (complete * (complete / other).log()).sum(-1).numpy() + 1e-9).all(), (
        "merging classes can only lower the KL divergence"
    )
    mass = tape.dropped_mass(teacher_logits, top, temperature)
    assert mass == pytest.approx(teacher[:, -1].mean(), abs=1e-6)


def test_logits_too_large_for_half_precision_are_rejected(tmp_path):
    found = open_new_tape(tmp_path, Layout(1, 2))
    with pytest.raises(InputError, match="65,504"):
        found.write(0, 0, *found.layout.packed(torch.tensor([[1e5, 0.0]])))


@pytest.mark.parametrize("top", [None, 2])
def test_truncated_and_damaged_rows_are_not_read(tmp_path, top):
    layout = Layout(3, 5, top)
    found = open_new_tape(tmp_path, layout)
    for step in range(6):
        found.write(step, 0, *layout.packed(random_logits(3, 5, step)))
    complete = (tmp_path / "answers.bin").read_bytes()
    size = layout.row.itemsize
    expected = [found.read(step, 0, 3) for step in range(6)]
    rng = np.random.default_rng(0)
    for _ in range(60):
        content = bytearray(complete)
        kind = rng.integers(3)
        if kind == 0:  # truncated
            bad = int(rng.integers(len(content)))
            del content[bad:]
            lost = set(range(bad // (3 * size), 6))
        elif kind == 1:  # a flipped bit
            bad = int(rng.integers(len(content)))
            content[bad] ^= 1 << int(rng.integers(8))
            lost = {bad // (3 * size)}
        else:  # a row copied over another
            one, other = rng.choice(18, 2, replace=False)
            content[one * size : (one + 1) * size] = complete[other * size : (other + 1) * size]
            lost = {int(one) // 3}
        (tmp_path / "answers.bin").write_bytes(content)
        for step in range(6):
            logits = found.read(step, 0, 3)
            assert (logits is None) == (step in lost)
            assert logits is None or torch.equal(logits, expected[step])
        rows, damaged, ranges = found.counts()
        assert [step for each in ranges for step in each] == sorted(set(range(6)) - lost)
        if kind:
            assert (rows, damaged) == (17, 1)


def test_holes_are_not_damage(tmp_path):
    layout = Layout(2, 3)
    found = open_new_tape(tmp_path, layout)
    for step in (0, 3, 4):
        found.write(step, 0, *layout.packed(random_logits(2, 3)))
    found.write(6, 1, *layout.packed(random_logits(1, 3)))  # another process has yet to write the first row
    assert found.counts() == (7, 0, [range(1), range(3, 5)])
    assert found.read(6, 0, 2) is None
    assert found.read(6, 1, 1) is not None


@pytest.mark.parametrize(
    "more",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"teacher_ahead": True}, marks=pytest.mark.slow),
        pytest.param({"micro_batch": 12}, marks=pytest.mark.slow),
        pytest.param({"strategy": "ind/ic"}, marks=pytest.mark.slow),
        pytest.param({"mixup_mode": "image", "cutmix": 1.0, "randaugment": (1, 5)}, marks=pytest.mark.slow),
        pytest.param({"policy": ("cutmix=1", "randaugment=1 5"), "micro_batch": 5}, marks=pytest.mark.slow),
        {"tape_top": 3, "temperature": 2.0},
        {"teacher": ("fashion-mini-teacher", "fashion-mini-teacher"), "teacher_side": (32, 40), "temperature": 2.0,
         "combine": "mean-probabilities"},
    ],
    ids=["plain", "ahead", "pieces", "own", "mixed", "policies", "top", "two"],
)  # fmt: skip
def test_replayed_run_equals_the_recorded_run(tmp_path, teacher_calls, more):
    options = OPTIONS | more
    live = funmatch.distill(out=tmp_path / "live", tape=tmp_path / "tape", **options)
    before = teacher_calls.count
    replayed = funmatch.distill(out=tmp_path / "again", tape=tmp_path / "tape", **options)
    replay_calls = teacher_calls.count - before
    assert same_weights(live.folder, replayed.folder)
    strip = ("seconds", "run", "report")
    assert {k: v for k, v in replayed.figures.items() if k not in strip} == {
        k: v for k, v in live.figures.items() if k not in strip
    }
    # The teacher is still needed on validation and test images, and on views of steps after the last.
    assert before - replay_calls >= 14 - 1
    losses = [
        [each["loss"] for each in run_folder.find_run(run.folder).metrics.read() if each["event"] == "step"]
        for run in (live, replayed)
    ]
    assert losses[0] == losses[1]


def test_another_students_replay_equals_its_own_recording(tmp_path, recorded):
    """A student replaying another student's tape equals the same student recording its own."""
    small = {"student": "resnet10t", "student_kwargs": ("channels=8,8,16,16", "stem_width=8"), "lr": 0.003, "side": 32}
    shutil.copytree(recorded / "tape", tmp_path / "tape")
    from_shared = funmatch.distill(out=tmp_path / "taken", tape=tmp_path / "tape", **OPTIONS | small)
    from_own = funmatch.distill(out=tmp_path / "own", tape=tmp_path / "other", **OPTIONS | small)
    assert same_weights(from_shared.folder, from_own.folder)
    assert (tmp_path / "tape" / "answers.bin").read_bytes() == (tmp_path / "other" / "answers.bin").read_bytes()


def test_longer_run_extends_the_tape(tmp_path, teacher_calls, recorded):
    shutil.copytree(recorded / "tape", tmp_path / "tape")
    before = teacher_calls.count
    funmatch.distill(out=tmp_path / "long", tape=tmp_path / "tape", **OPTIONS | {"steps": 20})
    assert tape.find_tape(tmp_path / "tape").counts()[2] == [range(20)]
    alone = funmatch.distill(out=tmp_path / "alone", tape=tmp_path / "alone-tape", **OPTIONS | {"steps": 20})
    assert teacher_calls.count - before > 20 - 14
    assert same_weights(tmp_path / "long", alone.folder)


@pytest.mark.slow
def test_killed_recording_resumes_and_changes_no_bit(tmp_path):
    """Killed at random times while recording, the run and the tape equal those of an uninterrupted run."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items() if name != "steps"]
    command = [sys.executable, "-m", "funmatch", "distill", *options, "--steps=150"]
    complete = funmatch.distill(out=tmp_path / "whole", tape=tmp_path / "whole-tape", **OPTIONS | {"steps": 150})
    killed = 0
    for _ in range(4):
        process = subprocess.Popen(
            [*command, f"--out={tmp_path / 'run'}", f"--tape={tmp_path / 'tape'}"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        path, before = tmp_path / "tape" / "answers.bin", tape_size(tmp_path)
        until = time.monotonic() + 60
        while tape_size(tmp_path) <= before and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        if path.is_file():
            with open(path, "r+b") as file:  # as if a power loss took the last writes
                file.truncate(max(0, path.stat().st_size - 7))
    assert killed
    funmatch.distill(out=tmp_path / "run", tape=tmp_path / "tape", **OPTIONS | {"steps": 150})
    assert same_weights(tmp_path / "run", complete.folder)
    # Rows lost after their step was trained are missing until another run fills the gap.
    ranges = tape.find_tape(tmp_path / "tape").counts()[2]
    assert sum(map(len, ranges)) >= 150 - killed
    third = funmatch.distill(out=tmp_path / "third", tape=tmp_path / "tape", **OPTIONS | {"steps": 150})
    assert same_weights(third.folder, complete.folder)
    assert (tmp_path / "tape" / "answers.bin").read_bytes() == (tmp_path / "whole-tape" / "answers.bin").read_bytes()


def tape_size(folder) -> int:
    path = folder / "tape" / "answers.bin"
    return path.stat().st_size if path.is_file() else 0


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded")
    funmatch.distill(out=folder / "run", tape=folder / "tape", **OPTIONS)
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed: 0 on the tape, 1 now"),
        ({"batch": 4}, "batch: 32 on the tape, 4 now"),
        ({"mixup_mode": "image"}, "mixup: "),
        ({"strategy": "same/ic"}, "mixup: "),
        ({"strategy": "same/rc"}, "crop: inception on the tape, mild now"),
        ({"strategy": "ind/ic"}, "teacher_sees: the student's on the tape, its own view now"),
        ({"crop_min_area": 0.3}, "min_area: 0.05 on the tape, 0.3 now"),
        ({"side": 40}, "side: 32 on the tape, 40 now"),
        ({"data": (FEW, FEW)}, "images: "),
        ({"tape_top": 3}, "top: not set on the tape, 3 now"),
        ({"teacher_precision": "fp32"}, "teacher_precision: auto on the tape, fp32 now"),
    ],
)
def test_tape_of_other_options_is_refused(recorded, tmp_path, change, message):
    content = (recorded / "tape" / "answers.bin").read_bytes()
    with pytest.raises(InputError, match=f"holds a tape with other options:\n(.*\n)*.*{message}"):
        funmatch.distill(out=tmp_path / "run", tape=recorded / "tape", **OPTIONS | change)
    assert not (tmp_path / "run").exists()
    assert (recorded / "tape" / "answers.bin").read_bytes() == content


def test_tape_of_another_teacher_is_refused(recorded, tmp_path):
    with pytest.raises(InputError, match="teacher: "):
        funmatch.distill(
            out=tmp_path / "run", tape=recorded / "tape",
            **OPTIONS | {"teacher": recorded / "run", "allow_weak_teacher": True},
        )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strategy": "fix/ic_ens", "tape": "t"}, "is fixed: its outputs are stored anyway"),
        ({"tape_top": 3}, "tape_top belongs to tape"),
        ({"tape_full": "go-on"}, "tape_full belongs to tape"),
        ({"tape": "t", "tape_top": 0}, "tape_top must be at least 1"),
        ({"tape": "t", "tape_top": 3, "distance": "l2"}, "needs all of the teacher's logits"),
        ({"tape": "t", "tape_top": 3, "standardise": True}, "standardise needs all of the teacher's logits"),
        ({"tape": "t", "tape_top": 9}, r"tape_top \(9\) must leave some of 10 classes"),
        ({"tape": "run"}, "must be apart"),
        ({"tape": "run/tape"}, "must be apart"),
        ({"tape": "."}, "must be apart"),
    ],
)
def test_contradictory_tape_options_are_rejected(tmp_path, change, message):
    change = {name: tmp_path / value if name == "tape" else value for name, value in change.items()}
    with pytest.raises(InputError, match=message):
        funmatch.distill(out=tmp_path / "run", **OPTIONS | change)
    assert not any(tmp_path.iterdir()), "a rejected run leaves no files"


def test_run_that_started_without_a_tape_cannot_resume_with_one(recorded, tmp_path, finished_run):
    finished_run(tmp_path / "run", **OPTIONS)
    with pytest.raises(InputError, match="the teacher's outputs, as tape rounds them: not set in the run, fp16 now"):
        funmatch.distill(out=tmp_path / "run", tape=recorded / "tape", **OPTIONS)
    shutil.copytree(recorded, tmp_path / "moved")
    funmatch.distill(out=tmp_path / "moved" / "run", tape=tmp_path / "moved" / "tape", **OPTIONS)


def test_folders_without_a_valid_tape_are_rejected(recorded, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").write_text("")
    with pytest.raises(InputError, match="exists and is not a tape"):
        funmatch.distill(out=tmp_path / "run", tape=tmp_path / "full", **OPTIONS)
    with pytest.raises(InputError, match="is not a tape"):
        tape_command.run(TapeOptions.checked(folder=tmp_path))
    shutil.copytree(recorded / "tape", tmp_path / "tape")
    header = tmp_path / "tape" / "tape.json"
    for content in ("{", "[]", json.dumps({"format": 1})):
        header.write_text(content)
        with pytest.raises(InputError, match="damaged"):
            funmatch.distill(out=tmp_path / "run", tape=tmp_path / "tape", **OPTIONS)
    valid = json.loads((recorded / "tape" / "tape.json").read_text())
    for part, name in (("layout", "batch"), ("layout", "classes"), ("asked", "seed")):
        header.write_text(json.dumps(seal(valid | {part: valid[part] | {name: valid[part][name] + 1}})))
        with pytest.raises(InputError, match="damaged"):
            tape.find_tape(tmp_path / "tape")
    header.write_text(json.dumps(seal(json.loads((recorded / "tape" / "tape.json").read_text()) | {"format": 99})))
    with pytest.raises(InputError, match="format 99"):
        tape.find_tape(tmp_path / "tape")


def test_rows_of_another_tape_are_not_read(recorded, tmp_path):
    other = open_new_tape(tmp_path / "other", Layout(32, 10), seed=1)
    for step in range(14):
        other.write(step, 0, *other.layout.packed(random_logits(32, 10, step)))
    shutil.copytree(recorded / "tape", tmp_path / "tape")
    shutil.copy(tmp_path / "other" / "answers.bin", tmp_path / "tape")
    found = tape.find_tape(tmp_path / "tape")
    assert found.counts() == (0, 448, [])
    assert found.read(0, 0, 32) is None
    header = json.loads((tmp_path / "other" / "tape.json").read_text())
    del header["check"]  # as on older tapes
    (tmp_path / "other" / "tape.json").write_text(json.dumps(seal(header)))
    older = open_new_tape(tmp_path / "older", Layout(32, 10), seed=1)
    older.header.pop("check")
    older.write(0, 0, *older.layout.packed(random_logits(32, 10)))
    assert older.read(0, 0, 32) is not None


@pytest.mark.parametrize("full", ["stop", "go-on"])
def test_full_disk_stops_or_ends_recording(tmp_path, monkeypatch, full):
    original, positions = os.pwrite, []

    def pwrite(handle, content, position):
        if len(positions) == 6:
            original(handle, content[:5], position)  # the part that still fits
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        positions.append(position)
        return original(handle, content, position)

    options = OPTIONS | {"tape": tmp_path / "tape", "tape_full": full}
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        if full == "stop":
            with pytest.raises(OSError, match="No space") as error:
                funmatch.distill(out=tmp_path / "run", **options)
            assert error.value.filename == str(tmp_path / "tape" / "answers.bin")
        else:
            funmatch.distill(out=tmp_path / "run", **options)
    found = tape.find_tape(tmp_path / "tape")
    assert found.counts()[2] == [range(6)]
    run = funmatch.distill(out=tmp_path / "run", **options)
    other = funmatch.distill(out=tmp_path / "other", **OPTIONS | {"tape": tmp_path / "tape"})
    assert same_weights(run.folder, other.folder)
    assert found.counts()[2] == [range(14)]


def test_too_little_disk_space_is_reported_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match=r"the tape of 14 steps needs 10\.8 kB more in .* where 1\.0 kB are free"):
        funmatch.distill(out=tmp_path / "run", tape=tmp_path / "tape", **OPTIONS)


def test_second_run_reads_a_tape_that_is_being_recorded(tmp_path, recorded):
    """One run records; the other reads what is there and computes the rest with the teacher."""
    layout = Layout(32, 10)
    shutil.copytree(recorded / "tape", tmp_path / "tape")
    lock = try_lock_file(tmp_path / "tape" / ".lock")
    longer = OPTIONS | {"steps": 20}
    run = funmatch.distill(out=tmp_path / "second", tape=tmp_path / "tape", **longer)
    assert tape.find_tape(tmp_path / "tape").counts()[2] == [range(14)], "the second run did not record"
    lock.close()
    assert same_weights(run.folder, funmatch.distill(out=tmp_path / "third", tape=tmp_path / "tape", **longer).folder)
    assert (tmp_path / "tape" / "answers.bin").stat().st_size == layout.bytes_of(20)


def test_tape_command_checks_rows_against_the_teacher(recorded, tmp_path, capsys):
    shutil.copytree(recorded / "tape", tmp_path / "tape")
    found = tape_command.run(TapeOptions.checked(folder=tmp_path / "tape", recompute=3))
    metrics = found.metrics
    assert (metrics["steps"], metrics["rows"], metrics["damaged"], metrics["recomputed"]) == (14, 448, 0, 3)
    assert metrics["kl"] < 1e-6
    assert metrics["agreement"] == 1
    tape_command.show(found)
    assert "0 … 13" in capsys.readouterr().out
    # Valid rows at their places, but with other logits.
    found = tape.find_tape(tmp_path / "tape")
    found = replace(found, recording=True, _file=None)
    for step in range(14):
        found.write(step, 0, *found.layout.packed(random_logits(32, 10, step)))
    with pytest.raises(WorkFailed, match="the teacher's logits now differ from those in"):
        tape_command.show(tape_command.run(TapeOptions.checked(folder=tmp_path / "tape", recompute=2)))
    content = bytearray((tmp_path / "tape" / "answers.bin").read_bytes())
    content[40] ^= 1
    (tmp_path / "tape" / "answers.bin").write_bytes(content)
    with pytest.raises(WorkFailed, match=r"1 rows of .* are damaged"):
        tape_command.show(tape_command.run(TapeOptions.checked(folder=tmp_path / "tape")))
