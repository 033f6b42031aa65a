"""The record of a run names files so that it can be used from any directory."""

from pathlib import Path

import pytest

from funmatch.config import TAUGHT, Distill
from funmatch.config.metadata import Changes, Refers
from funmatch.training.defaults import ABSOLUTE, absolute_paths


def test_files_are_recorded_by_absolute_paths_and_words_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("photos/train/ant", "other", "runs/teacher", "sets"):
        Path(name).mkdir(parents=True)
    for name in ("weights.pt", "map.json", "names.txt", "student.pt"):
        Path(name).touch()
    Path("link.pt").symlink_to("weights.pt")
    config = Distill(
        data=("photos", "pet37", "tfrecord:shards/*"), eval_data=("other",), data_dir=Path("sets"),
        class_file=Path("names.txt"), teacher=("runs/teacher", "resnet50", "hf-hub:user/model"),
        teacher_weights=("link.pt", "none"), classes="map.json", student="resnet18", student_weights=Path("student.pt"),
        tape=Path("tape"), out=Path("run"), steps=1,
    )  # fmt: skip
    assert absolute_paths(config) == {
        "data": (str(tmp_path / "photos"), "pet37", f"tfrecord:{tmp_path}/shards/*"),
        "eval_data": (str(tmp_path / "other"),),
        "data_dir": tmp_path / "sets",
        "class_file": str(tmp_path / "names.txt"),
        "teacher": (str(tmp_path / "runs/teacher"), "resnet50", "hf-hub:user/model"),
        "teacher_weights": (str(tmp_path / "weights.pt"), "none"),
        "classes": str(tmp_path / "map.json"),
        "tape": tmp_path / "tape",
        "student": "resnet18",
        "student_weights": tmp_path / "student.pt",
    }
    other = config.model_copy(update={"classes": "same-names", "student_weights": None})
    assert absolute_paths(other)["classes"] == "same-names"
    assert "student_weights" not in absolute_paths(other)


@pytest.mark.parametrize("table", TAUGHT.values(), ids=lambda table: table.__name__)
def test_every_path_that_a_record_holds_says_what_it_names(table):
    # Of what commands around runs name, no record holds anything.
    assert set(ABSOLUTE) == {*Refers} - {Refers.IMAGES, Refers.MEASURED}
    assert {opt.refers for _, opt in table.opts()} <= {None, *ABSOLUTE}
    for name, field in table.model_fields.items():
        opt = table.opt(name)
        if Path in (field.annotation, *getattr(field.annotation, "__args__", ())) and opt.changes != Changes.PLACE:
            assert opt.refers, f"{name} is a path, and a run would record it relative"
