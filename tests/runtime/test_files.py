"""Files that are complete or absent, whatever processes that were killed have left."""

import os
import subprocess
import sys

from funmatch.runtime.disk.files import PARTIAL, open_atomically, write_atomically


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
