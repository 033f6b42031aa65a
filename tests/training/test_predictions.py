"""Teachers' logits of validation images are predicted once, and remembered for runs with equal teachers and images."""

import json

import pytest
from make_images import FEW

import funmatch
from funmatch.training.evaluation import scoring
from funmatch.training.teachers import predictions

MINI = {
    "data": FEW, "teacher": "fashion-mini-teacher", "student": "fashion-mini-student", "batch": 16, "threads": 1,
    "device": "cpu", "seed": 3, "steps": 2,
}  # fmt: skip


@pytest.fixture(name="predicted")
def splits_that_teachers_predict(monkeypatch, tmp_path):
    """Remembers predictions of any length; holds the name of each split that a teacher predicts."""
    monkeypatch.setenv("FUNMATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(predictions, "LEAST_SECONDS", 0.0)
    found: list[str] = []
    original = scoring.predict

    def predict(model, split, view):
        if isinstance(model, predictions.MemberAnswers):
            found.append(split.name)
        return original(model, split, view)

    monkeypatch.setattr(scoring, "predict", predict)
    return found


def distill(tmp_path, name, **options):
    """Distils; returns the student's weights, and the records and the result of the run, without their times."""
    run = funmatch.distill(out=tmp_path / name, **MINI | options)
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    records = [line for line in map(json.loads, lines) if line["event"] in ("teacher", "eval")]
    result = {key: value for key, value in run.metrics.items() if key in ("top1", "kl", "agreement", "teacher")}
    return (run.folder / "student" / "model.safetensors").read_bytes(), records, result


def places(tmp_path):
    return sorted((tmp_path / "cache" / predictions.FOLDER).glob("*/logits.npy"))


def test_a_run_with_an_equal_teacher_predicts_nothing_again(predicted, tmp_path):
    first = distill(tmp_path, "first")
    assert predicted == ["val", "test"], "the test split is predicted at the end, and not remembered"
    assert len(places(tmp_path)) == 1
    predicted.clear()
    assert distill(tmp_path, "second") == first
    assert predicted == ["test"]


def test_other_views_and_damage_are_predicted(predicted, tmp_path):
    first = distill(tmp_path, "first")
    for number, options in enumerate(({"eval_resize": 40}, {"batch": 8}, {"temperature": 3.0})):
        predicted.clear()
        distill(tmp_path, f"{number}", **options)
        assert predicted.count("val") == (number < 2), options
    assert len(places(tmp_path)) == 3
    for place in places(tmp_path):
        content = bytearray(place.read_bytes())
        content[-1] ^= 1
        place.write_bytes(content)
    predicted.clear()
    assert distill(tmp_path, "damaged") == first
    assert predicted.count("val") == 1


def test_the_teachers_of_an_ensemble_are_remembered_one_by_one(predicted, tmp_path):
    distill(tmp_path, "first")
    predicted.clear()
    both = {"teacher": ("fashion-mini-teacher",) * 2, "teacher_share": (1.0, 3.0)}
    first = distill(tmp_path, "both", **both)
    assert predicted.count("val") == 0
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("FUNMATCH_CACHE", str(tmp_path / "empty"))
        assert distill(tmp_path, "computed", **both) == first


def test_code_of_the_user_is_asked_in_each_run(predicted, tmp_path):
    teacher = funmatch.load("fashion-mini-teacher")
    for name in "ab":
        predicted.clear()
        distill(tmp_path, name, teacher=teacher)
        assert predicted.count("val") == 1
    assert not places(tmp_path)


def test_logits_that_are_not_finite_are_not_kept(predicted, tmp_path, monkeypatch):
    original = scoring.predict
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "predict", lambda *given: original(*given) * float("nan"))
        with pytest.raises(funmatch.InputError, match="not finite"):
            distill(tmp_path, "broken")
    assert predicted == ["val"]
    assert not places(tmp_path)


def test_a_cache_that_cannot_be_written_costs_time_alone(predicted, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / predictions.FOLDER).write_text("in the way")
    assert distill(tmp_path, "first") == distill(tmp_path, "second")
    assert predicted.count("val") == 2
