"""Damage in a run's folder is noticed before it matters, and mended where a checkpoint can."""

import json
import shutil
from pathlib import Path

import pytest
from bitflips import OPTIONS, attack, flip, make_unfinished, repeat, same_students, tries
from make_images import FEW
from safetensors.torch import load_file, save_file

import funmatch
from funmatch.config import Report
from funmatch.errors import InputError
from funmatch.reports.run_page import write_page
from funmatch.runtime.disk.checksums import MANIFEST, write_manifest
from funmatch.runtime.disk.json_files import seal
from funmatch.training.run import folder as run_folder

NEWEST = Path("checkpoints/step-000000006")


@pytest.fixture
def whole(tmp_path, finished_run) -> Path:
    """A run of six steps, saved at 4 and 6."""
    return finished_run(tmp_path / "whole", **OPTIONS).folder


@pytest.fixture
def unfinished(tmp_path, whole) -> Path:
    """The same run, killed after its last checkpoint."""
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    make_unfinished(folder)
    return folder


def edit_state(folder: Path, change) -> None:
    """Changes the state of the newest checkpoint, as one that an earlier version wrote: without checksums."""
    path = folder / NEWEST / "state.json"
    state = json.loads(path.read_text())
    state.pop("checksum")
    change(state)
    path.write_text(json.dumps(state))
    path.with_name(MANIFEST).unlink()


def set_nan(folder: Path) -> None:
    """Puts a NaN into the newest student, without checksums."""
    path = folder / NEWEST / "student.safetensors"
    tensors = load_file(path)
    next(each for each in tensors.values() if each.is_floating_point()).view(-1)[3] = float("nan")
    save_file(tensors, path)
    path.with_name(MANIFEST).unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        *[
            pytest.param(
                lambda folder, name=name: flip(folder / NEWEST / f"{name}.safetensors", 8 * 20_000 + 3),
                "does not match its checksum",
                marks=marks,
            )
            for name, marks in (("student", ()), ("optimizer", pytest.mark.slow), ("average", pytest.mark.slow))
        ],
        (lambda folder: flip(folder / NEWEST / "state.json", 99), "state.json does not match its checksum"),
        (lambda folder: edit_state(folder, lambda state: state.update(step=4)), "state.json says step 4"),
        pytest.param(
            lambda folder: edit_state(folder, lambda state: state.update(colour=1)),
            "unknown key 'colour'",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda folder: (folder / NEWEST / "average.safetensors").unlink(),
            "average.safetensors is missing",
            marks=pytest.mark.slow,
        ),
        (set_nan, "has a NaN"),
    ],
)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(unfinished, whole, damage, words):
    damage(unfinished)
    outcome, said = repeat(unfinished, OPTIONS)
    assert outcome == "ok"
    assert f"WARNING: {unfinished / NEWEST} is damaged" in said
    assert words in said
    assert "resuming from step 4 of 6" in said
    assert same_students(whole, unfinished)


def test_nothing_begins_anew_where_all_checkpoints_are_damaged(unfinished):
    for place in (unfinished / "checkpoints").glob("step-*"):
        flip(place / "student.safetensors", 8 * 20_000)
    files = {path: path.read_bytes() for path in (unfinished / "checkpoints").rglob("*.safetensors")}
    for _ in range(2):
        outcome, said = repeat(unfinished, OPTIONS)
        assert outcome == "refused"
        assert "no checkpoint in" in said
    assert {path: path.read_bytes() for path in files} == files
    with pytest.raises(InputError, match="no checkpoint in it can be read"):
        funmatch.evaluate(unfinished)


@pytest.mark.parametrize(
    "name",
    [
        "student/model.safetensors",
        pytest.param("student/config.json", marks=pytest.mark.slow),
        pytest.param("student-ema/model.safetensors", marks=pytest.mark.slow),
        "result.json",
    ],
)
def test_a_damaged_end_is_written_again_by_the_same_command(tmp_path, whole, name):
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    flip(folder / name, 8 * ((folder / name).stat().st_size // 2) + 1)
    outcome, said = repeat(folder, OPTIONS)
    assert outcome == "ok"
    assert f"WARNING: {folder / name}" in said
    assert "written again from its last checkpoint" in said
    assert same_students(whole, folder)
    assert (folder / "student/config.json").read_bytes() == (whole / "student/config.json").read_bytes()
    assert run_folder.Run(folder).result["top1"] == run_folder.Run(whole).result["top1"]
    assert "WARNING" not in repeat(folder, OPTIONS)[1]
    # Without a checkpoint the command would repeat the whole run.
    flip(folder / name, 8 * ((folder / name).stat().st_size // 2) + 1)
    shutil.rmtree(folder / "checkpoints")
    outcome, said = repeat(folder, OPTIONS)
    assert (outcome, "the last checkpoint, which could mend it, is gone" in said) == ("refused", True)


def test_a_damaged_student_is_used_by_nothing(tmp_path, whole):
    flip(whole / "student/model.safetensors", 8 * 20_000)
    for use in (
        lambda: funmatch.evaluate(whole),
        lambda: funmatch.export(whole, out=tmp_path / "export"),
        lambda: funmatch.distill(out=tmp_path / "next", **OPTIONS | {"teacher": whole}),
    ):
        with pytest.raises(InputError, match=r"does not match its checksum.*; start the command of its run again"):
            use()
    # A copy elsewhere, changed by its owner or without the manifest, is any model.
    copied = Path(shutil.copytree(whole / "student", tmp_path / "copied"))
    with pytest.raises(InputError, match=rf"copy the folder again, or remove {copied / MANIFEST} if you changed it"):
        funmatch.evaluate(copied, data=FEW)
    (copied / MANIFEST).unlink()
    funmatch.evaluate(copied, data=FEW)


def test_a_damaged_record_of_a_run_says_what_to_do(whole):
    path = whole / "config.json"
    text = path.read_text()
    path.write_text(text.replace('"log_every": 1', '"log_every": 3'))
    for use in (lambda: funmatch.distill(out=whole, **OPTIONS), lambda: funmatch.evaluate(whole)):
        with pytest.raises(InputError, match="do not match its checksum; if you changed them, remove its 'checksum'"):
            use()
    record = json.loads(text)
    path.write_text(json.dumps(seal(record)))
    assert repeat(whole, OPTIONS)[0] == "ok"
    del record["checksum"]  # as an earlier version wrote it
    path.write_text(json.dumps(record))
    assert repeat(whole, OPTIONS)[0] == "ok"


@pytest.mark.parametrize("damage", [*(pytest.param(each, marks=pytest.mark.slow) for each in ("flip", "gone")), "cut"])
def test_a_changed_log_is_said_by_the_command_and_on_the_page(whole, damage):
    log = whole / "metrics.jsonl"
    content = log.read_bytes()
    at = content.index(b'"loss": ') + 10  # a digit of a loss, which stays a number
    changed = content[:at] + (b"7" if content[at : at + 1] != b"7" else b"8") + content[at + 1 :]
    log.write_bytes({"flip": changed, "cut": content[: len(content) // 3], "gone": b""}[damage])
    assert f"WARNING: {log} was damaged or changed" in repeat(whole, OPTIONS)[1]
    assert "was damaged or changed; the curves may lack" in page_of(whole)
    make_unfinished(whole)
    assert f"WARNING: {log} was damaged or changed" in repeat(whole, OPTIONS)[1]


def page_of(folder: Path) -> str:
    write_page(Report(runs=(folder,)))
    return (folder / "report.html").read_text()


def test_a_student_may_lie_behind_a_link(tmp_path, whole, unfinished):
    big = tmp_path / "big"
    big.mkdir()
    shutil.copytree(whole / "student", big / "student")
    (big / ".student.partial").mkdir()
    (big / ".student.partial" / "half").touch()
    (unfinished / "student").symlink_to(big / "student")
    assert repeat(unfinished, OPTIONS)[0] == "ok"
    assert (unfinished / "student").is_symlink()
    assert same_students(whole, unfinished)
    assert [path.name for path in big.iterdir()] == ["student"]


def test_single_flipped_bits_are_never_silent(tmp_path, whole):
    check_flips(tmp_path, whole, 4)


@pytest.mark.slow
def test_many_flipped_bits_are_never_silent(tmp_path, whole):
    check_flips(tmp_path, whole, 120)


def check_flips(tmp_path: Path, whole: Path, count: int) -> None:
    for file, bit, finished in tries(whole, count, seed=1):
        outcome, said = attack(whole, tmp_path / "try", file, bit, OPTIONS, finished=finished)
        assert outcome not in ("silent", "traceback"), (file, bit, finished, said)


def best_of(folder: Path) -> Path:
    (best,) = (folder / "checkpoints").glob("best-*")
    return best


def test_a_damaged_best_student_is_copied_from_the_checkpoint_of_its_step(tmp_path, whole):
    best = best_of(whole)
    kept = whole / "checkpoints" / f"step-{best.name.rpartition('-')[2]}"
    if not kept.exists():  # the best came between two saves; any checkpoint of its step serves
        shutil.copytree(whole / NEWEST, kept)
        shutil.copy(best / "student.safetensors", kept)
        write_manifest(kept)
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    make_unfinished(folder)
    flip(best_of(folder) / "student.safetensors", 8 * 20_000 + 3)
    outcome, said = repeat(folder, OPTIONS)
    assert (outcome, "it is copied from" in said) == ("ok", True), said
    assert same_students(whole, folder)


def test_a_run_goes_on_without_a_best_student_that_nothing_can_find_again(tmp_path, whole):
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    make_unfinished(folder)
    best = best_of(folder)
    for place in (folder / "checkpoints").glob(f"step-{best.name.rpartition('-')[2]}"):
        shutil.rmtree(place)
    flip(best / "student.safetensors", 8 * 20_000 + 3)
    longer = OPTIONS | {"steps": OPTIONS["steps"]}
    outcome, said = repeat(folder, longer)
    assert outcome == "ok", said
    assert "no undamaged checkpoint has its best student" in said
    assert run_folder.Run(folder).result["step"] == OPTIONS["steps"]
    assert "WARNING" not in repeat(folder, longer)[1]
