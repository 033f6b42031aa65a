"""Optimizers, distances and schedules of the paper's code and of the TensorFlow project."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from funmatch.ops import distances
from funmatch.ops.mixing import mixup
from funmatch.ops.optim import factory, hyperrule, schedules

STEPS, LR, DECAY, WARMUP = 50, 0.003, 3e-4, 10


def gradients(shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(1)
    return (rng.normal(size=(STEPS, *shape)) * rng.uniform(0.001, 1, shape)).astype(np.float32)


def trained(optimizer_name: str, start: np.ndarray, given: np.ndarray, decay: float, **options: Any) -> np.ndarray:
    """A kernel after 50 given gradients, by our optimizer and schedule."""
    layer = nn.Linear(*start.shape[::-1], bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(start))
    optimizer = factory.create_optimizer(optimizer_name, layer, LR, decay, **options)
    for step, gradient in enumerate(given):
        for group in optimizer.param_groups:
            group["lr"] = LR * schedules.factor("cosine", step, STEPS, WARMUP)
        layer.weight.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
    return layer.weight.detach().numpy()


@pytest.mark.parametrize("mean", ["fp32", "bf16"])
def test_adam_with_independent_decay(mean, jax, record):
    start = np.random.default_rng(0).normal(size=(40, 60)).astype(np.float32) / 10
    given = gradients(start.shape)
    rule = jax.optax.scale_by_adam(b1=0.9, b2=0.999, mu_dtype="bfloat16" if mean == "bf16" else None)
    schedule = jax.optax.warmup_cosine_decay_schedule(0, 1, WARMUP, STEPS)
    weight = jax.np.asarray(start)
    state = rule.init(weight)
    for step, gradient in enumerate(given):
        # Not compiled: XLA may skip the rounding to bf16 between two operations that it joins.
        update, state = rule.update(jax.np.asarray(gradient), state)
        # Section 4.1: the decay follows the schedule, but not the learning rate.
        weight = weight - schedule(step) * (LR * update + DECAY * weight)
    found = trained("adamw", start, given, DECAY, momentum_dtype=mean)
    way = np.abs(np.asarray(weight) - start).max()
    record(
        f"{STEPS} steps of AdamW, mean in {mean}, part of the way",
        "optax",
        np.abs(found - weight).max() / way,
        at_most=1e-4,
    )


def test_sgd_with_momentum(tf, record):
    start = np.random.default_rng(0).normal(size=(40, 60)).astype(np.float32) / 10
    given = gradients(start.shape)
    weight, rule = tf.Variable(start), tf.keras.optimizers.SGD(1.0, momentum=0.0)
    velocity = np.zeros_like(start)
    for step, gradient in enumerate(given):
        velocity = 0.9 * velocity + gradient
        rule.learning_rate = LR * schedules.factor("cosine", step, STEPS, WARMUP)
        rule.apply_gradients([(tf.constant(velocity), weight)])
    found = trained("sgd", start, given, 0.0)
    way = np.abs(weight.numpy() - start).max()
    record(
        f"{STEPS} steps of SGD with momentum, part of the way",
        "TensorFlow",
        np.abs(found - weight.numpy()).max() / way,
        at_most=1e-5,
    )


def loss_of(jax: Any, name: str, temperature: float):
    np_, log_softmax = jax.np, jax.nn.log_softmax

    def kl(student, teacher):
        p, q = log_softmax(teacher / temperature), log_softmax(student / temperature)
        return temperature**2 * (np_.exp(p) * (p - q)).sum(-1)

    def hard(student, teacher):
        return -np_.take_along_axis(log_softmax(student), teacher.argmax(-1)[:, None], 1)[:, 0]

    return {
        "kl": kl,
        "l2": lambda s, t: ((s - t) ** 2).sum(-1),
        "euclidean": lambda s, t: np_.sqrt(((s - t) ** 2).sum(-1)),
        "hard": hard,
        "log-softmax-l2": lambda s, t: ((log_softmax(s) - log_softmax(t)) ** 2).sum(-1),
        "log-softmax-euclidean": lambda s, t: np_.sqrt(((log_softmax(s) - log_softmax(t)) ** 2).sum(-1)),
    }[name]


CASES = [("kl", 1.0), ("kl", 2.0), ("kl", 10.0), *((name, 1.0) for name in ("l2", "euclidean", "hard"))]
CASES += [(name, 1.0) for name in ("log-softmax-l2", "log-softmax-euclidean")]


@pytest.mark.parametrize(("name", "temperature"), CASES)
def test_distances_and_their_gradients(name, temperature, jax, record):
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 64, 37)).astype(np.float32) * 5
    loss = loss_of(jax, name, temperature)
    expected, slope = jax.jax.value_and_grad(lambda s: loss(s, jax.np.asarray(teacher)).mean())(jax.np.asarray(student))
    ours: Tensor = torch.from_numpy(student.copy()).requires_grad_()
    found = distances.distance(name, ours, torch.from_numpy(teacher), temperature).mean()
    found.backward()
    assert ours.grad is not None
    of_gradient = np.abs(ours.grad.numpy() - np.asarray(slope)).max() / np.abs(slope).max()
    off = max(abs(found.item() / float(expected) - 1), float(of_gradient))
    record(f"distance {name} and its gradient, T = {temperature:g}", "JAX", off, at_most=1e-5)


@pytest.mark.parametrize(("steps", "warmup"), [(7_000, 1_500), (70_000, 1_500), (2_000, 0)])
def test_cosine_with_warmup(steps, warmup, jax, record):
    each = np.unique(np.linspace(0, steps, 500).astype(int))
    schedule = jax.optax.warmup_cosine_decay_schedule(0 if warmup else 1, 1, warmup, steps)
    off = max(abs(schedules.cosine(int(step), steps, warmup) - float(schedule(step))) for step in each)
    record(f"cosine over {steps:,} steps, {warmup:,} of warm-up", "optax", off, at_most=1e-6)


@pytest.mark.parametrize("images", [1_020, 68_175, 600_000])
def test_hyperrule(images, jax, record):
    steps, warmup, down = hyperrule.steps(images), hyperrule.warmup_steps(images), hyperrule.decay_steps(images)
    linear = jax.optax.linear_schedule(0, 1, warmup)
    stairs = jax.optax.piecewise_constant_schedule(1.0, dict.fromkeys(down, 0.1))
    each = sorted({*np.linspace(0, steps - 1, 200).astype(int).tolist(), *down, *(step - 1 for step in down)})
    off = max(
        abs(schedules.factor("staircase", step, steps, warmup, down) - float(linear(step) * stairs(step)))
        for step in each
    )
    record(f"BiT-HyperRule's rate for {images:,} images", "optax", off, at_most=1e-6)


def test_mixup(jax, record):
    images = np.random.default_rng(0).random((8, 3, 16, 16), np.float32)
    expected = 0.7 * images + 0.3 * np.asarray(jax.np.roll(jax.np.asarray(images), 1, axis=0))
    views = torch.from_numpy(images)
    found = mixup(torch.cat([views[-1:], views]), 0.7).numpy()
    record("MixUp with the batch rolled by one", "JAX", np.abs(found - expected).max(), at_most=1e-6)
