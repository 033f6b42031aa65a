"""What is evaluated during training: held-out images by one rule for all commands, and never the test images."""

import json

import pytest
from make_images import paint

import funmatch
from funmatch.data.cache.open_cache import open_cache
from funmatch.errors import InputError
from funmatch.runtime.disk.json_files import seal
from funmatch.training.evaluation import scoring, subject
from funmatch.training.run import folder as run_folder

TINY = {"student": "fashion-mini-student", "steps": 4, "batch": 16, "eval_every": 2, "side": 16, "threads": 1}
TEACHER = {"teacher": "fashion-mini-teacher", "allow_weak_teacher": True, "unlabelled": True}


def write_images(root, **counts):
    for s, (split, count) in enumerate(counts.items()):
        for c, name in enumerate(("ant", "bee")):
            for i in range(count):
                paint(root / split / name / f"{i:02}.png", 1000 * s + 100 * c + i)
    return root


def splits_of(run, event="eval") -> set[str]:
    return {each["split"] for each in run_folder.Run(run.folder).metrics.read() if each["event"] == event}


@pytest.mark.parametrize("verb", ["train", "finetune", "distill"])
def test_a_tenth_is_held_out_and_test_is_evaluated_once(verb, tmp_path, capfd):
    data = write_images(tmp_path / "images", train=20, test=3)
    options = TINY | (TEACHER if verb == "distill" else {})
    run = getattr(funmatch, verb)(data=data, out=tmp_path / "run", **options)
    said = capfd.readouterr().err
    assert "images has no validation split: holding out 10% of the training images (4 of 40)" in said
    assert "--val none trains on all" in said
    assert splits_of(run) == {"val"}
    assert splits_of(run, "teacher") <= {"val"}
    assert (run.figures["split"], run.figures["pictures"]) == ("test", 6)
    assert "held_out_of" not in run.figures
    config = run_folder.find_run(run.folder).config
    assert config["facts"]["pictures"] == {"train": 36, "val": 4, "test": 6}
    assert config["knobs"]["val"] == "10%"
    again = getattr(funmatch, verb)(data=data, out=tmp_path / "run", **options)
    assert again.figures == run.figures


def test_without_a_test_split_the_held_out_images_are_reported_by_that_name(tmp_path, funmatch):
    data = write_images(tmp_path / "images", train=20)
    words = [word for name, value in TINY.items() for word in (f"--{name.replace('_', '-')}", value)]
    result = funmatch("train", "--data", data, *words, "--out", "run")
    assert "run on 4 images of val, held out of 40" in result.stdout
    assert "val, 4 of 40 training images" in (tmp_path / "run" / "report.html").read_text()
    assert json.loads(funmatch("evaluate", "run", "--json").stdout)["held_out_of"] == 40
    dry = funmatch("train", "--data", data, *words, "--out", "other", "--dry-run", "--json")
    assert json.loads(dry.stdout)["splits"] == {"train": 36, "val": 4}
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("test", [0, 3])
def test_metrics_of_training_images_have_that_name(test, tmp_path, capfd):
    data = write_images(tmp_path / "images", train=20, **({"test": test} if test else {}))
    run = funmatch.train(data=data, val="none", keep="best", out=tmp_path / "run", **TINY)
    assert "WARNING: --val none: nothing is held out" in capfd.readouterr().err
    assert splits_of(run) == {"training images"}
    assert run.figures["split"] == ("test" if test else "training images")
    assert run.figures["best_step"] is None, "training images cannot tell which weights are best"
    knobs = run_folder.find_run(run.folder).config["knobs"]
    assert (knobs["val"], knobs["keep"]) == ("none", "last")
    card = json.loads((run.student / "config.json").read_text())["funmatch"]
    assert card["top1"] == (run.top1 if test else None), "a card promises what holds for other images"
    page = run.page.read_text()
    assert "training images" in page
    assert "best checkpoint" not in page
    with pytest.raises(InputError, match="val: none in the run, 10% now"):
        funmatch.train(data=data, out=tmp_path / "run", **TINY)


def test_all_images_of_a_data_set_with_its_own_validation_split_are_as_before(images, tmp_path, capfd):
    run = funmatch.train(data=images, val="none", out=tmp_path / "run", **TINY)
    assert "WARNING: --val none" not in capfd.readouterr().err
    assert splits_of(run) == {"val"}
    assert funmatch.train(data=images, out=tmp_path / "run", **TINY).figures == run.figures


def earlier_run(folder):
    """Change a run to one of the version before the rule, which held nothing out and recorded no `val`."""
    config = json.loads((folder / "config.json").read_text())
    config["knobs"]["val"] = None
    (folder / "config.json").write_text(json.dumps(seal(config)))
    (folder / "result.json").unlink()


@pytest.mark.parametrize("options", [{}, {"val": "none"}])
def test_runs_of_earlier_versions_resume_as_they_began(options, tmp_path, capfd):
    data = write_images(tmp_path / "images", train=20, test=3)
    whole = funmatch.train(data=data, val="none", out=tmp_path / "run", **TINY)
    weights = (whole.student / "model.safetensors").read_bytes()
    earlier_run(whole.folder)
    checkpoints = whole.folder / "checkpoints"
    for path in (whole.folder / "metrics.jsonl", *checkpoints.iterdir()):  # as if killed before the first step
        path.unlink() if path.is_file() else [each.unlink() for each in path.iterdir()] and path.rmdir()
    capfd.readouterr()
    run = funmatch.train(data=data, out=tmp_path / "run", **TINY, **options)
    assert "holding out" not in capfd.readouterr().err
    assert splits_of(run) == {"test"}, "as that version evaluated it"
    assert (run.student / "model.safetensors").read_bytes() == weights
    assert run_folder.find_run(run.folder).config["facts"]["pictures"] == {"train": 40, "test": 6}


def test_students_side_by_side_hold_out_the_same_images_or_are_refused(tmp_path):
    from funmatch.commands.verbs import run_students
    from funmatch.config import Distill

    data = write_images(tmp_path / "images", train=20)
    plain = {name: value for name, value in TINY.items() if name != "student"} | TEACHER
    students = ("fashion-mini-student", "resnet10t")
    config = Distill.checked(data=data, student=students[0], out=tmp_path / "many", **plain)
    for run in run_students(config, students):
        assert (run.metrics["split"], run.metrics["held_out_of"]) == ("val", 40)
        assert splits_of(run) == {"val"}
    earlier_run(tmp_path / "many" / "resnet10t")
    with pytest.raises(InputError, match="resnet10t began without a validation split"):
        run_students(config, students)


def test_other_data_without_a_validation_split_is_not_watched(tmp_path, capfd):
    other = write_images(tmp_path / "other", test=4)
    data = write_images(tmp_path / "own", train=10, val=2)
    run = funmatch.train(data=data, eval_data=other, out=tmp_path / "run", **TINY)
    assert f"WARNING: {other} has no validation split: nothing is held out" in capfd.readouterr().err
    assert splits_of(run) == {"training images"}
    assert (run.figures["split"], run.figures["pictures"]) == ("test", 8)


def test_a_search_refuses_val_none(tmp_path):
    data = write_images(tmp_path / "images", train=10)
    with pytest.raises(InputError, match="leaves no images to choose by"):
        funmatch.tune("train", tmp_path / "study", data=data, val="none", space=["lr=1e-3,1e-2"], **TINY)


def test_classes_of_a_test_split_that_the_teacher_lacks_are_an_error_as_before(tmp_path):
    data = write_images(tmp_path / "images", train=10, test=3)
    with pytest.raises(InputError, match="10 outputs, but images has 2 classes"):
        funmatch.distill(data=data, teacher="fashion-mini-teacher", out=tmp_path / "run", **TINY)


@pytest.mark.parametrize("verb", ["train", "finetune"])
def test_a_single_class_is_an_error(verb, tmp_path):
    data = write_images(tmp_path / "images", train=8)
    for path in (data / "train" / "bee").iterdir():
        path.unlink()
    # A folder of a class without images does not make two classes to tell apart.
    with pytest.raises(InputError, match=r"all 7 training images of images are of one class, ant; .* at least two"):
        getattr(funmatch, verb)(data=data, out=tmp_path / "run", **TINY)


def test_a_class_that_is_held_out_whole_is_a_warning(tmp_path, capfd):
    data = write_images(tmp_path / "images", train=10)
    (data / "train" / "bee").rename(data / "train" / "cat")
    paint(data / "train" / "bee" / "0.png", 9)
    for seed in range(40):
        funmatch.train(data=data, val="20%", val_seed=seed, out=tmp_path / "run", dry_run=True, **TINY)
        if "WARNING: all images of bee were held out" in capfd.readouterr().err:
            return
    raise AssertionError("no seed held the image out")


def test_test_images_without_labels_measure_agreement_alone(tmp_path, capfd):
    data = write_images(tmp_path / "images", train=6, val=4)
    for i in range(3):
        paint(data / "test" / f"{i}.png", 5000 + i)
    run = funmatch.train(data=data, out=tmp_path / "run", **TINY)
    assert (run.figures["split"], run.figures["pictures"]) == ("val", 8)
    assert run.figures["top1"] is not None
    assert "test has no labels, so the figures are of val" in capfd.readouterr().err
    cache = open_cache(str(data))
    for with_teacher, name in ((False, "val"), (True, "test")):
        chosen = scoring.test_split(cache, None, with_teacher=with_teacher)
        assert chosen.name == subject.pick_split(cache, "auto", with_teacher=with_teacher).name == name
    assert "so only agreement is measured there" in scoring.describe_unlabelled_test(cache, chosen)
    assert not scoring.describe_unlabelled_test(cache.without_labels(), chosen), "nothing else could be measured"
