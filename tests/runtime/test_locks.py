"""Locks of files and folders, also on a drive that has none."""

import errno
import fcntl
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from funmatch.errors import InputError
from funmatch.runtime.disk import locks
from funmatch.runtime.disk.records import RecordFolder


@pytest.fixture(params=["ENOLCK", "EOPNOTSUPP", "ENOSYS"])
def _no_locks(request, monkeypatch):
    """A drive without locks, in a process that has not said so yet."""
    code = getattr(errno, request.param)

    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(locks, "_warned", set())


def open_job(folder: Path):
    place = RecordFolder(folder, "job.json", "job", {"options": dict})
    return place.opened({"options": {}}, lambda *_: [])


def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.usefixtures("_no_locks")
def test_drive_without_locks_is_named_once_and_one_process_uses_a_folder(tmp_path, capsys):
    with open_job(tmp_path / "run"):
        with pytest.raises(InputError) as error, open_job(tmp_path / "run"):
            pass
        assert str(error.value).startswith(f"another process (PID {os.getpid()}) is using {tmp_path / 'run'}; ")
        with open_job(tmp_path / "other"):
            pass
    with open_job(tmp_path / "run"):
        pass
    said = [line for line in capsys.readouterr().err.splitlines() if "WARNING" in line]
    assert len(said) == 1
    assert said[0].startswith(f"WARNING: the drive of {tmp_path / 'run'} has no locks (")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["job.json"]


@pytest.mark.usefixtures("_no_locks")
def test_mark_of_an_ended_process_is_taken_over(tmp_path):
    own, path = f"{locks._host()}\n{os.getpid()}\n", tmp_path / "job.json"
    for content in (f"{locks._host()}\n{ended_process()}\nany\n", f"{own}another start\n"):
        locks._mark_of(path).write_text(content)
        lock = locks.try_lock_file(path)
        assert lock
        assert locks.lock_owner(path) == os.getpid()
        assert locks.try_lock_file(path) is None
        lock.close()
    assert [each.name for each in tmp_path.iterdir()] == ["job.json"]


@pytest.mark.usefixtures("_no_locks")
@pytest.mark.parametrize(
    ("content", "words"), [("elsewhere pid:[1]\n7\n1 2\n", "PID 7 on elsewhere; if it has ended"), ("", "if it has")]
)
def test_mark_of_another_machine_stays_until_a_person_removes_it(tmp_path, content, words):
    with open_job(tmp_path):
        pass
    mark = tmp_path / ".job.json.owner.lock"
    mark.write_text(content)
    with pytest.raises(InputError) as error, open_job(tmp_path):
        pass
    assert f"another process ({words}" in str(error.value)
    assert f"remove {mark}) is using {tmp_path}" in str(error.value)
    mark.unlink()
    with open_job(tmp_path):
        pass


@pytest.mark.usefixtures("_no_locks")
def test_one_at_a_time_waits_for_the_lock_of_a_folder(tmp_path):
    """Each thread stands for a process; the first finds the mark of one that was killed."""
    locks._mark_of(tmp_path).write_text(f"{locks._host()}\n{ended_process()}\nany\n")
    inside, most = [], []

    def work():
        with locks.file_lock(tmp_path):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.01)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 6
    assert not list(tmp_path.iterdir())
