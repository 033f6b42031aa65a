"""The benchmark of accelerators: each result is on the disk at once, whatever happens to the next part."""

import json
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
gpu = pytest.importorskip("gpu")


def test_parts_that_fail_or_take_too_long_are_results_and_the_next_ones_go_on(tmp_path):
    results = gpu.Results(tmp_path)

    def lines() -> list[dict]:
        return [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]

    def fail() -> None:
        results.add("first", figure=1.0)
        assert lines()[-1]["figure"] == 1.0, "on the disk before the next is measured"
        raise ValueError("no such kernel")

    def hang() -> None:
        with suppress(Exception):  # as where a compiler fails
            time.sleep(60)

    parts = [
        gpu.Part("fails", fail, 0.0, 60.0),
        gpu.Part("hangs", hang, 0.0, 0.2),
        gpu.Part("long", lambda: results.add("never"), 200.0, 400.0),
        gpu.Part("last", lambda: results.add("pairs", rate={"median": 2.0, "least": 1.0, "most": 3.0}), 0.0, 60.0),
    ]
    gpu.run(parts[:2], results, 60.0)
    gpu.run(parts[2:], results, 60.0)
    assert [line["part"] for line in lines()] == ["first", "failed", "ended", "skipped", "pairs"]
    failed, ended, skipped = lines()[1:4]
    assert (failed["name"], failed["why"]) == ("fails", "ValueError: no such kernel")
    assert (ended["name"], skipped["name"]) == ("hangs", "long")
    assert "|2 (1 … 3)|" in (tmp_path / "results.md").read_text()


def test_time_that_later_parts_need_is_kept_for_them(tmp_path):
    results = gpu.Results(tmp_path)
    parts = [gpu.Part("greedy", lambda: time.sleep(60), 0.1, 60.0), gpu.Part("later", lambda: None, 10.0, 20.0)]
    gpu.run(parts, results, 10.5)
    assert [line["name"] for line in results.lines] == ["greedy"], "ended after half a second, and the later part ran"
    assert results.lines[0]["part"] == "ended"
    assert results.lines[0]["at"] < 5
