"""Runs on images of several classes: training on labels, distilling, judging, and what is refused."""

import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import linear_model, neighbors
from sklearn import metrics as sklearn_metrics
from test_distill import records
from test_teachers import classifier

import funmatch
from funmatch.commands import plan
from funmatch.config import Distill, Finetune, Train
from funmatch.config.search import PlanDistill
from funmatch.data.cache.open_cache import open_cache
from funmatch.data.dataset import ReadOptions
from funmatch.errors import InputError
from funmatch.models.ensemble import EnsembleMember, TeacherEnsemble, select_classes
from funmatch.models.inference.features import Features
from funmatch.models.inference.frozen import Frozen
from funmatch.models.load import load
from funmatch.ops.tasks.task import MULTILABEL
from funmatch.ops.view_spec import Preprocessing
from funmatch.training.evaluation import outcome, scoring
from funmatch.training.teachers import checks

CLASSES = ("bars", "rows", "dots")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A table of images with any of three patterns, also none: 40 to train on, 12 of val and 12 of test."""
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("patterns")
    lines = ["path,label,split"]
    for number in range(64):
        shown = rng.random(3) < 0.4
        pixels = rng.integers(0, 60, (12, 12, 3)).astype(np.uint8)
        pixels[:, 3:6, 0] += (190 * shown[0]).astype(np.uint8)
        pixels[6:9, :, 1] += (190 * shown[1]).astype(np.uint8)
        pixels[::3, ::3, 2] += (190 * shown[2]).astype(np.uint8)
        Image.fromarray(pixels).save(root / f"{number}.png")
        labels = ";".join(name for name, has in zip(CLASSES, shown, strict=True) if has)
        lines.append(f"{number}.png,{labels},{'train' if number < 40 else 'val' if number < 52 else 'test'}")
    (root / "images.csv").write_text("\n".join(lines))
    return root / "images.csv"


def options(table, **changes):
    usual = {
        "data": str(table), "task": "multilabel", "student": "fashion-mini-student", "side": 32, "batch": 16,
        "steps": 8, "eval_every": 4, "save_every": 4, "warmup_steps": 0, "lr": 0.01,
    }  # fmt: skip
    return usual | changes


@pytest.fixture(scope="module")
def teacher(table, tmp_path_factory):
    return funmatch.train(out=tmp_path_factory.mktemp("teacher") / "teacher", **options(table, steps=60))


@pytest.fixture(scope="module")
def student(table, teacher, tmp_path_factory):
    root = tmp_path_factory.mktemp("student")
    given = options(table, teacher=str(teacher.folder), tape=root / "tape", label_weight=0.25, micro_batch=4)
    return funmatch.distill(out=root / "student", **given), given


def truth(table, split):
    return open_cache(f"csv:{table}", ReadOptions(task="multilabel")).splits[split].labels(slice(None))


def features_of(backbone, table, split):
    """Features of a saved network on a split."""
    return answers(Features(load(backbone)), table, split)


def answers(model, table, split):
    """Logits of a saved student on a split, with torch alone."""
    images = open_cache(f"csv:{table}", ReadOptions(task="multilabel")).splits[split]
    view = scoring.EvalView(side=32, short_side=32, squash=False, resample="antialias", batch=64,
                            device=torch.device("cpu"), precision="fp32")  # fmt: skip
    return scoring.predict(model, images, view)


def test_a_run_is_judged_by_mean_average_precision(teacher, table):
    logits, labels = answers(teacher.student(), table, "test"), truth(table, "test")
    assert teacher.metrics["map"] == pytest.approx(
        sklearn_metrics.average_precision_score(labels, logits, average="macro"), abs=1e-6
    )
    assert teacher.metrics["f1_micro"] == pytest.approx(
        sklearn_metrics.f1_score(labels, logits > 0, average="micro"), abs=1e-6
    )
    assert teacher.metrics["map"] > 0.8 > teacher.metrics["chance"]
    assert teacher.metrics["top1"] is None
    evaluations = records(teacher.folder, "eval")
    best = max(evaluations, key=lambda each: (each["map"], -each["step"]))
    assert teacher.metrics["best_step"] == best["step"]
    assert teacher.metrics["best_score"] == best["map"]
    saved = json.loads((teacher.folder / "student" / "config.json").read_text())
    assert saved["funmatch"]["task"] == "multilabel"
    assert saved["label_names"] == ["bars", "dots", "rows"]
    page = teacher.page.read_text()
    assert "mAP" in page
    assert "Mean average precision during training" in page
    assert "top-1" not in page


def test_a_student_matches_its_teacher(student, teacher, table):
    run, _ = student
    logits, reference = (answers(each.student(), table, "test") for each in (run, teacher))
    assert run.metrics["agreement"] == pytest.approx(((logits > 0) == (reference > 0)).double().mean().item())
    assert run.metrics["kl"] == pytest.approx(MULTILABEL.divergence(logits, reference).mean().item(), rel=1e-3)
    assert run.metrics["teacher"]["map"] == pytest.approx(teacher.metrics["map"], abs=1e-6)
    (record,) = records(run.folder, "teacher")
    assert record["map"] == pytest.approx(
        sklearn_metrics.average_precision_score(truth(table, "val"), answers(teacher.student(), table, "val")), abs=1e-6
    )
    views = records(run.folder, "views")[-1]
    assert 0 < views["map"] <= 1
    assert 0 < views["teacher_map"] <= 1


def test_a_tape_replays_and_a_run_resumes_to_the_bit(student, tmp_path):
    run, given = student
    weights = (run.folder / "student" / "model.safetensors").read_bytes()
    again = funmatch.distill(out=tmp_path / "again", **given)
    assert (again.folder / "student" / "model.safetensors").read_bytes() == weights
    (again.folder / "result.json").unlink()
    for path in (again.folder / "student", again.folder / "checkpoints" / "step-000000008"):
        shutil.rmtree(path)
    resumed = funmatch.distill(out=tmp_path / "again", **given)
    assert (resumed.folder / "student" / "model.safetensors").read_bytes() == weights
    assert len(records(resumed.folder, "eval")) == 2


def test_evaluate_knows_the_task_of_a_run(student, table, tmp_path):
    run, _ = student
    found = funmatch.evaluate(run.folder, report=tmp_path / "page.html")
    labels, logits = truth(table, "test"), answers(run.student(), table, "test")
    for number, row in enumerate(found["classes"]):
        assert row["images"] == labels[:, number].sum()
        assert row["ap"] == pytest.approx(sklearn_metrics.average_precision_score(labels[:, number], logits[:, number]))
        expected = sklearn_metrics.precision_recall_fscore_support(
            labels[:, number], logits[:, number] > 0, average="binary", zero_division=0
        )
        assert [row["recall"], row["f1"]] == pytest.approx(expected[1:3])
    assert found["map"] == pytest.approx(np.mean([row["ap"] for row in found["classes"]]))
    assert found["teacher_map"] == found["of_teacher"]["map"] > 0.8
    assert "mean average precision" in (tmp_path / "page.html").read_text()
    # Its interval is that of images drawn again by other random numbers, each time judged by scikit-learn.
    rng, drawn = np.random.default_rng(1), []
    for _ in range(300):
        rows = rng.integers(0, len(labels), len(labels))
        some = [number for number in range(3) if labels[rows, number].any()]
        each = [sklearn_metrics.average_precision_score(labels[rows, n], logits[rows, n]) for n in some]
        drawn.append(np.mean(each))
    assert found["intervals"]["map"] == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.04)


def test_features_are_measured_by_mean_average_precision(student, teacher, table, tmp_path):
    run, _ = student
    both = funmatch.evaluate(run.folder, others=(str(teacher.folder),), embedding=True, report=tmp_path / "page.html")
    assert "20 nearest neighbours, mAP" in (tmp_path / "page.html").read_text()
    known, queries = (features_of(str(run.folder / "student"), table, name) for name in ("train", "test"))
    unit = torch.nn.functional.normalize(known).numpy()
    model = neighbors.KNeighborsRegressor(
        20, algorithm="brute", metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(unit, truth(table, "train"))
    votes, labels = model.predict(queries.numpy()), truth(table, "test")
    expected = np.mean([sklearn_metrics.average_precision_score(labels[:, n], votes[:, n]) for n in range(3)])
    found = both["embedding"]
    assert found["knn"]["map"] == pytest.approx(expected, abs=1e-6)
    low, high = found["probe"]["intervals"]["map"]
    assert low <= found["probe"]["map"] <= high
    assert both["others"][0]["embedding"]["knn"]["map"] > 0.5


def test_a_line_an_image_lists_its_classes(student, table, tmp_path):
    run, _ = student
    funmatch.evaluate(run.folder, per_image=tmp_path / "rows.csv", report="none")
    labels, logits = truth(table, "test"), answers(run.student(), table, "test")
    with (tmp_path / "rows.csv").open(newline="") as file:
        lines = [*csv.DictReader(file)]
    given = {line["path"]: line["label"] for line in csv.DictReader(table.read_text().splitlines())}
    assert len(lines) == len(labels)
    for line, own, target in zip(lines, logits, labels, strict=True):
        assert sorted(line["labels"].split(";")) == sorted(given[line["image"].rpartition("/")[2]].split(";"))
        # Classes are numbered in the order of their names.
        names = sorted(CLASSES)
        assert line["predicted"] == ";".join(names[number] for number in range(3) if own[number] > 0)
        expected = sklearn_metrics.log_loss(target, own.sigmoid(), labels=[0, 1])
        assert float(line["nll"]) == pytest.approx(expected, rel=1e-4)
        shown = [float(line[f"probability of {name}"]) for name in names]
        assert shown == pytest.approx(own.sigmoid().tolist(), abs=1e-5)
        assert 0 <= float(line["agreement"]) <= 1


def test_corrupted_images_are_judged_by_mean_average_precision(student, tmp_path):
    run, _ = student
    page = tmp_path / "page.html"
    found = funmatch.evaluate(run.folder, corruptions=("darkness", "noise"), report=page)
    of_model, of_teacher = (found["corruptions"][name] for name in ("models", "teacher"))
    (of_model,) = of_model.values()
    for own, score in ((of_model, found["map"]), (of_teacher, found["teacher_map"])):
        assert own["map"]["clean"] == score
        assert [len(shares) for shares in own["map"]["by_kind"].values()] == [5, 5]
        assert own["map"]["by_severity"][4] < own["map"]["clean"]
    assert {*of_model} == {"map", "f1_micro", "agreement"}
    assert "mAP (%)" in page.read_text()


def test_predict_gives_each_class_a_probability_of_its_own(student, table, funmatch, tmp_path):
    run, _ = student
    out = tmp_path / "rows.csv"
    funmatch("predict", run.folder, table.parent / "0.png", "--out", out, "--teacher", run.folder)
    (row,) = csv.DictReader(out.read_text().splitlines())
    given = {row[f"class{end}"]: float(row[f"probability{end}"]) for end in ("", "_2", "_3")}
    model = run.student()
    images = open_cache(f"csv:{table}", ReadOptions(task="multilabel")).splits["train"].images(np.arange(40))
    first = np.array(Image.open(table.parent / "0.png"))
    place = next(number for number, pixels in enumerate(images) if np.array_equal(pixels, first))
    view = answers(model, table, "train")[place]
    assert [given[name] for name in sorted(CLASSES)] == pytest.approx(view.sigmoid().tolist(), abs=1e-4)
    assert row["agreement"] == "true"
    assert float(row["kl"]) == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
def test_exports_give_each_class_a_probability_of_its_own(student, tmp_path):
    run, _ = student
    out = tmp_path / "export"
    funmatch.export(run.folder, format="torch-export", probabilities=True, out=out, images=8)
    about = json.loads((out / "preprocessing.json").read_text())
    assert (about["task"], about["output"]) == ("multilabel", "probabilities")
    views = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = torch.export.load(out / "model.pt2").module()(views)
    torch.testing.assert_close(found, run.student()(views).sigmoid(), atol=1e-4, rtol=1e-3)
    assert "no class" in (out / "example.py").read_text()
    with pytest.raises(InputError, match="compares logits where an image may have several classes"):
        funmatch.export(run.folder, quantize=16, probabilities=True, out=tmp_path / "other", images=8)


@pytest.mark.slow
def test_a_quantised_export_is_measured_by_mean_average_precision(student, table, tmp_path):
    run, _ = student
    onnxruntime = pytest.importorskip("onnxruntime")
    found = funmatch.export(run.folder, format="onnx", quantize=16, out=tmp_path / "out", images=8)["quantized"]
    views = [view for view, _ in scoring.central_batches(
        open_cache(f"csv:{table}", ReadOptions(task="multilabel")).splits["val"],
        Preprocessing(side=32, short_side=32, resample="antialias"), 64,
    )]  # fmt: skip
    labels, precision = truth(table, "val"), {}
    for key, name in (("before", "model.onnx"), ("after", "model-fp16.onnx")):
        session = onnxruntime.InferenceSession(tmp_path / "out" / name)
        logits = session.run(None, {"images": torch.cat(views).numpy()})[0]
        precision[key] = np.mean(
            [sklearn_metrics.average_precision_score(labels[:, n], logits[:, n]) for n in range(3)]
        )
        assert found[key]["map"] == pytest.approx(precision[key])
        assert found[key]["top1"] is None
    assert found["drop"] == pytest.approx(100 * (precision["before"] - precision["after"]))
    low, high = found["drop_interval"]
    assert low <= found["drop"] <= high


def test_a_sheet_and_a_summary_count_every_class(table, tmp_path, funmatch):
    sheet = tmp_path / "sheet.png"
    found = json.loads(funmatch("data", table, "--task", "multilabel", "--sheet", sheet, "--json").stdout)
    labels = truth(table, "train")
    assert found["splits"]["train"] | {"classes": 3} == found["splits"]["train"]
    low, high = (found["class_sizes"]["train"][name][1] for name in ("smallest", "largest"))
    assert [low, high] == [labels.sum(0).min(), labels.sum(0).max()]
    assert sheet.stat().st_size > 1000


def test_models_of_one_task_are_refused_for_the_other(teacher, table, tmp_path):
    with pytest.raises(
        InputError, match=r"teacher .* gives any number of classes an image, but .*; pass task=\"multilabel\""
    ):
        funmatch.distill(data="fashion-mini", teacher=str(teacher.folder), student="fashion-mini-student", steps=1,
                         out=tmp_path / "one")  # fmt: skip
    saved = tmp_path / "single"
    shutil.copytree(teacher.folder / "student", saved)
    config = json.loads((saved / "config.json").read_text())
    del config["funmatch"]["task"]
    (saved / "config.json").write_text(json.dumps(config))
    for path in saved.glob("*.json"):
        if path.name != "config.json":
            path.unlink()  # the manifest of checksums
    with pytest.raises(InputError, match=r"gives one class an image, but .* any number of classes an image"):
        funmatch.distill(out=tmp_path / "two", **options(table, teacher=str(saved)))
    with pytest.raises(InputError, match="gives any number of classes an image"):
        funmatch.evaluate(teacher.folder, task="multiclass", data=str(table), unlabelled=True)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (Train, {"sampling": "balanced"}, "sampling balanced is for one class an image"),
        (Distill, {"distance": "hard"}, "with --task multilabel use kl, reverse-kl, l2, euclidean"),
        (Distill, {"distance": "js"}, "distance js is for one class an image"),
        (Distill, {"tape": "t", "tape_top": 2}, "tape_top is for one class an image"),
        (Distill, {"standardise": True}, "standardise is for one class an image"),
    ],
)
def test_options_of_one_class_an_image_are_refused(kind, changes, message):
    given = {"data": ("d",), "student": "resnet18", "out": "r", "steps": 1, "task": "multilabel"}
    config = kind(**given | ({"teacher": ("t",)} if kind is Distill else {}) | changes)
    assert any(message in each for each in config.problems())
    single = config.model_copy(update={"task": "multiclass"})
    assert not any(message in each for each in single.problems())


@pytest.mark.parametrize("weighted", ["none", "balanced"])
def test_a_head_is_fitted_to_each_class(weighted, teacher, table, tmp_path):
    backbone = str(teacher.folder / "student")
    options = {"data": str(table), "task": "multilabel", "model": backbone, "side": 32, "C": (1e-3, 0.1, 10.0)}
    options["class_weights"] = weighted
    found = funmatch.head(out=tmp_path / "head", **options).metrics
    assert [each["value"] for each in found["tried"]] == [1e-3, 0.1, 10.0]
    best = max(found["tried"], key=lambda each: each["map"])
    assert [each["map"] for each in found["tried"] if each["value"] == found["chosen"]] == [best["map"]]
    # On the same features, each class by scikit-learn.
    known, seen = (features_of(backbone, table, name) for name in ("train", "test"))
    mean, std = known.double().mean(0), known.double().std(0, correction=0)
    std[std < 1e-6] = 1
    known, seen = ((each.double() - mean) / std for each in (known, seen))
    scores = []
    for number in range(3):
        labels = truth(table, "train")[:, number].numpy()
        weights = {0: 1, 1: (labels == 0).sum() / (labels == 1).sum()} if weighted == "balanced" else None
        model = linear_model.LogisticRegression(C=found["chosen"], tol=1e-9, max_iter=20_000, class_weight=weights)
        model.fit(known.numpy(), labels)
        answer = model.decision_function(seen.numpy())
        scores.append(sklearn_metrics.average_precision_score(truth(table, "test")[:, number], answer))
    assert found["map"] == pytest.approx(np.mean(scores), abs=1e-6)
    again = funmatch.evaluate(tmp_path / "head", data=str(table), split="test")
    assert again["map"] == pytest.approx(found["map"], abs=1e-6), "the folder says its task"


def test_features_are_matched_on_images_of_several_classes(teacher, table, tmp_path):
    given = options(table, teacher=str(teacher.folder), match=("logits", "features"))
    found = funmatch.distill(out=tmp_path / "both", **given).metrics
    assert found["map"] is not None
    assert found["cosine"] is not None
    alone = funmatch.distill(out=tmp_path / "alone", **given | {"match": "features"})
    assert alone.metrics["cosine"] > 0
    assert "Agreement on training views" not in alone.page.read_text()


def test_images_that_all_have_the_same_classes_cannot_be_trained_on(table, tmp_path):
    alike = tmp_path / "alike.csv"
    alike.write_text("path,bars,dots,rows\n" + "".join(f"{table.parent / f'{i}.png'},1,1,0\n" for i in range(20)))
    with pytest.raises(InputError, match=r"all 18 training images of alike have the classes bars, dots;"):
        funmatch.train(out=tmp_path / "run", **options(alike))
    assert not (tmp_path / "run").exists()


def ensemble(combine, *seeds):
    members = []
    for seed in seeds:
        model = classifier(seed=seed)
        model.card = replace(model.card, task="multilabel")
        members.append(EnsembleMember(Frozen(model), 8, 1 / len(seeds)))
    return TeacherEnsemble(members, combine)


def test_several_teachers_are_averaged_in_their_own_probabilities():
    views = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    both = ensemble("mean-probabilities", 0, 1)
    each = [member.answers(views).sigmoid() for member in both.members]
    torch.testing.assert_close(both({8: views}).sigmoid(), (each[0] + each[1]) / 2)
    own = [member.answers(views) for member in both.members]
    torch.testing.assert_close(ensemble("mean-logits", 0, 1)({8: views}), (own[0] + own[1]) / 2)


def test_a_class_that_stands_for_several_is_the_likeliest_of_them():
    logits = torch.tensor([[1.0, -2.0, 0.5]])
    assert select_classes(logits, ((1,), (0, 2)), MULTILABEL).tolist() == [[-2.0, 1.0]]


def test_teachers_near_chance_are_refused(table):
    split = open_cache(f"csv:{table}", ReadOptions(task="multilabel")).splits["test"]
    config = Distill(data=("d",), teacher=("t",), student="s", out="o", steps=1, task="multilabel")
    needed = outcome.chance_precision(split.labels(slice(None)))
    assert split.labels(slice(None)).mean() < needed < 0.8
    checks.check_above_random("good", needed, split, config)
    with pytest.raises(InputError, match=r"teacher bad is near chance: mAP 10.0 % on test"):
        checks.check_above_random("bad", 0.1, split, config)
    checks.check_above_random("bad", 0.1, split, config.model_copy(update={"allow_weak_teacher": True}))
    with pytest.raises(InputError, match="the same probabilities"):
        checks.check_not_constant("flat", torch.ones(len(split), 3), split, config)
    assert outcome.describe_failure({"map": 0.2, "chance": 0.3, "kl": None}, 3)
    assert outcome.describe_failure({"map": 0.4, "chance": 0.3, "kl": None}, 3) is None
    assert outcome.describe_failure({"map": 0.4, "kl": 1.5}, 100)  # of two outcomes, not of 100


def test_the_rule_for_fine_tuning_is_for_the_sum_over_classes(table):
    from funmatch.training.defaults import apply_hyperrule

    cache = open_cache(f"csv:{table}", ReadOptions(task="multilabel"))
    config = Finetune(data=(str(table),), student="resnet18", out="r", task="multilabel")
    assert apply_hyperrule(config, cache).lr == pytest.approx(3 * 0.003)
    assert apply_hyperrule(config.model_copy(update={"task": "multiclass"}), cache).lr == pytest.approx(0.003)


def test_candidate_teachers_are_ranked_by_the_metric_of_the_task(table, teacher, tmp_path, capsys):
    name = str(teacher.folder)
    result = plan.run(PlanDistill.checked(**options(table, out=tmp_path / "run", teachers=(name,), teachers_views=32)))
    (row,) = result.metrics["teachers"]
    judged = funmatch.evaluate(name, split="val", data=str(table), task="multilabel")
    assert row["map"] == pytest.approx(judged["map"], abs=1e-6)
    assert 0 < row["entropy"] < np.log(2)  # of one class, in nats
    plan.show(result)
    assert "mAP on val" in capsys.readouterr().out
