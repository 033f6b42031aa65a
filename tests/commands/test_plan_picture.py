"""A planned run is drawn by the code that the run uses: the same views, rates, decay and draws."""

import itertools
import xml.dom.minidom

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch import nn

from funmatch.commands import plan
from funmatch.commands.common.ready import build
from funmatch.commands.verbs import run_verb
from funmatch.config import PLANNED, TAUGHT, Distill, Finetune, Train
from funmatch.errors import InputError
from funmatch.ops.optim.factory import create_optimizer
from funmatch.reports.plan import draws, picture, plots, views
from funmatch.runtime.functions import register
from funmatch.training import distill, train
from funmatch.training.loop import set_lr
from funmatch.training.run.folder import find_run

TINY = {"data": "fashion-mini", "threads": 1, "steps": 4, "batch": 40, "side": 32, "val": "none", "keep": "last"}
STUDENT, TEACHER = {"student": "fashion-mini-student"}, {"teacher": "fashion-mini-teacher"}
RUNS = {"distill": distill.run, "train": train.run}
PARTS = {"schedule.svg", "mixing.svg", "areas.svg", "aspects.svg", "views.png"}


class Small(nn.Module):
    """A network that costs nothing."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 10)

    def forward(self, images):
        return self.head(images.mean((2, 3)))


class Shown(Exception):
    """Ends a run with the first images that its student is shown."""


class Recorder(Small):
    def forward(self, images):
        # Before the run a network is tried on zeros.
        if self.training and images.any():
            raise Shown(images)
        return super().forward(images)


def prepared(verb="distill", **options):
    """A run that is set up and not begun."""
    given = TINY | STUDENT | (TEACHER if verb == "distill" else {}) | {"out": "never"} | options
    return build(TAUGHT[verb].checked(**given))[0]


@pytest.mark.parametrize(
    ("verb", "options"),
    [
        ("distill", {}),
        ("distill", {"mixup_mode": "image", "cutmix": 1.0, "randaugment": (2, 9), "seed": 3}),
        ("distill", {"strategy": "ind/rc", "resize": 40, "batch": 19}),
        ("distill", {"policy": ("mixup=1", "mixup=0,randaugment=2 9"), "seed": 2}),
        ("train", {"mixup": 0.0, "crop": "squash", "resize": 36}),
    ],
)
def test_first_views_are_those_of_the_run(verb, options, tmp_path):
    name = "python:Recorder"
    given = TINY | (TEACHER if verb == "distill" else {}) | options | {"student": name, "out": tmp_path / "run"}
    with pytest.raises(Shown) as ended:
        RUNS[verb](TAUGHT[verb].checked(**given), {name: Recorder()})
    shown = views.first_views(prepared(verb, **options))[0].views
    assert len(shown) == 16
    assert torch.equal(shown, ended.value.args[0][:16])


def test_teachers_views_are_shown_where_they_are_other_pixels():
    alone = views.first_views(prepared())
    assert len(alone) == 1
    assert "the student's and the teacher's" in alone[0].caption
    student, teacher = views.first_views(prepared(strategy="ind/ic"))
    assert teacher.views.shape == student.views.shape
    assert not torch.equal(student.views, teacher.views)
    sides = views.first_views(prepared(teacher=("fashion-mini-teacher",) * 2, teacher_side=(32, 48)))
    assert [each.views.shape[-1] for each in sides] == [32, 48]
    setup = prepared(strategy="fix/rs")
    _, fixed = views.first_views(setup)
    assert fixed.caption == "the teacher's at 32 pixels: the whole image, the same in every step"
    # 28 pixels to 32 without a crop or a mirror: the whole image, of the images that the student sees.
    images = setup.loader.split.images(setup.loader.sample(0).indices[:16])
    whole = torch.stack([each.permute(2, 0, 1).float() for each in images]) / 255
    wanted = nn.functional.interpolate(whole, (32, 32), mode="bilinear")
    torch.testing.assert_close(fixed.views, wanted, atol=1e-5, rtol=0)


def test_rates_and_decay_are_those_of_the_updates(tmp_path):
    options = {"steps": 30, "warmup_steps": 7, "schedule": "wsd", "cooldown_steps": 9, "weight_decay": 1e-2}
    name = "python:Small"
    given = TINY | options | {"student": name, "mixup": 0.0, "log_every": 1, "out": tmp_path / "run"}
    RUNS["train"](Train.checked(**given), {name: Small()})
    rates = {each["step"]: each["lr"] for each in find_run(tmp_path / "run").metrics.read() if each["event"] == "step"}
    setup = prepared("train", **options)
    panel = plots.build_panels(setup, draws.collect(setup.loader, 1))[0]
    axes = panel.figure.axes[0]
    drawn = dict(zip(*axes.lines[0].get_data(), strict=True))
    assert drawn == pytest.approx(rates)
    assert len(drawn) == 30
    # The axis at the right: the share of a kernel that an update without a gradient removes.
    to_decay = axes.child_axes[0]._functions[0]
    for name, step in itertools.product(("adamw", "sgd"), (3, 12, 28)):
        layer = nn.Linear(4, 4)
        optimizer = create_optimizer(name, layer, setup.loop.lr, 1e-2)
        set_lr(optimizer, setup.loop.lr, setup.loop.factor(step))
        before = layer.weight.detach().clone()
        layer.weight.grad = torch.zeros_like(before)
        optimizer.step()
        removed = 1 - (layer.weight.detach() / before).mean().item()
        assert removed == pytest.approx(to_decay(drawn[step + 1]), rel=1e-3)


def test_draws_have_the_distributions_of_the_options():
    drawn = draws.collect(prepared(steps=400, batch=8).loader, 400)
    assert stats.kstest(drawn.weights, stats.uniform(0.5, 0.5).cdf).pvalue > 0.01
    assert len(drawn.areas["student"]) == 3200
    # Whole pixels: an area of 5 % may be met only up to a pixel's rounding.
    assert drawn.areas["student"].min() >= 0.049
    assert 0.7 < drawn.aspects["student"].min() < drawn.aspects["student"].max() < 1.42
    each = draws.collect(prepared(mixup_mode="image", strategy="ind/ic", mixup=0.2).loader, 4)
    assert len(each.weights) == 4 * 40
    assert each.areas.keys() == {"student", "teacher"}
    assert not np.array_equal(each.areas["student"], each.areas["teacher"])
    mild = draws.collect(prepared("train", mixup=0.0, crop="mild", resize=40).loader, 4)
    assert np.allclose(mild.areas["student"], (32 / 40) ** 2)
    assert set(mild.weights) == {1.0}
    assert set(draws.collect(prepared(strategy="fix/rs", mixup=0.0).loader, 2).areas["student"]) == {1.0}


def test_few_steps_are_drawn_of_a_long_run():
    setup = prepared(steps=5000, batch=2)
    drawn = draws.collect(setup.loader, setup.loop.steps)
    assert drawn.steps == len(drawn.weights) == draws.MOST_STEPS
    assert "first 1,000 steps" in plots.build_panels(setup, drawn)[1].heading


@pytest.mark.parametrize(
    ("verb", "options"),
    [
        ("finetune", {"student": "fashion-mini-teacher", "decay_steps": (2, 3), "warmup_steps": 0}),
        ("train", {"optimizer": register(torch.optim.SGD), "lr": 0.1, "steps": 1}),
    ],
)
def test_other_runs_are_drawn_too(verb, options, tmp_path):
    files = picture.write(prepared(verb, **options), tmp_path / "parts")
    assert {path.name for path in files} == PARTS


def test_plan_writes_files_that_open(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "forecast", lambda *_: {"seconds": 1.0})
    options = TINY | STUDENT | {"out": tmp_path / "run", "plot": tmp_path / "new" / "plan.png"}
    found = run_verb("plan", PLANNED["train"].checked(**options)).metrics
    assert found == {"seconds": 1.0, "plot": [str(options["plot"])]}
    with Image.open(options["plot"]) as image:
        assert image.width > 900
    assert picture.write(prepared(), tmp_path / "plan.SVG") == [tmp_path / "plan.SVG"]
    document = xml.dom.minidom.parse(str(tmp_path / "plan.SVG"))
    assert len(document.getElementsByTagName("svg")) == 5
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        ("plan.pdf", "is neither a .png nor a .svg file"),
        ("file", "is neither a .png nor a .svg file"),
        ("file/plan.png", "is a file; choose another place"),
    ],
)
def test_places_that_cannot_be_written_are_refused_at_once(tmp_path, place, problem):
    (tmp_path / "file").write_text("")
    options = TINY | STUDENT | TEACHER | {"out": tmp_path / "run"}
    with pytest.raises(InputError, match=problem):
        run_verb("plan", PLANNED["distill"].checked(**options, plot=tmp_path / place))


def test_a_dry_run_draws_nothing():
    with pytest.raises(InputError, match="--plot does not go with --dry-run"):
        PLANNED["train"].checked(**TINY | STUDENT, out="x", plot="x.png", dry_run=True)
    assert all(issubclass(PLANNED[verb], table) for verb, table in TAUGHT.items())
    assert {Train, Finetune, Distill} == set(TAUGHT.values())
