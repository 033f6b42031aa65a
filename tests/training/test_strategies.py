"""The paper's strategies: views of teacher and student, cached logits of fixed teachers, contradictory options."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from make_images import FEW
from safetensors.torch import load_file
from scipy import stats

import funmatch
from funmatch.config import Distill
from funmatch.config.choices import DISTANCES, STRATEGIES
from funmatch.data.cache.open_cache import open_cache
from funmatch.data.loader import Batch, Loader
from funmatch.errors import InputError
from funmatch.models.inference.frozen import Frozen
from funmatch.models.load import load
from funmatch.ops import distances, randaugment
from funmatch.ops.crops import central_view, crop_resize_flip
from funmatch.ops.mixing import MixupOptions, beta_quantile, mix_views, mixup
from funmatch.ops.sampling import (
    ENSEMBLE_STREAM,
    LAMBDA_STREAM,
    RANDAUGMENT_STREAM,
    TEACHER_STREAM,
    sample_inception_boxes,
    sample_step,
    step_generator,
)
from funmatch.ops.tasks.task import MULTICLASS
from funmatch.ops.view_spec import ViewSpec
from funmatch.runtime.disk.json_files import seal
from funmatch.runtime.disk.locks import try_lock_file
from funmatch.training import distill
from funmatch.training.evaluation import scoring
from funmatch.training.teachers import fixed
from funmatch.training.teachers.source import DistillLoader, Fixed

MINI = {
    "data": FEW, "teacher": "fashion-mini-teacher", "student": "fashion-mini-student",
    "batch": 16, "threads": 1, "eval_every": 100,
}  # fmt: skip


def sizes(indices):
    return 40 + indices % 5, 50 + indices % 7


def test_tables_have_the_papers_strategies_and_all_distances():
    assert list(STRATEGIES) == [
        "fix/rs", "fix/cc", "fix/ic_ens", "ind/rc", "ind/ic", "same/rc", "same/ic", "funmatch",
    ]  # fmt: skip
    assert [name for name, row in STRATEGIES.items() if row.fixed] == ["fix/rs", "fix/cc", "fix/ic_ens"]
    assert set(DISTANCES) == {*distances.TEMPERED, *distances.PLAIN}
    assert {name for name, row in DISTANCES.items() if row.tempered} == set(distances.TEMPERED)


@pytest.fixture(name="split")
def train_split(images):
    return open_cache(str(images)).splits["train"]


def test_shared_view_is_one_tensor(split):
    batch = Loader(split, ViewSpec(1, 8, 12), teacher_sides=(12,)).batch_at(3)
    (teacher,), student = mix_views(batch.crops, batch.teacher_crops, batch.lam)
    assert teacher is student
    assert torch.equal(student, mixup(batch.crops, batch.lam))
    for part in (batch.to(torch.device("cpu")), *(piece for piece, _ in batch.pieces(3))):
        assert part.teacher_crops == (None,), "None stands for the student's own crops"


@pytest.mark.parametrize("crop", ["inception", "mild"])
def test_own_teacher_views_are_independent_crops_of_the_same_images(split, crop):
    options = {"crop": crop, "resize": 16, "side": 12}
    shared, own_views = (
        Loader(split, ViewSpec(1, 8, **options)),
        Loader(split, ViewSpec(1, 8, **options, own_teacher_view=True), teacher_sides=(12, 20)),
    )
    sample, batch = own_views.sample(3), own_views.batch_at(3)
    assert torch.equal(batch.crops, shared.batch_at(3).crops), "the teacher's own crops do not change the student's"
    assert [each.shape[-1] for each in batch.teacher_crops] == [12, 20]
    assert sample.teacher_view is not None
    rng = step_generator(1, 3, TEACHER_STREAM)
    assert np.array_equal(sample.teacher_view[1], rng.random(8) < 0.5)
    assert not np.array_equal(sample.teacher_view[0], sample.boxes)
    small = F.adaptive_avg_pool2d(batch.teacher_crops[1], 4) - F.adaptive_avg_pool2d(batch.teacher_crops[0], 4)
    assert small.abs().mean() < 0.05, "the teachers share one view, each at its side"


def test_own_teacher_crops_are_uncorrelated_with_the_students():
    draws = [sample_step(0, step, 64, 64, sizes, teacher_view=True) for step in range(300)]
    student_boxes = np.concatenate([draw.boxes[:, 2] for draw in draws])
    teacher_boxes = np.concatenate([draw.teacher_view[0][:, 2] for draw in draws])
    assert abs(np.corrcoef(student_boxes, teacher_boxes)[0, 1]) < 0.05
    assert stats.ks_2samp(student_boxes, teacher_boxes).pvalue > 1e-3
    flips, others = (np.concatenate(list(each)) for each in zip(*((d.flips, d.teacher_view[1]) for d in draws)))  # noqa: B905
    assert abs(np.corrcoef(flips, others)[0, 1]) < 0.05


def test_slices_of_processes_are_the_global_batch_with_own_views(split):
    spec = ViewSpec(1, 8, 12, mixup=MixupOptions(per_image=True), own_teacher_view=True)
    complete = Loader(split, spec, teacher_sides=(12,)).batch_at(3)
    for rank in range(2):
        part = Loader(split, spec, rank, 2, teacher_sides=(12,)).batch_at(3)
        rows = [(rank * 4 - 1) % 8, *range(rank * 4, rank * 4 + 4)]
        assert torch.equal(part.teacher_crops[0], complete.teacher_crops[0][1:][rows])
        assert torch.equal(part.lam, complete.lam[rank * 4 : rank * 4 + 4])


def test_whole_crops_are_never_flipped(split):
    loader = Loader(split, ViewSpec(1, 8, 12, crop="whole"))
    batch, sample = loader.batch_at(3), loader.sample(3)
    for view, index in zip(batch.crops[1:], sample.indices, strict=True):
        image = split.image(index).permute(2, 0, 1)[None].float()
        torch.testing.assert_close(view, F.interpolate(image, (12, 12), mode="bilinear")[0] / 255)


def test_lambda_per_image_has_its_distribution():
    draws = [sample_step(0, step, 50, 50, sizes, mixing=MixupOptions(per_image=True)) for step in range(60)]
    lams = np.concatenate([each.lam for each in draws])
    assert stats.kstest(lams, stats.uniform(0.5, 0.5).cdf).pvalue > 1e-3
    plain = sample_step(0, 7, 50, 50, sizes)
    assert np.array_equal(plain.boxes, draws[7].boxes), "MixUp options change no crop"
    small = MixupOptions(0.2, per_image=True, take_max=False).lam_at(step_generator(3, 1, LAMBDA_STREAM).random(4000))
    assert stats.kstest(small, stats.beta(0.2, 0.2).cdf).pvalue > 1e-3
    assert np.array_equal(small, beta_quantile(step_generator(3, 1, LAMBDA_STREAM).random(4000), 0.2))
    assert sample_step(0, 7, 50, 50, sizes, mixing=MixupOptions(lam=0.3)).lam == 0.3


def test_mixing_with_a_lambda_per_image():
    views, lam = torch.rand(6, 3, 4, 4), torch.rand(5)
    expected_views = torch.stack([lam[i] * views[i + 1] + (1 - lam[i]) * views[i] for i in range(5)])
    torch.testing.assert_close(mixup(views, lam), expected_views)
    assert torch.equal(mixup(views, torch.full((5,), 0.7)), mixup(views, 0.7))
    labels = torch.tensor([0, 1, 2, 1, 0, 2])
    mixed = distances.mix_labels(labels, lam, 3)
    torch.testing.assert_close(mixed[2], lam[2] * F.one_hot(labels[3], 3) + (1 - lam[2]) * F.one_hot(labels[2], 3))
    pieces = [piece for piece, _ in Batch(views, labels, lam).pieces(2)]
    assert torch.equal(torch.cat([mixup(piece.crops, piece.lam) for piece in pieces]), mixup(views, lam))


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("a", [0.0, 1.0])
def test_cutmix_and_randaugment_change_the_shared_view(split, each, a):
    spec = ViewSpec(1, 8, 12, mixup=MixupOptions(a, per_image=each), cutmix=1.0, randaugment=(2, 9))
    loader = Loader(split, spec, teacher_sides=(12, 20))
    batches = [loader.batch_at(step) for step in range(20)]
    for step, batch in enumerate(batches):
        (same, large), student = mix_views(batch.crops, batch.teacher_crops, batch.lam, batch.cutmix_boxes)
        assert same is student
        assert large.shape[-1] == 20
        plain = Loader(split, ViewSpec(1, 8, 12)).batch_at(step).crops
        ops, strengths = randaugment.draw_operations(step_generator(1, step, RANDAUGMENT_STREAM), 8, 2, 9)
        changed = randaugment.apply_operations(plain[1:], ops, strengths)
        assert torch.equal(batch.crops[1:], changed)
        assert torch.equal(batch.crops[0], changed[-1])
        share, lam = torch.as_tensor(batch.own_weight).expand(8), torch.as_tensor(batch.lam).expand(8)
        for i in range(8):
            box = batch.cutmix_boxes[i if each else 0]
            edges = [int(edge * 12 + 0.5) for edge in (box[0], box[0] + box[2], box[1], box[1] + box[3])]
            expected_views = lam[i] * batch.crops[i + 1] + (1 - lam[i]) * batch.crops[i]
            expected_views[:, edges[0] : edges[1], edges[2] : edges[3]] = batch.crops[i][
                :, edges[0] : edges[1], edges[2] : edges[3]
            ]
            torch.testing.assert_close(student[i], expected_views)
            area = (edges[1] - edges[0]) * (edges[3] - edges[2])
            assert share[i] == pytest.approx(float(lam[i]) * (1 - area / 144))
            assert lam[i] == 1 or area == 0, "each image gets either CutMix or MixUp"
        for rank in range(2):
            part = Loader(split, spec, rank, 2, teacher_sides=(12, 20)).batch_at(step)
            _, own_views = mix_views(part.crops, part.teacher_crops, part.lam, part.cutmix_boxes)
            assert torch.equal(own_views, student[rank * 4 : rank * 4 + 4])
        pieces = [
            mix_views(piece.crops, piece.teacher_crops, piece.lam, piece.cutmix_boxes)[1]
            for piece, _ in batch.pieces(3)
        ]
        assert torch.equal(torch.cat(pieces), student)
    cut_share = np.mean([float((batch.cutmix_boxes[:, 2:].prod(-1) > 0).float().mean()) for batch in batches])
    assert cut_share > 0.85 if a == 0 else 0.2 < cut_share < 0.8


def student_of(outcome) -> dict[str, torch.Tensor]:
    return load_file(outcome.folder / "student" / "model.safetensors")


def test_same_ic_with_mixup_equals_funmatch(tmp_path):
    one = funmatch.distill(out=tmp_path / "a", steps=6, **MINI)
    other = funmatch.distill(out=tmp_path / "b", steps=6, strategy="same/ic", mixup=1.0, **MINI)
    for name, tensor in student_of(one).items():
        assert torch.equal(tensor, student_of(other)[name]), name


TRAINED = ("funmatch", "fix/ic_ens")
"""The others train in the slow tests."""


@pytest.mark.parametrize(
    "strategy", [name if name in TRAINED else pytest.param(name, marks=pytest.mark.slow) for name in STRATEGIES]
)
def test_every_strategy_trains(tmp_path, monkeypatch, strategy):
    monkeypatch.setattr(scoring, "VIEWS", 256)
    extra = {"teacher_crops": 8} if strategy == "fix/ic_ens" else {}
    outcome = funmatch.distill(
        out=tmp_path / "run", steps=40, lr=8e-3, strategy=strategy, **MINI | extra | {"eval_every": 20}
    )
    lines = list(map(json.loads, (outcome.folder / "metrics.jsonl").read_text().splitlines()))
    first, last = (next(e for e in lines if e["event"] == "views" and e["step"] == step) for step in (20, 40))
    assert last["kl"] < first["kl"] * 1.1  # 40 steps are too few to ask more than no divergence
    assert last["views"] == 256
    assert 0 <= last["teacher_top1"] <= 1
    resolved = json.loads((outcome.folder / "config.json").read_text())["knobs"]
    assert resolved["crop"] == STRATEGIES[strategy].crop
    assert resolved["resize"] == (40 if resolved["crop"] == "mild" else None), "mild crops need a larger resized image"


@pytest.fixture(name="teacher")
def embedded_teacher():
    return load("fashion-mini-teacher").eval()


@torch.inference_mode()
def expected_probabilities(strategy: str, split, teacher, images, crops: int) -> torch.Tensor:
    """Probabilities of a fixed teacher, (n, classes), computed image by image."""
    found = []
    for number in images:
        image = split.image(number)
        if strategy == "fix/rs":
            views = F.interpolate(image.permute(2, 0, 1)[None].float(), (32, 32), mode="bilinear") / 255
        elif strategy == "fix/cc":
            views = central_view(image, 40, 32)[None]
        else:
            rng = step_generator(0, number, ENSEMBLE_STREAM)
            flips = rng.random(crops) < 0.5
            boxes = sample_inception_boxes(rng, np.full(crops, image.shape[0]), np.full(crops, image.shape[1]))
            views = crop_resize_flip([image] * crops, boxes, flips, 32)
        found.append(teacher(views).softmax(-1).mean(0))
    return torch.stack(found)


@pytest.mark.parametrize(
    "strategy", ["fix/rs", *(pytest.param(each, marks=pytest.mark.slow) for each in ("fix/cc", "fix/ic_ens"))]
)
def test_fixed_teachers_logits_are_computed_once_and_cached(tmp_path, monkeypatch, strategy, teacher):
    monkeypatch.setenv("FUNMATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fixed, "PART", 200)
    batch_sizes: list[int] = []
    original = Frozen.forward
    monkeypatch.setattr(
        Frozen, "forward", lambda self, views: (batch_sizes.append(len(views)), original(self, views))[1]
    )
    crops = 8 if strategy == "fix/ic_ens" else 1
    extra = {"teacher_crops": 8} if crops > 1 else {}
    options = MINI | {"strategy": strategy, "steps": 5, "eval_every": 100, **extra}
    outcome = funmatch.distill(out=tmp_path / "run", **options)
    split = open_cache(FEW).splits["train"]
    (folder,) = (tmp_path / "cache" / "answers").iterdir()
    names = sorted(path.name for path in folder.iterdir())
    assert names == [
        "about.json",
        "answers.crc32",
        "answers.lock",
        "answers.npy",
    ]
    found = torch.from_numpy(np.load(folder / "answers.npy"))
    assert found.shape == (200, 1, 10)
    some = range(0, 200, 17)
    probabilities = expected_probabilities(strategy, split, teacher, some, crops)
    torch.testing.assert_close(found[list(some), 0].softmax(-1), probabilities, rtol=1e-4, atol=1e-6)

    loader = Loader(split, ViewSpec(0, 16, 32, crop=STRATEGIES[strategy].crop, resize=40), teacher_sides=(32,))
    batch, sample = DistillLoader(loader, Fixed(found[:, 0])).batch_at(4), loader.sample(4)
    assert batch.teacher_crops == ()
    assert batch.teacher_logits is not None
    assert torch.equal(batch.teacher_logits, found[sample.indices, 0])

    batch_sizes.clear()
    repeated = funmatch.distill(out=tmp_path / "again", **options)
    assert sum(batch_sizes) <= 2 * 32 + 30 + 30, "the first batch, validation and test images: none for training"
    for name, tensor in student_of(outcome).items():
        assert torch.equal(tensor, student_of(repeated)[name])
    changed = options | (
        {"teacher_crops": 9} if crops > 1 else {"strategy": "fix/cc" if strategy == "fix/rs" else "fix/rs"}
    )
    funmatch.distill(out=tmp_path / "other", **changed)
    assert len(list((tmp_path / "cache" / "answers").iterdir())) == 2, "other views are cached separately"


def test_fixed_logits_that_are_not_finite_are_named_and_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("FUNMATCH_CACHE", str(tmp_path / "cache"))
    options = MINI | {"strategy": "fix/rs", "steps": 2}
    original, faults = fixed._predict_part, [3, 150]

    def faulty(source, teachers, images, *others):
        logits = original(source, teachers, images, *others)
        logits[[each - images.start for each in faults if each in images]] = np.nan
        return logits

    monkeypatch.setattr(fixed, "_predict_part", faulty)
    with pytest.raises(InputError, match="teacher fashion-mini-teacher has outputs that are not finite for 2 of 200"):
        funmatch.distill(out=tmp_path / "run", **options)
    faults.clear()
    assert student_of(funmatch.distill(out=tmp_path / "run", **options))


def test_interrupted_logits_of_a_fixed_teacher_are_resumed(tmp_path, monkeypatch):
    monkeypatch.setenv("FUNMATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fixed, "PART", 40)
    options = MINI | {"strategy": "fix/ic_ens", "teacher_crops": 4, "steps": 2}
    original, done = fixed._predict_part, []

    def interrupted(source, teachers, images, *later_parts):
        if len(done) == 7:
            raise KeyboardInterrupt
        done.append(images.start)
        return original(source, teachers, images, *later_parts)

    monkeypatch.setattr(fixed, "_predict_part", interrupted)
    with pytest.raises(KeyboardInterrupt):
        funmatch.distill(out=tmp_path / "run", **options)
    (folder,) = (tmp_path / "cache" / "answers").iterdir()
    parts = sorted(folder.glob("part-*.npy"))
    assert [int(path.stem.removeprefix("part-")) for path in parts] == done == list(range(0, 70, 10))
    # Another live process holds the next part: it is skipped, and computed once its lock is released.
    lock = try_lock_file(folder / "part-000000070.lock")
    assert lock
    later_parts: list[int] = []

    def counting(source, teachers, images, *extra):
        later_parts.append(images.start)
        if len(later_parts) == 12:
            lock.close()
        return original(source, teachers, images, *extra)

    monkeypatch.setattr(fixed, "_predict_part", counting)
    funmatch.distill(out=tmp_path / "run", **options)
    assert later_parts == [*range(80, 200, 10), 70]
    complete = np.load(folder / "answers.npy")
    monkeypatch.setenv("FUNMATCH_CACHE", str(tmp_path / "fresh"))
    monkeypatch.setattr(fixed, "_predict_part", original)
    funmatch.distill(out=tmp_path / "fresh-run", **options)
    (fresh,) = (tmp_path / "fresh" / "answers").iterdir()
    assert np.array_equal(complete, np.load(fresh / "answers.npy"))


def test_distillation_loss_equals_its_equation():
    config = Distill.checked(**MINI, out="o", steps=1, temperature=3.0, label_weight=0.25, label_smoothing=0.1)
    rng = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, 10, generator=rng) for _ in range(2))
    labels = torch.tensor([3, 1, 2, 0, 9, 9])
    batch = Batch(torch.rand(6, 3, 4, 4), labels, 0.8)
    p, q = (teacher / 3).softmax(-1), (student / 3).softmax(-1)
    kl = (p * (p / q).log()).sum(-1) * 9
    one_hot = 0.9 * F.one_hot(labels, 10) + 0.01
    mixed = 0.8 * one_hot[1:] + 0.2 * one_hot[:-1]
    loss = (0.75 * kl - 0.25 * (mixed * student.log_softmax(-1)).sum(-1)).mean()
    losses = distill.distillation_loss(student, teacher, batch, config)
    torch.testing.assert_close(losses["loss"], loss)
    torch.testing.assert_close(losses["distance"], kl.mean())
    torch.testing.assert_close(losses["label_loss"], -(mixed * student.log_softmax(-1)).sum(-1).mean())

    plain = config.model_copy(update={"label_weight": 0.0, "t_squared": False, "standardise": True})
    standardised = [
        (x - x.mean(-1, keepdim=True)) / x.std(-1, correction=0, keepdim=True) / 3 for x in (teacher, student)
    ]
    p, q = (each.softmax(-1) for each in standardised)
    losses = distill.distillation_loss(student, teacher, batch, plain)
    torch.testing.assert_close(losses["loss"], (p * (p / q).log()).sum(-1).mean())
    assert losses.keys() == {"loss", "distance"}


# A second one, since that is not the default; the others train in the slow tests.
@pytest.mark.parametrize(
    "name", [name if name == "dist" else pytest.param(name, marks=pytest.mark.slow) for name in DISTANCES]
)
def test_every_distance_trains_and_is_recorded(tmp_path, name):
    outcome = funmatch.distill(out=tmp_path / "run", steps=3, distance=name, **MINI)
    assert json.loads((outcome.folder / "config.json").read_text())["knobs"]["distance"] == name


@pytest.fixture(name="run_command")
def command_line(request):
    return request.getfixturevalue("funmatch")


BASE = {"data": "d", "teacher": "t", "student": "s", "out": "o", "steps": 3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "fix/cc", "mixup": 1.0}, "needs a teacher that gets the mixed images"),
        ({"strategy": "fix/rs", "mixup": 0.2}, "fixed"),
        ({"strategy": "funmatch", "mixup": 0.0}, "pass --strategy same/ic"),
        ({"strategy": "same/id"}, "unknown strategy 'same/id'; did you mean 'same/ic'"),
        ({"strategy": "same/ic", "crop": "mild"}, "mild ones are used in fix/cc, ind/rc, same/rc"),
        ({"strategy": "fix/rs", "crop": "inception"}, "whose student gets whole crops"),
        ({"strategy": "same/ic", "teacher_crops": 10}, "teacher_crops belongs to strategy fix/ic_ens"),
        ({"strategy": "fix/ic_ens", "teacher_crops": 0}, "teacher_crops must be at least 1"),
        ({"strategy": "same/ic", "mixup_mode": "image"}, "mixup_mode belongs to MixUp, which is off"),
        ({"strategy": "ind/ic", "cutmix": 1.0}, "cutmix changes the view that both share"),
        ({"strategy": "fix/cc", "randaugment": (2, 9)}, "randaugment changes the view that both share"),
        ({"randaugment": (0, 9)}, "from 1 on"),
        ({"randaugment": (2, 31)}, "from 0 to 30"),
        ({"cutmix": -1.0}, "cutmix must be at least 0"),
        ({"mixup_lam": 1.5}, r"mixup_lam must lie in \[0, 1\], got 1.5"),
        ({"mixup_lam": 0.5, "mixup_max": False}, "set one of them"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"temperature": -1.0}, "temperature must be above 0"),
        ({"distance": "cl"}, "unknown distance 'cl'"),
        ({"distance": "l2", "temperature": 2.0}, "temperature belongs to distances of probabilities"),
        ({"distance": "hard", "t_squared": False}, "t_squared belongs"),
        ({"distance": "hard", "standardise": True}, "standardise does not change which class is the top one"),
        ({"label_weight": 1.2}, r"label_weight must lie in \[0, 1\], got 1.2"),
        ({"label_weight": 0.5, "unlabelled": True}, "needs labels"),
        ({"label_smoothing": 0.1}, "neither is used"),
        ({"resize": 200}, "resize belongs to mild crops"),
        ({"strategy": "same/rc", "crop_min_area": 0.5}, "crop_min_area belongs to Inception crops"),
        ({"mixup": 0.5, "mixup_lam": 0.3}, "mixup 0.5 has no effect"),
        ({"distance": "dist", "batch": 8, "micro_batch": 4}, "micro_batch would change it"),
        ({"cooldown_shape": "linear"}, "cooldown_shape belongs to --schedule wsd"),
    ],
)
def test_contradictory_options_are_rejected(options, message):
    with pytest.raises(InputError, match=message):
        Distill.checked(**BASE | options)


def test_all_contradictions_are_reported_before_anything_is_loaded(run_command):
    argv = "distill --data nowhere --teacher nobody --student no_model --out run --steps 3 --temperature".split()  # noqa: SIM905
    output = run_command(*argv, 0, "--strategy", "fix/xx", "--mixup-lam", 2, "--distance", "far", check=2).stderr
    for part in (
        "temperature must be above 0",
        "unknown strategy 'fix/xx'",
        "mixup_lam must lie in",
        "unknown distance 'far'",
    ):
        assert part in output, output
    output = run_command(*argv, 1, "--strategy", "fix/rs", "--mixup", 1, check=2).stderr
    assert "fixed" in output
    assert "nowhere" not in output


def test_label_weight_needs_labels(tmp_path, images):
    (tmp_path / "bare").mkdir()
    for number, path in enumerate((images / "train").rglob("*.png")):
        path.rename(tmp_path / "bare" / f"{number}.png")
    with pytest.raises(InputError, match="needs labels, but some training images of bare have none"):
        funmatch.distill(
            data=str(tmp_path / "bare"), teacher="fashion-mini-teacher", student="fashion-mini-student",
            steps=1, label_weight=0.5, out=tmp_path / "run",
        )  # fmt: skip


def test_run_recorded_before_an_option_existed_resumes(tmp_path):
    outcome = funmatch.distill(out=tmp_path / "run", steps=2, **MINI)
    record = outcome.folder / "config.json"
    config = json.loads(record.read_text())
    for name in ("mixup_mode", "mixup_max", "t_squared", "label_weight", "distance", "teacher_crops"):
        del config["knobs"][name]
    record.write_text(json.dumps(seal(config)))
    assert funmatch.distill(out=tmp_path / "run", steps=2, **MINI).figures["step"] == 2
    with pytest.raises(InputError, match="distance: kl in the run, l2 now"):
        funmatch.distill(out=tmp_path / "run", steps=2, distance="l2", **MINI)


def test_changed_normalisation_is_another_teacher(tmp_path, monkeypatch):
    monkeypatch.setenv("FUNMATCH_CACHE", str(tmp_path / "cache"))
    teacher = tmp_path / "teacher"
    shutil.copytree(funmatch.distill(out=tmp_path / "first", steps=2, **MINI).folder / "student", teacher)
    options = MINI | {"teacher": str(teacher), "strategy": "fix/rs", "allow_weak_teacher": True}
    funmatch.distill(out=tmp_path / "a", steps=2, **options)
    card = json.loads((teacher / "config.json").read_text())
    card["pretrained_cfg"]["mean"] = [0.9] * 3
    (teacher / "config.json").write_text(json.dumps(card))
    (teacher / "checksums.json").unlink()
    with pytest.raises(InputError, match="the teacher's normalisation or architecture"):
        funmatch.distill(out=tmp_path / "a", steps=2, **options)
    funmatch.distill(out=tmp_path / "b", steps=2, **options)
    first, second = (tmp_path / "cache" / "answers").iterdir()
    assert not np.array_equal(np.load(first / "answers.npy"), np.load(second / "answers.npy"))


def test_damaged_logits_are_recomputed(tmp_path, monkeypatch):
    monkeypatch.setenv("FUNMATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fixed, "PART", 50)
    options = MINI | {"strategy": "fix/rs", "steps": 2}
    complete = funmatch.distill(out=tmp_path / "run", **options)
    (folder,) = (tmp_path / "cache" / "answers").iterdir()
    content = (folder / "answers.npy").read_bytes()
    flipped = content[:3001] + bytes([content[3001] ^ 8]) + content[3002:]
    for number, damage in enumerate((content[:3000], b"no array", flipped)):
        (folder / "answers.npy").write_bytes(damage)
        (folder / "part-000000050.npy").write_bytes(damage)
        repeated = funmatch.distill(out=tmp_path / f"again-{number}", **options)
        assert (folder / "answers.npy").read_bytes() == content
        for name, tensor in student_of(complete).items():
            assert torch.equal(tensor, student_of(repeated)[name])


def test_squashed_and_central_fixed_views_differ(split):
    view_sets = [fixed.FixedViews(split, "central", 1, 12, 16, squash, 0.05) for squash in (False, True)]
    plain, squashed = (each.views(0, slice(1), [12])[12] for each in view_sets)
    image = split.image(0)
    torch.testing.assert_close(squashed[0], central_view(image, 16, 12, squash=True))
    torch.testing.assert_close(plain[0], central_view(image, 16, 12))
    assert not torch.equal(plain, squashed)


def test_score_of_training_views_does_not_depend_on_processes(monkeypatch, split):
    monkeypatch.setattr(scoring, "VIEWS", 256)

    def both(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        pooled = F.adaptive_avg_pool2d(batch.crops[1:], 1).flatten(1)
        return pooled, pooled.flip(-1)

    view = scoring.EvalView(side=12, short_side=12, batch=4, device=torch.device("cpu"), precision="fp32")
    net = torch.nn.Identity()

    def score(loader: Loader) -> dict[str, float | None]:
        return scoring.score_views(scoring.answer_training_views(both, net, loader, 3, view), MULTICLASS)

    one, two = score(Loader(split, ViewSpec(1, 8, 12))), score(Loader(split, ViewSpec(1, 8, 12), 1, 2))
    assert one == two
    loader = Loader(split, ViewSpec(1, 8, 12))
    crops = torch.cat([loader.batch_at(step).crops[1:] for step in range(3, 35)]).mean((2, 3))
    labels = torch.cat([loader.batch_at(step).labels[1:] for step in range(3, 35)])
    assert one["views"] == 256
    assert one["top1"] == pytest.approx((crops.argmax(-1) == labels).double().mean().item())
    assert one["agreement"] == pytest.approx((crops.argmax(-1) == crops.flip(-1).argmax(-1)).double().mean().item())


def test_run_with_a_removed_option_resumes(tmp_path):
    options = {name: value for name, value in MINI.items() if name != "teacher"}
    outcome = funmatch.train(out=tmp_path / "run", steps=2, **options)
    record = outcome.folder / "config.json"
    config = json.loads(record.read_text())
    config["knobs"]["strategy"] = "funmatch"
    record.write_text(json.dumps(seal(config)))
    assert funmatch.train(out=tmp_path / "run", steps=2, **options).figures["step"] == 2


def test_contradictions_with_the_finetuning_rule_are_rejected(tmp_path):
    options = {"data": FEW, "model": "fashion-mini-student", "batch": 8, "steps": 4, "threads": 1}
    with pytest.raises(InputError, match="mixup_lam belongs to MixUp, which is off"):
        funmatch.finetune(out=tmp_path / "run", mixup_lam=0.3, **options)
    outcome = funmatch.finetune(out=tmp_path / "run", decay_factors=(0.5, 0.2, 0.1), **options | {"steps": 10})
    assert json.loads((outcome.folder / "config.json").read_text())["knobs"]["decay_factors"] == [0.5, 0.2, 0.1]


def test_warmup_longer_than_the_run_is_a_warning(tmp_path, capsys):
    funmatch.distill(out=tmp_path / "run", steps=4, warmup_steps=10, **MINI)
    assert "WARNING: the warm-up of 10 steps is not over" in capsys.readouterr().err
