"""Networks of image and text as teachers: runs from class names alone."""

import json

import pytest
from test_clip import VIT, write_open_clip

import funmatch
from funmatch.commands.networks.import_model import import_model
from funmatch.config import Import
from funmatch.errors import InputError
from funmatch.models.classifier import fingerprint, function_of
from funmatch.models.clip.class_texts import read_class_texts
from funmatch.models.load import load

STUDENT = {"student": "test_efficientnet", "side": 32, "batch": 4, "steps": 2, "eval_every": 2, "threads": 1}


@pytest.fixture(scope="module", name="clip")
def random_network(tmp_path_factory) -> str:
    return f"clip:{write_open_clip(tmp_path_factory.mktemp('models') / 'clip', VIT)}"


def test_a_run_from_class_names_alone(clip, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "names.txt").write_text("red thing\nblue_thing\n")
    teach = {"teacher": [clip], "classes_from": "names.txt", "templates": "none"}
    options = {"data": [str(images / "train")], "unlabelled": True, "out": "run", "tape": "tape", **STUDENT}
    run = funmatch.distill(**teach, **options)
    config = json.loads((run.folder / "student" / "config.json").read_text())
    assert config["label_names"] == ["red thing", "blue_thing"]
    knobs = json.loads((run.folder / "config.json").read_text())["knobs"]
    assert knobs["classes_from"] == str(tmp_path / "names.txt")
    # The same names elsewhere are the same teacher; other names are another, and another tape.
    (tmp_path / "moved.txt").write_text("red thing\nblue_thing\n")
    assert funmatch.distill(**teach | {"classes_from": "moved.txt"}, **options).folder == run.folder
    (tmp_path / "names.txt").write_text("red thing\ngreen thing\n")
    with pytest.raises(InputError, match="the teacher's content"):
        funmatch.distill(**teach, **options | {"tape": None})
    with pytest.raises(InputError, match="holds a tape with other options:\n  teacher:"):
        funmatch.distill(**teach, **options | {"out": "other"})
    (tmp_path / "names.txt").unlink()
    # An imported teacher is the same function, and needs no names.
    import_model(Import.checked(model=clip, classes_from="moved.txt", templates="none", out="teacher"))
    texts = read_class_texts("moved.txt", "none")
    first, again = load(clip, texts=texts), load("teacher")
    assert again.card.classes == texts.names
    assert fingerprint(first.net) == fingerprint(again.net)
    assert function_of(first) == function_of(again)


@pytest.mark.slow
def test_the_gate_judges_it_by_labels(clip, images, tmp_path):
    options = {
        "data": [str(images)],
        "teacher": [clip],
        "classes_from": "data",
        "templates": "short",
        "out": tmp_path / "run",
        **STUDENT,
    }
    with pytest.raises(InputError, match="is near chance: mean accuracy over classes"):
        funmatch.distill(**options)
    weak = funmatch.distill(**options, allow_weak_teacher=True)
    result = funmatch.evaluate(weak.folder)
    assert "agreement" in json.dumps(result)
    (tmp_path / "names.txt").write_text("ant\ncat\nbee\n")
    with pytest.raises(InputError, match=r"list different classes: bee ≠ cat|list different classes: cat ≠ bee"):
        funmatch.distill(**options | {"classes_from": str(tmp_path / "names.txt"), "out": tmp_path / "other"})
    evaluated = funmatch.evaluate(clip, data=[str(images)], classes_from="data", split="test")
    assert 0 <= evaluated["top1"] <= 1


def test_options_that_contradict_each_other(clip, images, tmp_path):
    options = {"data": [str(images)], "out": tmp_path / "run", **STUDENT}
    with pytest.raises(InputError, match="knows no classes by itself; name them with classes_from="):
        funmatch.distill(teacher=[clip], **options)
    with pytest.raises(InputError, match="classes_from is for networks of image and text"):
        funmatch.distill(teacher=["fashion-mini-teacher"], classes_from="data", **options)
    with pytest.raises(InputError, match="templates belong to classes_from"):
        funmatch.distill(teacher=[clip], templates="short", **options)
    with pytest.raises(InputError, match="cannot read the class names in"):
        funmatch.distill(teacher=[clip], classes_from="missing.txt", **options)
    with pytest.raises(InputError, match="has no classes to predict, only features; name them with"):
        funmatch.predict(clip, [images / "test"])
    with pytest.raises(InputError, match="pass a file with names"):
        funmatch.predict(clip, [images / "test"], classes_from="data")
