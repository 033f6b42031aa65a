"""What is compiled: the networks whole, for the sizes that training gives them, in a mode that keeps gradients."""

import json
from functools import partial
from itertools import pairwise

import pytest
import timm
import torch
from make_images import FEW

import funmatch
from funmatch.models.classifier import Card, Classifier
from funmatch.models.inference.frozen import Frozen
from funmatch.models.inference.modes import InferenceMode
from funmatch.runtime.chunks import even_chunks

OPTIONS = {
    "data": FEW, "teacher": "fashion-mini-teacher", "student": "fashion-mini-student", "batch": 16, "steps": 2,
    "compile": "on", "threads": 1, "precision": "fp32", "eval_every": 100,
}  # fmt: skip


@pytest.fixture(name="compiled")
def without_a_compiler(monkeypatch) -> list[tuple[dict, list[int]]]:
    """Networks that are "compiled": the options of each, and the batches that it is then called with."""
    found = []

    def compile_(call, **options):
        sizes: list[int] = []
        found.append((options, sizes))

        def compiled(views):
            sizes.append(len(views))
            return call(views)

        return compiled

    monkeypatch.setattr(torch, "compile", compile_)
    return found


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({}, [16]),
        ({"micro_batch": 6}, [6, 5]),
        ({"teacher_batch": 6}, [6, 5]),
        ({"micro_batch": 10, "teacher_batch": 5}, [4]),
        ({"micro_batch": 6, "teacher_ahead": True}, [16]),
    ],
    ids=str,
)
def test_teachers_are_compiled_for_every_batch_that_training_shows_them(tmp_path, compiled, options, sizes):
    run = funmatch.distill(**OPTIONS | options, out=tmp_path / "run")
    (_, of_teacher), _ = compiled
    config = json.loads((run.folder / "config.json").read_text())
    (record,) = config["facts"]["teacher_forms"]
    assert record["batches"] == sizes
    assert set(of_teacher) == set(sizes)
    bounds = [even_chunks(16, None if "teacher_ahead" in options else options.get("micro_batch"))]
    pieces = [stop - start for each in bounds for start, stop in pairwise(each)]
    each_step = sum(len(even_chunks(piece, options.get("teacher_batch"))) - 1 for piece in pieces)
    assert len(of_teacher) >= 2 * each_step, "both steps, piece by piece"


def test_a_run_of_an_earlier_version_computes_its_teacher_as_it_did(tmp_path, compiled):
    options = OPTIONS | {"micro_batch": 6, "out": tmp_path / "run", "save_every": 1, "steps": 3}

    def stop(event, step, _values):
        if event == "step" and step == 1:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        funmatch.distill(**options, log_every=1, on_event=stop)
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    del config["facts"]["teacher_forms"][0]["batches"]
    del config["checksum"]
    path.write_text(json.dumps(config))
    compiled.clear()
    funmatch.distill(**options, log_every=1)
    (_, of_teacher), _ = compiled
    assert set(of_teacher) == {16}, "compiled for the whole batch, which no piece has"


@pytest.mark.parametrize(
    ("options", "mode"),
    [
        ({"compile": "on"}, None),
        ({"compile": "max"}, "max-autotune"),
        ({"compile": "max", "micro_batch": 6}, "max-autotune-no-cudagraphs"),
        ({"compile": "on", "micro_batch": 6}, None),
    ],
)
def test_no_graphs_are_replayed_where_gradients_are_summed_over_pieces(tmp_path, compiled, options, mode):
    funmatch.distill(**OPTIONS | options, out=tmp_path / "run")
    _, (of_student, _) = compiled
    assert of_student["mode"] == mode


PAIRS = [
    "resnetv2_101x3_bit", "resnetv2_50x1_bit", "vit_large_patch16_224", "vit_small_patch16_224", "resnet50",
    "mobilenetv3_large_100",
]  # fmt: skip
"""Networks of the pairs of `benchmarks/gpu.py`."""


@pytest.mark.parametrize(
    ("name", "options"),
    [("vit_small_patch16_224", {"depth": 1}), *(pytest.param(name, {}, marks=pytest.mark.slow) for name in PAIRS)],
)
def test_networks_are_one_graph(name, options):
    """The compiler breaks neither the student's graph, forward and backward, nor that of the folded teacher."""
    side = 224 if "vit" in name else 64
    with torch.device("meta"):
        net, views = timm.create_model(name, num_classes=10, **options), torch.rand(2, 3, side, side)
    whole = partial(torch.compile, backend="aot_eager", fullgraph=True, dynamic=False)  # raises where it would break
    whole(lambda views: net.train()(views))(views).sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    torch._dynamo.reset()
    frozen = Frozen(Classifier(net, Card(name, side, 1.0, (0.5,) * 3, (0.5,) * 3)), InferenceMode())
    with torch.no_grad():
        assert whole(frozen.classifier.net)(views).shape == (2, 10)
