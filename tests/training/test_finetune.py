"""Fine-tuning: BiT-HyperRule, mild crops, the staircase, and what a run may be told besides."""

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


def knobs_of(folder: Path) -> dict:
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
def test_the_hyper_rule_by_the_number_of_images(images, steps, decay, warmup, mixup):
    assert hyperrule.steps(images) == steps
    assert hyperrule.decay_steps(images) == decay
    assert hyperrule.warmup_steps(images) == warmup
    assert hyperrule.mixup(images) == mixup


def test_the_hyper_rule_by_area_and_batch():
    assert hyperrule.sides(95 * 96) == (160, 128)
    assert hyperrule.sides(96 * 96) == (512, 480)
    assert hyperrule.lr(512) == 0.003
    assert hyperrule.lr(4096) == pytest.approx(0.024)


def test_a_staircase_falls_at_its_steps():
    at = {0: 0.0, 50: 0.5, 100: 1.0, 199: 1.0, 200: 0.1, 300: 0.01, 400: 0.001, 499: 0.001}
    for step, wanted in at.items():
        assert staircase(step, 100, (200, 300, 400)) == pytest.approx(wanted)
        assert factor("staircase", step, 500, 100, (200, 300, 400)) == pytest.approx(wanted)
    assert [staircase(s, 0, (2, 4), (0.5, 0.0)) for s in range(6)] == [1, 1, 0.5, 0.5, 0, 0]
    assert factor("constant", 400, 500, 0, (200,)) == 1


@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize("size", [(40, 56), (71, 33), (30, 30), (400, 30)])
def test_a_mild_crop_is_a_crop_of_the_resized_image(size, squash):
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    height, width = (20, 20) if squash else (max(16, round(20 * s / min(size))) for s in size)
    resized = F.interpolate(image.permute(2, 0, 1)[None].double(), (height, width), mode="bilinear")[0] / 255
    boxes = sample_mild_boxes(step_generator(0, 0), [size[0]] * 40, [size[1]] * 40, side=16, resize=20, squash=squash)
    flips = rng.random(40) < 0.5
    views = crop_of_resized_flip([image] * 40, boxes, flips, 16)
    for view, box, flip in zip(views, boxes, flips, strict=True):
        top, left = round(box[0] * height / size[0]), round(box[1] * width / size[1])
        wanted = resized[:, top : top + 16, left : left + 16]
        torch.testing.assert_close(view.double(), wanted.flip(-1) if flip else wanted, atol=1e-6, rtol=0)


def test_a_mild_corner_is_uniform_over_the_resized_image():
    boxes = sample_mild_boxes(step_generator(1, 0), np.full(20_000, 64), np.full(20_000, 128), side=12, resize=16)
    tops, lefts = boxes[:, 0] / 4, boxes[:, 1] / 4
    assert set(tops) == set(range(5))
    assert set(lefts) == set(range(21))
    for corner in (tops, lefts):
        assert stats.chisquare(np.unique(corner, return_counts=True)[1]).pvalue > 1e-3


def test_a_squashed_evaluation_view_keeps_the_middle_of_the_whole_image():
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8))
    view = central_view(image, 20, 16, squash=True)
    whole = F.interpolate(image.permute(2, 0, 1)[None].float(), (20, 20), mode="bilinear")[0] / 255
    torch.testing.assert_close(view, whole[:, 2:18, 2:18])


@pytest.mark.parametrize("a", [0.1, 0.5, 2.0])
def test_lambda_follows_its_beta(a):
    values = [beta_quantile(u, a) for u in step_generator(0, 0).random(3000)]
    assert stats.kstest(values, stats.beta(a, a).cdf).pvalue > 1e-3


def test_mixup_moves_nothing_but_lambda():
    def sizes(indices):
        return np.full(len(indices), 40), np.full(len(indices), 50)

    plain, off, mild = (sample_step(3, 17, 8, 100, sizes, mixing=MixupOptions(a)) for a in (1.0, 0.0, 0.1))
    assert off.lam == 1
    assert mild.lam == pytest.approx(
        max(beta_quantile(step_generator(3, 17).random(), 0.1), 1 - beta_quantile(step_generator(3, 17).random(), 0.1))
    )
    for other in (off, mild):
        assert (plain.indices == other.indices).all()
        assert (plain.boxes == other.boxes).all()


def test_smoothed_labels_are_torchs():
    logits, labels = torch.randn(7, 5), torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    own = cross_entropy(logits, mix_labels(labels, 1.0, 5, 0.1)).mean()
    torch.testing.assert_close(own, F.cross_entropy(logits, labels[1:], label_smoothing=0.1))


def test_sgd_is_torchs_but_for_its_decay():
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


def test_pieces_of_a_batch_hold_every_image_with_its_predecessor():
    batch = Batch(
        torch.arange(8.0).view(8, 1, 1, 1), torch.arange(8), 0.75, torch.arange(7.0)[:, None], (torch.zeros(8),)
    )
    pieces = list(batch.pieces(3))
    assert [len(piece.labels) for piece, _ in pieces] == [3, 3, 4]
    assert [share for _, share in pieces] == [2 / 7, 2 / 7, 3 / 7]
    assert [int(piece.labels[0]) for piece, _ in pieces] == [0, 2, 4]
    assert torch.cat([piece.teacher_logits for piece, _ in pieces]).flatten().tolist() == list(range(7))
    assert next(batch.pieces(None))[1] == 1


def finetuned(out, data=FEW, **knobs) -> funmatch.Outcome:
    return funmatch.finetune(data, knobs.pop("model", MODEL), out, **{**TINY, "steps": 4, "eval_every": 2, **knobs})


def weights(run: funmatch.Outcome) -> dict[str, torch.Tensor]:
    return load_file(run.folder / "student" / "model.safetensors")


@pytest.mark.parametrize("knobs", [{"micro_batch": 5}, {"grad_checkpointing": True}])
def test_memory_is_saved_without_another_result(tmp_path, knobs):
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model = {"model": "vit_tiny_patch16_224", "student_kwargs": size, "lr": 0.1}
    plain, saving = finetuned(tmp_path / "a", **model), finetuned(tmp_path / "b", **model, **knobs)
    for name, wanted in weights(plain).items():
        torch.testing.assert_close(weights(saving)[name], wanted, atol=2e-5, rtol=1e-3, msg=name)
    assert events(saving.folder, "eval")[-1]["top1"] == pytest.approx(
        events(plain.folder, "eval")[-1]["top1"], abs=0.01
    )


def test_what_comes_before_a_module_stays_as_it_is(tmp_path):
    run = finetuned(tmp_path / "run", freeze_until="layer3", lr=0.1)
    torch.manual_seed(0)
    first = funmatch.load(MODEL, options=("channels=(8, 8, 16, 16)", "stem_width=8"), classes=10, pretrained=False)
    assert {name.split(".")[0] for name in weights(run)} >= {"conv1", "layer1", "layer3", "fc"}
    frozen = [name for name in weights(run) if name.startswith(("conv1", "bn1", "layer1", "layer2"))]
    fresh = finetuned(tmp_path / "other", freeze_until="layer3", lr=0.1, steps=1, eval_every=1)
    assert any("running_mean" in name for name in frozen)
    for name in frozen:
        assert torch.equal(weights(run)[name], weights(fresh)[name]), name
    assert not torch.equal(weights(run)["layer3.0.conv1.weight"], weights(fresh)["layer3.0.conv1.weight"])
    assert first.num_classes == 10


def test_only_the_head_is_taught(tmp_path):
    run = finetuned(tmp_path / "run", freeze_until="fc", lr=0.1)
    assert weights(run)["fc.weight"].abs().sum() > 0
    with pytest.raises(InputError, match="'layer3'"):
        finetuned(tmp_path / "b", freeze_until="layr3")
    assert not (tmp_path / "b").exists()


def test_the_rule_gives_what_nobody_said(tmp_path):
    run = finetuned(tmp_path / "run", steps=10, eval_every=5)
    knobs = knobs_of(run.folder)
    assert knobs["side"] == 32
    assert (knobs["resize"], knobs["eval_resize"]) == (40, 40)
    assert knobs["lr"] == pytest.approx(0.003 * 16 / 512)
    assert knobs["decay_steps"] == [4, 6, 8]
    assert (knobs["warmup_steps"], knobs["mixup"], knobs["optimizer"], knobs["clip_norm"]) == (2, 0.0, "sgd", None)
    rule = Finetune.checked(data="x", student="y", out=Path("z"))
    assert (rule.steps, rule.batch, rule.weight_decay, rule.keep) == (None, 512, 0.0, "best")


def test_the_side_follows_a_smaller_resize(tmp_path):
    knobs = knobs_of(finetuned(tmp_path / "run", side=None, resize=40, steps=2, eval_every=2).folder)
    assert (knobs["side"], knobs["resize"], knobs["eval_resize"]) == (32, 40, 40)


def test_without_a_validation_split_one_is_cut_and_test_is_judged_once(tmp_path):
    for split, count in (("train", 20), ("test", 4)):
        for c, name in enumerate(("ant", "bee")):
            for i in range(count):
                paint(tmp_path / "pictures" / split / name / f"{i}.png", 1000 * c + 100 * (split == "test") + i)
    run = finetuned(tmp_path / "run", tmp_path / "pictures")
    config = json.loads((run.folder / "config.json").read_text())
    assert config["facts"]["pictures"] == {"train": 36, "val": 4, "test": 8}
    assert {record["split"] for record in events(run.folder, "eval")} == {"val"}
    assert run.figures["split"] == "test"
    page = run.report.read_text()
    assert "Evaluations per split" in page
    assert "exported student" in page


def test_the_network_that_validation_liked_most_is_kept(tmp_path):
    run = finetuned(tmp_path / "run", steps=8, eval_every=1, lr=3.0, schedule="constant", warmup_steps=0)
    tops = {record["step"]: record["top1"] for record in events(run.folder, "eval")}
    best = run.figures["best_step"]
    assert tops[best] == max(tops.values()) == run.figures["best_score"]
    kept = load_file(run.folder / "checkpoints" / f"best-{best:09}" / "student.safetensors")
    for name, tensor in weights(run).items():
        assert torch.equal(tensor, kept[name])
    last = finetuned(tmp_path / "last", steps=8, eval_every=1, lr=3.0, schedule="constant", warmup_steps=0, keep="last")
    end = load_file(last.folder / "checkpoints" / "step-000000008" / "student.safetensors")
    assert all(torch.equal(tensor, end[name]) for name, tensor in weights(last).items())


def test_patience_ends_a_run(tmp_path):
    knobs = {"steps": 60, "eval_every": 2, "lr": 1e-9, "patience": 3, "save_every": 4}
    run = finetuned(tmp_path / "run", **knobs)
    steps = [record["step"] for record in events(run.folder, "eval")]
    best = run.figures["best_step"]
    assert run.figures["step"] == steps[-1] < 60
    assert len([step for step in steps if step > best]) == 3
    before = (run.folder / "metrics.jsonl").read_text()
    (run.folder / "result.json").unlink()  # killed between its end and its last record
    assert finetuned(tmp_path / "run", **knobs).figures["step"] == run.figures["step"]
    assert (run.folder / "metrics.jsonl").read_text() == before
    with pytest.raises(InputError, match="val 10%"):
        funmatch.train(_images(tmp_path), MODEL, tmp_path / "no", **{**TINY, "steps": 2, "patience": 1})


def _images(folder: Path) -> Path:
    for c in "ab":
        for i in range(4):
            paint(folder / "two" / "train" / c / f"{i}.png", i + 10 * (c == "b"))
    return folder / "two"


def test_a_head_begins_at_zero_unless_it_knows_these_classes(tmp_path):
    net = timm.create_model(MODEL, num_classes=10, channels=(8, 8, 16, 16), stem_width=8)
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    given = {"student_weights": tmp_path / "w.safetensors", "steps": 1, "eval_every": 1, "lr": 1e-30, "keep": "last"}
    run = finetuned(tmp_path / "fresh", **given)
    assert weights(run)["fc.weight"].abs().max() < 1e-20, "ten classes, but which is not known"
    assert torch.equal(weights(run)["conv1.0.weight"], net.conv1[0].weight)
    taught = finetuned(tmp_path / "taught", lr=0.5)
    again = finetuned(tmp_path / "again", model=str(taught.folder), student_kwargs={}, **{
        k: v for k, v in given.items() if k != "student_weights"})  # fmt: skip
    torch.testing.assert_close(weights(again)["fc.weight"], weights(taught)["fc.weight"])


@pytest.mark.parametrize(
    ("knobs", "told"),
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
        ({"cooldown_steps": 5}, "belong to schedule wsd, not staircase"),
        ({"optimizer": "shampo"}, "did you mean 'shampoo'"),
        ({"optimizer": "kron"}, "cannot be used: it draws"),
        ({"micro_batch": 0}, "micro_batch"),
        ({"patience": 0}, "patience"),
    ],
)
def test_what_cannot_be(tmp_path, knobs, told):
    with pytest.raises(InputError, match=told):
        finetuned(tmp_path / "run", **knobs)
    assert not (tmp_path / "run").exists()


def test_it_resumes_to_the_bit(tmp_path):
    knobs = {"steps": 8, "eval_every": 2, "save_every": 3, "lr": 0.3, "mixup": 0.4, "weight_decay": 1e-3}
    whole = finetuned(tmp_path / "whole", **knobs)
    again = finetuned(tmp_path / "again", **knobs)
    (again.folder / "result.json").unlink()
    for step in (8,):
        path = again.folder / "checkpoints" / f"step-{step:09}"
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    resumed = finetuned(tmp_path / "again", **knobs)
    for name, wanted in weights(whole).items():
        assert torch.equal(weights(resumed)[name], wanted), name
    assert resumed.figures["top1"] == whole.figures["top1"]


@given(st.integers(1, 500), st.integers(1, 500))
def test_pieces_are_even(count, size):
    lengths = [stop - start for start, stop in pairwise(even_chunks(count, size))]
    assert sum(lengths) == count
    assert max(lengths) <= size
    assert max(lengths) - min(lengths) <= 1
    assert len(lengths) == math.ceil(count / size)


def test_a_piece_that_batch_norm_cannot_take_is_refused_at_once(tmp_path):
    with pytest.raises(InputError, match="in batches of 1 "):
        finetuned(tmp_path / "run", micro_batch=1)
    assert not (tmp_path / "run").exists()
