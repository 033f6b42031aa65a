"""An image size that comes from nowhere but timm's default is said to be a guess, wherever it is used."""

import json

import pytest
import timm
import torch

from funmatch.models.load import load

ARCHITECTURE = "test_efficientnet"
NOTE = "image size 160 is timm's default, not known from the file; set it with --side N"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "w.pt"
    torch.save(timm.create_model(ARCHITECTURE, num_classes=3).state_dict(), path)
    return path


def test_import_says_and_records_it(weights, tmp_path, images, funmatch):
    guessed = funmatch("import", ARCHITECTURE, "--weights", weights, "--out", "guessed")
    assert NOTE in guessed.stderr
    assert "side_known" not in guessed.stdout
    assert json.loads((tmp_path / "guessed" / "config.json").read_text())["funmatch"]["side_known"] is False
    assert not load(str(tmp_path / "guessed")).card.side_known
    given = funmatch("import", ARCHITECTURE, "--weights", weights, "--side", 64, "--out", "given", "--json")
    assert "timm's default" not in given.stderr
    assert json.loads(given.stdout)["side_known"] is True
    assert load(str(tmp_path / "given")).card.side_known
    # Imported again with a size, the folder knows it.
    assert "timm's default" not in funmatch("import", "guessed", "--side", 64, "--out", "again").stderr
    evaluated = ["evaluate", "guessed", "--data", images, "--batch", 4]
    first = funmatch(*evaluated)
    assert f"guessed: {NOTE}" in first.stderr
    assert f"for s in 128 160 224; do funmatch evaluate guessed --data {images} --side $s; done" in first.stderr
    named = funmatch("evaluate", ARCHITECTURE, "--weights", weights, "--data", images, "--batch", 4).stderr
    assert f"do funmatch evaluate {ARCHITECTURE} --weights {weights} --data {images} --side $s; done" in named
    assert "timm's default" not in funmatch(*evaluated, "--side", 64).stderr
    assert "timm's default" not in funmatch("evaluate", "given", "--data", images).stderr


def test_distillation_says_it_of_the_teacher(weights, images, funmatch):
    words = ["distill", "--data", images, "--teacher", ARCHITECTURE, "--teacher-weights", weights, "--student"]
    words += ["fashion-mini-student", "--side", 32, "--steps", 1, "--batch", 4, "--allow-weak-teacher", "--dry-run"]
    note = "its image size is not known from the file, so its views have the student's; set it with --teacher-side N"
    assert note in funmatch(*words, "--out", "run").stderr
    assert note not in funmatch(*words, "--teacher-side", 64, "--out", "run").stderr


def test_a_student_that_starts_from_a_file(weights, images, funmatch):
    words = ["train", "--data", images, "--student", ARCHITECTURE, "--student-weights", weights, "--steps", 1]
    words += ["--batch", 4, "--out", "run", "--dry-run"]
    assert NOTE in funmatch(*words).stderr
    assert "timm's default" not in funmatch(*words, "--side", 32).stderr


def test_a_tag_names_weights_whose_size_is_known(weights):
    assert not load(ARCHITECTURE, weights=weights).card.side_known
    assert load(f"{ARCHITECTURE}.r160_in1k", weights=weights).card.side_known
    assert load("resnet18").card.side_known, "without weights nothing has a size"
