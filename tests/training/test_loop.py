"""The training loop: gradient clipping, and the number of files that a batch passes."""

import sys
import threading
from functools import partial
from pathlib import Path
from types import FrameType

import pytest
import torch
from make_images import paint
from torch import Tensor, nn

import funmatch
from funmatch.config import Distill
from funmatch.data.loader import Batch
from funmatch.data.prefetch import prefetch
from funmatch.ops.sampling import StepSample
from funmatch.runtime import devices
from funmatch.training import distill
from funmatch.training.loop import LoopOptions, fit

PACKAGE = Path(funmatch.__file__).parent
CPU = torch.device("cpu")


def test_clipping_uses_the_norm_of_all_gradients():
    student = nn.ParameterDict({"a": torch.zeros(2), "b": torch.zeros(1)})
    slopes = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}  # of norm 5

    def loss_of(_batch: Batch) -> dict[str, Tensor]:
        return {"loss": sum((student[name] * slope).sum() for name, slope in slopes.items())}

    batch = Batch(torch.zeros(2, 3, 1, 1), torch.zeros(2, dtype=torch.int64), 1.0)
    for limit, expected in ((1.0, [0.6, 0.0, 0.8]), (10.0, [3.0, 0.0, 4.0]), (None, [3.0, 0.0, 4.0])):
        for parameter in student.parameters():
            parameter.data.zero_()
        optimizer = torch.optim.SGD(student.parameters(), 1.0)
        options = LoopOptions(1, 1.0, lambda _step: 1.0, limit, 0, CPU, "fp32")
        list(fit(options, student, optimizer, devices.loss_scaler(CPU, "fp32"), [batch], loss_of))
        update = -torch.cat([student["a"], student["b"]])
        torch.testing.assert_close(update, torch.tensor(expected), atol=1e-5, rtol=1e-5)


BATCH = 13
"""Images in a batch; no layer of the networks below has as many channels, or one more."""
LAYERS = {"models/groupnorm.py", "models/bit.py", "models/inference/native_layers.py", "ops/native/norms.py"}
"""Files of the networks themselves."""


def holds_a_batch(value: object) -> bool:
    """Whether a value is a batch, its draws, its images, its views or its logits."""
    if isinstance(value, dict):
        return any(map(holds_a_batch, value.values()))
    if isinstance(value, list | tuple):
        images = len(value) in (BATCH, BATCH + 1) and all(isinstance(each, Tensor) for each in value)
        return images or any(holds_a_batch(each) for each in value if isinstance(each, Tensor))
    views = isinstance(value, Tensor) and value.ndim > 1 and len(value) in (BATCH, BATCH + 1)
    return views or isinstance(value, Batch | StepSample)


@pytest.mark.parametrize("strategy", ["same/ic", "ind/rc"])
def test_a_batch_passes_few_files(tmp_path, strategy):
    """A reader who follows a batch from the images to the update needs no more than fourteen of our files."""
    files: set[str] = set()

    def trace(frame: FrameType, event: str, value: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event not in ("call", "return") or PACKAGE not in path.parents:
            return
        if holds_a_batch(value) or any(map(holds_a_batch, list(frame.f_locals.values()))):
            files.add(path.relative_to(PACKAGE).as_posix())

    for number in range(20):  # large enough for the native kernel
        paint(tmp_path / "images" / "train" / "ant" / f"{number}.png", number, (80 + number, 90))
    options = Distill(
        data=str(tmp_path / "images"), teacher=("fashion-mini-teacher",), student="fashion-mini-student", steps=3,
        strategy=strategy, batch=BATCH, out=tmp_path / "run",
    )  # fmt: skip
    cache, config, loaded = distill.open_inputs(options)
    setup = distill.build_distill_setup(config, cache, loaded)
    with distill.prepare(setup, loaded) as distillation:
        student, scaler = setup.student, devices.loss_scaler(CPU, "fp32")
        threading.setprofile_all_threads(trace) if sys.version_info >= (3, 12) else threading.setprofile(trace)
        sys.setprofile(trace)
        try:
            finish = partial(Batch.pin_memory, device=CPU)
            batches = prefetch(distillation.objective.batches, 0, 3, finish=finish)
            list(fit(setup.loop, student.classifier, student.optimizer, scaler, batches, distillation.objective.loss))
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
    files -= LAYERS
    assert {"data/loader.py", "training/loop.py", "training/distill.py", "ops/distances.py"} <= files
    assert len(files) <= 14, sorted(files)
