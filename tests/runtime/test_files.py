"""Files that are complete or absent, whatever processes that were killed have left."""

import errno
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

from funmatch.runtime.disk.files import open_atomically, write_atomically
from funmatch.runtime.disk.partials import ABANDONED_SECONDS, PARTIAL, remove_abandoned, scratch_folder


def test_what_a_killed_process_left_is_removed_by_the_next_that_writes_the_file(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from funmatch.runtime.disk.files import open_atomically\n"
        "with open_atomically(Path(sys.argv[1])) as file: file.write(b'half'); file.flush(); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "a.json"], check=False)
    assert [path.name.endswith(PARTIAL) for path in tmp_path.iterdir()] == [True]
    write_atomically(tmp_path / "b.json", "other")
    assert len([*tmp_path.iterdir()]) == 2
    write_atomically(tmp_path / "a.json", "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "b.json"}
    assert (tmp_path / "a.json").read_text() == "whole"


def test_what_another_writes_at_the_same_time_is_left_alone(tmp_path):
    with open_atomically(tmp_path / "a") as one:
        one.write(b"one")
        with open_atomically(tmp_path / "a") as two:
            two.write(b"two")
        assert (tmp_path / "a").read_bytes() == b"two"
    assert (tmp_path / "a").read_bytes() == b"one"
    assert os.listdir(tmp_path) == ["a"]


def test_a_file_is_nobodys_to_clear_until_it_has_its_name(tmp_path, monkeypatch):
    replace = Path.replace

    def replace_later(self, target):
        remove_abandoned(tmp_path, ".a.")  # as another that writes the same file does first of all
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", replace_later)
    write_atomically(tmp_path / "a", "whole")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "whole"}


def test_scratch_folders_of_others_are_left_alone_while_they_work(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from funmatch.runtime.disk.partials import scratch_folder\n"
        "with scratch_folder(Path(sys.argv[1]), 'work') as folder: (folder / 'a').write_text(''); os._exit(9)"
    )
    (tmp_path / "mine.partial").mkdir()
    with scratch_folder(tmp_path, "work") as one:
        subprocess.run([sys.executable, "-c", code, tmp_path], check=False)
        assert len([*tmp_path.glob(f".work.*{PARTIAL}")]) == 2
        with scratch_folder(tmp_path, "work") as two:
            assert {*tmp_path.glob(f".work.*{PARTIAL}")} == {one, two}
        assert one.is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["mine.partial"]


def test_without_locks_only_what_nobody_has_changed_for_a_day_is_removed(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    old, young, other = (tmp_path / f".{name}.partial" for name in ("a.json.old", "a.json.young", "b.json.old"))
    for path in (old, young, other):
        path.write_text("half")
    for path in (old, other):
        os.utime(path, (time.time() - ABANDONED_SECONDS - 60,) * 2)
    write_atomically(tmp_path / "a.json", "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", young.name, other.name}
