"""Fine-tuning: BiT-HyperRule, mild crops, the staircase schedule, and options of a run."""

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from make_images import FEW, paint
from safetensors.torch import load_file, save_file
from scipy import stats

import funmatch
from funmatch.config import Finetune
from funmatch.data.loader import Batch
from funmatch.errors import InputError
from funmatch.ops.crops import central_view, crop_of_resized_flip
from funmatch.ops.distances import cross_entropy, mix_labels
from funmatch.ops.mixing import MixupOptions, beta_quantile
from funmatch.ops.optim import hyperrule
from funmatch.ops.optim.factory import create_optimizer
from funmatch.ops.optim.schedules import factor, staircase
from funmatch.ops.sampling import sample_mild_boxes, sample_step, step_generator
from funmatch.runtime.chunks import even_chunks
from funmatch.training.loop import set_lr

TINY = {"student_kwargs": {"channels": (8, 8, 16, 16), "stem_width": 8}, "side": 32, "batch": 16}
MODEL = "resnet10t"


def events(folder: Path, event: str) -> list[dict]:
    return [r for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if r["event"] == event]


def recorded_options(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["knobs"]


@pytest.mark.parametrize(
    ("images", "steps", "decay", "warmup", "mixup"),
    [
        (1_020, 500, (200, 300, 400), 100, 0.0),
        (19_999, 500, (200, 300, 400), 100, 0.0),
        (20_000, 10_000, (3_000, 6_000, 9_000), 500, 0.1),
        (499_999, 10_000, (3_000, 6_000, 9_000), 500, 0.1),
        (500_000, 20_000, (6_000, 12_000, 18_000), 500, 0.1),
    ],
)
def test_hyperrule_by_number_of_images(images, steps, decay, warmup, mixup):
    assert hyperrule.steps(images) == steps
    assert hyperrule.decay_steps(images) == decay
    assert hyperrule.warmup_steps(images) == warmup
    assert hyperrule.mixup(images) == mixup


def test_hyperrule_by_image_area_and_batch():
    assert hyperrule.sides(95 * 96) == (160, 128)
    assert hyperrule.sides(96 * 96) == (512, 480)
    assert hyperrule.lr(512) == 0.003
    assert hyperrule.lr(4096) == pytest.approx(0.024)


def test_staircase_drops_at_its_steps():
    factors = {0: 0.0, 50: 0.5, 100: 1.0, 199: 1.0, 200: 0.1, 300: 0.01, 400: 0.001, 499: 0.001}
    for step, expected in factors.items():
        assert staircase(step, 100, (200, 300, 400)) == pytest.approx(expected)
        assert factor("staircase", step, 500, 100, (200, 300, 400)) == pytest.approx(expected)
    assert [staircase(s, 0, (2, 4), (0.5, 0.0)) for s in range(6)] == [1, 1, 0.5, 0.5, 0, 0]
    assert factor("constant", 400, 500, 0, (200,)) == 1


@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize("size", [(40, 56), (71, 33), (30, 30), (400, 30)])
def test_mild_crop_equals_a_crop_of_the_resized_image(size, squash):
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    height, width = (20, 20) if squash else (max(16, round(20 * s / min(size))) for s in size)
    resized = F.interpolate(image.permute(2, 0, 1)[None].double(), (height, width), mode="bilinear")[0] / 255
    boxes = sample_mild_boxes(step_generator(0, 0), [size[0]] * 40, [size[1]] * 40, side=16, resize=20, squash=squash)
    flips = rng.random(40) < 0.5
    views = crop_of_resized_flip([image] * 40, boxes, flips, 16)
    for view, box, flip in zip(views, boxes, flips, strict=True):
        top, left = round(box[0] * height / size[0]), round(box[1] * width / size[1])
        expected = resized[:, top : top + 16, left : left + 16]
        torch.testing.assert_close(view.double(), expected.flip(-1) if flip else expected, atol=1e-6, rtol=0)


def test_mild_crop_positions_are_uniform():
    boxes = sample_mild_boxes(step_generator(1, 0), np.full(20_000, 64), np.full(20_000, 128), side=12, resize=16)
    tops, lefts = boxes[:, 0] / 4, boxes[:, 1] / 4
    assert set(tops) == set(range(5))
    assert set(lefts) == set(range(21))
    for corner in (tops, lefts):
        assert stats.chisquare(np.unique(corner, return_counts=True)[1]).pvalue > 1e-3


def test_squashed_evaluation_view_is_the_centre_of_the_squashed_image():
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8))
    view = central_view(image, 20, 16, squash=True)
    uninterrupted = F.interpolate(image.permute(2, 0, 1)[None].float(), (20, 20), mode="bilinear")[0] / 255
    torch.testing.assert_close(view, uninterrupted[:, 2:18, 2:18])


@pytest.mark.parametrize("a", [0.1, 0.5, 2.0])
def test_lambda_has_a_beta_distribution(a):
    values = [beta_quantile(u, a) for u in step_generator(0, 0).random(3000)]
    assert stats.kstest(values, stats.beta(a, a).cdf).pvalue > 1e-3


def test_mixup_options_change_lambda_only():
    def sizes(indices):
        return np.full(len(indices), 40), np.full(len(indices), 50)

    plain, off, small = (sample_step(3, 17, 8, 100, sizes, mixing=MixupOptions(a)) for a in (1.0, 0.0, 0.1))
    assert off.lam == 1
    assert small.lam == pytest.approx(
        max(beta_quantile(step_generator(3, 17).random(), 0.1), 1 - beta_quantile(step_generator(3, 17).random(), 0.1))
    )
    for other in (off, small):
        assert (plain.indices == other.indices).all()
        assert (plain.boxes == other.boxes).all()


def test_label_smoothing_equals_torchs():
    logits, labels = torch.randn(7, 5), torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    loss = cross_entropy(logits, mix_labels(labels, 1.0, 5, 0.1)).mean()
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels[1:], label_smoothing=0.1))


def test_sgd_equals_its_equation_with_decoupled_decay():
    torch.manual_seed(0)
    ours = torch.nn.Linear(4, 3).double()
    weight, bias = ours.weight.detach().clone(), ours.bias.detach().clone()
    optimizer, momentum = (
        create_optimizer("sgd", ours, lr=0.1, weight_decay=0.01, momentum=0.9),
        [torch.zeros_like(weight), torch.zeros(3)],
    )
    for step in range(4):
        share = (1.0, 0.5, 0.0, 0.25)[step]
        set_lr(optimizer, 0.1, share)
        inputs = torch.randn(5, 4, dtype=torch.float64)
        ours(inputs).square().sum().backward()
        gradients = [ours.weight.grad.clone(), ours.bias.grad.clone()]
        optimizer.step()
        optimizer.zero_grad()
        momentum = [0.9 * m + g for m, g in zip(momentum, gradients, strict=True)]
        weight = weight - share * (0.01 * weight + 0.1 * momentum[0])
        bias = bias - share * 0.1 * momentum[1]
        torch.testing.assert_close(ours.weight.detach(), weight)
        torch.testing.assert_close(ours.bias.detach(), bias)


def test_pieces_of_a_batch_keep_each_image_with_its_predecessor():
    batch = Batch(
        torch.arange(8.0).view(8, 1, 1, 1), torch.arange(8), 0.75, torch.arange(7.0)[:, None], (torch.zeros(8),)
    )
    pieces = list(batch.pieces(3))
    assert [len(piece.labels) for piece, _ in pieces] == [3, 3, 4]
    assert [share for _, share in pieces] == [2 / 7, 2 / 7, 3 / 7]
    assert [int(piece.labels[0]) for piece, _ in pieces] == [0, 2, 4]
    assert torch.cat([piece.teacher_logits for piece, _ in pieces]).flatten().tolist() == list(range(7))
    assert next(batch.pieces(None))[1] == 1


def finetune(out, data=FEW, **options) -> funmatch.Outcome:
    return funmatch.finetune(data, options.pop("model", MODEL), out, **{**TINY, "steps": 4, "eval_every": 2, **options})


def weights(run: funmatch.Outcome) -> dict[str, torch.Tensor]:
    return load_file(run.folder / "student" / "model.safetensors")


@pytest.mark.parametrize("options", [{"micro_batch": 5}, {"grad_checkpointing": True}])
def test_micro_batches_and_checkpointing_give_the_same_weights(tmp_path, options):
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model = {"model": "vit_tiny_patch16_224", "student_kwargs": size, "lr": 0.1}
    plain, economical = finetune(tmp_path / "a", **model), finetune(tmp_path / "b", **model, **options)
    for name, expected in weights(plain).items():
        torch.testing.assert_close(weights(economical)[name], expected, atol=2e-5, rtol=1e-3, msg=name)
    assert events(economical.folder, "eval")[-1]["top1"] == pytest.approx(
        events(plain.folder, "eval")[-1]["top1"], abs=0.01
    )


def test_freeze_until_keeps_earlier_modules_unchanged(tmp_path):
    run = finetune(tmp_path / "run", freeze_until="layer3", lr=0.1, keep="last")
    torch.manual_seed(0)
    first = funmatch.load(MODEL, options=("channels=(8, 8, 16, 16)", "stem_width=8"), classes=10, pretrained=False)
    assert {name.split(".")[0] for name in weights(run)} >= {"conv1", "layer1", "layer3", "fc"}
    frozen = [name for name in weights(run) if name.startswith(("conv1", "bn1", "layer1", "layer2"))]
    fresh = finetune(tmp_path / "other", freeze_until="layer3", lr=0.1, steps=1, eval_every=1)
    assert any("running_mean" in name for name in frozen)
    for name in frozen:
        assert torch.equal(weights(run)[name], weights(fresh)[name]), name
    assert not torch.equal(weights(run)["layer3.0.conv1.weight"], weights(fresh)["layer3.0.conv1.weight"])
    assert first.num_classes == 10


def test_freeze_until_head_trains_only_the_head(tmp_path):
    run = finetune(tmp_path / "run", freeze_until="fc", lr=0.1)
    assert weights(run)["fc.weight"].abs().sum() > 0
    with pytest.raises(InputError, match="'layer3'"):
        finetune(tmp_path / "b", freeze_until="layr3")
    assert not (tmp_path / "b").exists()


def test_hyperrule_sets_options_that_are_not_given(tmp_path):
    run = finetune(tmp_path / "run", steps=10, eval_every=5)
    options = recorded_options(run.folder)
    assert options["side"] == 32
    assert (options["resize"], options["eval_resize"]) == (40, 40)
    assert options["lr"] == pytest.approx(0.003 * 16 / 512)
    assert options["decay_steps"] == [4, 6, 8]
    assert (options["warmup_steps"], options["mixup"], options["optimizer"], options["clip_norm"]) == (
        2,
        0.0,
        "sgd",
        None,
    )
    rule = Finetune.checked(data="x", student="y", out=Path("z"))
    assert (rule.steps, rule.batch, rule.weight_decay, rule.keep) == (None, 512, 0.0, "best")


def test_side_follows_a_smaller_resize(tmp_path):
    options = recorded_options(finetune(tmp_path / "run", side=None, resize=40, steps=2, eval_every=2).folder)
    assert (options["side"], options["resize"], options["eval_resize"]) == (32, 40, 40)


def test_without_validation_split_images_are_held_out_and_test_is_used_once(tmp_path):
    for split, count in (("train", 20), ("test", 4)):
        for c, name in enumerate(("ant", "bee")):
            for i in range(count):
                paint(tmp_path / "pictures" / split / name / f"{i}.png", 1000 * c + 100 * (split == "test") + i)
    run = finetune(tmp_path / "run", tmp_path / "pictures")
    config = json.loads((run.folder / "config.json").read_text())
    assert config["facts"]["pictures"] == {"train": 36, "val": 4, "test": 8}
    assert {record["split"] for record in events(run.folder, "eval")} == {"val"}
    assert run.figures["split"] == "test"
    page = run.report.read_text()
    assert "Evaluations per split" in page
    assert "exported student" in page


def test_keep_best_exports_the_best_validated_weights(tmp_path):
    run = finetune(tmp_path / "run", steps=8, eval_every=1, lr=3.0, schedule="constant", warmup_steps=0)
    tops = {record["step"]: record["top1"] for record in events(run.folder, "eval")}
    best = run.figures["best_step"]
    assert tops[best] == max(tops.values()) == run.figures["best_score"]
    best_state = load_file(run.folder / "checkpoints" / f"best-{best:09}" / "student.safetensors")
    for name, tensor in weights(run).items():
        assert torch.equal(tensor, best_state[name])
    last = finetune(tmp_path / "last", steps=8, eval_every=1, lr=3.0, schedule="constant", warmup_steps=0, keep="last")
    end = load_file(last.folder / "checkpoints" / "step-000000008" / "student.safetensors")
    assert all(torch.equal(tensor, end[name]) for name, tensor in weights(last).items())


def test_patience_stops_a_run_early(tmp_path):
    options = {"steps": 60, "eval_every": 2, "lr": 1e-9, "patience": 3, "save_every": 4}
    run = finetune(tmp_path / "run", **options)
    steps = [record["step"] for record in events(run.folder, "eval")]
    best = run.figures["best_step"]
    assert run.figures["step"] == steps[-1] < 60
    assert len([step for step in steps if step > best]) == 3
    before = (run.folder / "metrics.jsonl").read_text()
    (run.folder / "result.json").unlink()  # as if killed between the last step and the result
    assert finetune(tmp_path / "run", **options).figures["step"] == run.figures["step"]
    assert (run.folder / "metrics.jsonl").read_text() == before
    options = {**TINY, "steps": 2, "patience": 1, "val": "none"}
    with pytest.raises(InputError, match='pass val="10%"'):
        funmatch.train(_images_without_validation(tmp_path), MODEL, tmp_path / "no", **options)


def _images_without_validation(folder: Path) -> Path:
    for c in "ab":
        for i in range(4):
            paint(folder / "two" / "train" / c / f"{i}.png", i + 10 * (c == "b"))
    return folder / "two"


def test_head_starts_at_zero_unless_its_classes_are_known(tmp_path):
    net = timm.create_model(MODEL, num_classes=10, channels=(8, 8, 16, 16), stem_width=8)
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    options = {"student_weights": tmp_path / "w.safetensors", "steps": 1, "eval_every": 1, "lr": 1e-30, "keep": "last"}
    run = finetune(tmp_path / "fresh", **options)
    assert weights(run)["fc.weight"].abs().max() < 1e-20, "ten classes as well, but their names are unknown"
    assert torch.equal(weights(run)["conv1.0.weight"], net.conv1[0].weight)
    first_run = finetune(tmp_path / "taught", lr=0.5)
    repeated = finetune(tmp_path / "again", model=str(first_run.folder), student_kwargs={}, **{
        k: v for k, v in options.items() if k != "student_weights"})  # fmt: skip
    torch.testing.assert_close(weights(repeated)["fc.weight"], weights(first_run)["fc.weight"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 5, "epochs": 2.0}, "not both"),
        ({"decay_steps": (4, 2)}, "must rise"),
        ({"decay_steps": (2, 4), "decay_factors": (0.1,)}, "give one each"),
        ({"schedule": "cosine", "decay_steps": (2,)}, "staircase"),
        ({"crop": "inception", "resize": 40}, "resize belongs"),
        ({"resize": 20}, "at least side"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"momentum": 1.5}, "momentum"),
        ({"momentum_dtype": "bf16"}, "belongs to optimizer adamw, not sgd"),
        ({"cooldown_steps": 5}, 'belong to schedule="wsd", not staircase'),
        ({"optimizer": "shampo"}, "did you mean 'shampoo'"),
        ({"optimizer": "kron"}, "cannot be used: it draws"),
        ({"micro_batch": 0}, "micro_batch"),
        ({"patience": 0}, "patience"),
    ],
)
def test_invalid_options_are_rejected(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        finetune(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_resumed_finetuning_equals_uninterrupted_run(tmp_path):
    options = {"steps": 8, "eval_every": 2, "save_every": 3, "lr": 0.3, "mixup": 0.4, "weight_decay": 1e-3}
    uninterrupted = finetune(tmp_path / "whole", **options)
    repeated = finetune(tmp_path / "again", **options)
    (repeated.folder / "result.json").unlink()
    for step in (8,):
        path = repeated.folder / "checkpoints" / f"step-{step:09}"
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    resumed = finetune(tmp_path / "again", **options)
    for name, expected in weights(uninterrupted).items():
        assert torch.equal(weights(resumed)[name], expected), name
    assert resumed.figures["top1"] == uninterrupted.figures["top1"]


@given(st.integers(1, 500), st.integers(1, 500))
def test_chunks_are_even(count, size):
    lengths = [stop - start for start, stop in pairwise(even_chunks(count, size))]
    assert sum(lengths) == count
    assert max(lengths) <= size
    assert max(lengths) - min(lengths) <= 1
    assert len(lengths) == math.ceil(count / size)


def test_micro_batch_of_one_with_batch_norm_is_rejected(tmp_path):
    with pytest.raises(InputError, match="in batches of 1 "):
        finetune(tmp_path / "run", micro_batch=1)
    assert not (tmp_path / "run").exists()
