"""BiT networks: checkpoints of both layouts against a forward pass in the code that writes them, and Keras's files."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from test_bit import as_first_layout, as_second_layout, random_bit
from test_savedmodel import difference, models_from_tensorflow  # noqa: F401

from funmatch.models.load import load

Arrays = dict[str, np.ndarray]


def forward(
    weights: Arrays, images: Any, conv: Callable[..., Any], norm: Callable[..., Any], pool: Callable[[Any], Any]
) -> Any:
    """The pre-activation residual network of BiT (its section 3.1), for images in [0, 1], (n, height, width, 3).

    Args:
        weights: by the names of the published files.
        conv: (images, kernel, stride) to their convolution, padded with as many zeros on each side.
        norm: (images, gamma, beta) to their group norm in 32 groups, rectified.
        pool: the first max-pool.
    """

    def kernel(name: str) -> np.ndarray:
        values = weights[f"{name}/kernel"].astype(np.float64)
        values = (values - values.mean((0, 1, 2))) / np.sqrt(values.var((0, 1, 2)) + 1e-10)
        return values.astype(np.float32)

    def activated(x: Any, name: str) -> Any:
        return norm(x, weights[f"{name}/gamma"], weights[f"{name}/beta"])

    x = pool(conv(2 * images - 1, kernel("root_block/standardized_conv2d"), 2))
    for unit in sorted({name.rsplit("/", 3)[0] for name in weights if "/c/" in name}):
        stride = 2 if unit.endswith("unit01") and not unit.startswith("block1/") else 1
        y = activated(x, f"{unit}/a/group_norm")
        if unit.endswith("unit01"):
            x = conv(y, kernel(f"{unit}/a/proj/standardized_conv2d"), stride)
        y = conv(y, kernel(f"{unit}/a/standardized_conv2d"), 1)
        y = conv(activated(y, f"{unit}/b/group_norm"), kernel(f"{unit}/b/standardized_conv2d"), stride)
        x += conv(activated(y, f"{unit}/c/group_norm"), kernel(f"{unit}/c/standardized_conv2d"), 1)
    features = np.asarray(activated(x, "group_norm")).mean((1, 2))
    return features @ weights["head/conv2d/kernel"][0, 0] + weights["head/conv2d/bias"]


def by_tensorflow(tf: Any, weights: Arrays, images: np.ndarray) -> np.ndarray:
    def padded(x: Any, by: int) -> Any:
        return tf.pad(x, [[0, 0], [by, by], [by, by], [0, 0]])

    def conv(x: Any, kernel: np.ndarray, stride: int) -> Any:
        return tf.nn.conv2d(padded(x, len(kernel) // 2), kernel, stride, "VALID")

    def norm(x: Any, gamma: np.ndarray, beta: np.ndarray) -> Any:
        n, height, width, channels = x.shape
        grouped = tf.reshape(x, [n, height * width, 32, channels // 32])
        mean, variance = tf.nn.moments(grouped, [1, 3], keepdims=True)
        return tf.nn.relu(tf.reshape((grouped - mean) / tf.sqrt(variance + 1e-5), x.shape) * gamma + beta)

    return forward(weights, tf.constant(images), conv, norm, lambda x: tf.nn.max_pool2d(padded(x, 1), 3, 2, "VALID"))


def by_jax(jax: Any, weights: Arrays, images: np.ndarray) -> np.ndarray:
    def conv(x: Any, kernel: np.ndarray, stride: int) -> Any:
        border = [(len(kernel) // 2,) * 2] * 2
        return jax.jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), border, dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
        )

    def norm(x: Any, gamma: np.ndarray, beta: np.ndarray) -> Any:
        layer = jax.nn.GroupNorm(32, epsilon=1e-5, use_fast_variance=False)
        return jax.nn.relu(layer.apply({"params": {"scale": gamma, "bias": beta}}, x))

    def pool(x: Any) -> Any:
        return jax.nn.max_pool(x, (3, 3), (2, 2), [(1, 1), (1, 1)])

    return forward(weights, jax.np.asarray(images), conv, norm, pool)


@pytest.mark.parametrize(("depth", "width"), [(50, 1), (101, 1), (50, 3)])
@pytest.mark.parametrize("layout", ["TensorFlow's", "big_vision's"])
def test_checkpoints(layout, depth, width, tf, jax, record, tmp_path):
    weights = random_bit(depth, width, seed=depth)
    images = np.random.default_rng(0).random((2, 96, 128, 3), np.float32)
    ours_first = layout == "TensorFlow's"
    expected = by_tensorflow(tf, weights, images) if ours_first else by_jax(jax, weights, images)
    np.savez(tmp_path / "w.npz", **(as_first_layout if ours_first else as_second_layout)(weights))
    with torch.inference_mode():
        found = load(str(tmp_path / "w.npz")).eval()(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    off = float(np.abs(found - expected).max() / np.abs(expected).max())
    record(
        f"logits of R{depth}x{width}.npz, {layout} layout",
        "TensorFlow" if ours_first else "JAX, flax",
        off,
        at_most=1e-4,
    )


def test_what_keras_saved(make_model, record):
    folder = make_model("--units", "2", "1", "1", "1", "--width", "32", "--groups", "32", "--classes", "7")
    kinds: dict[str, list[float]] = {}
    for path in sorted(folder.glob("*.npz")):
        kinds.setdefault(path.stem.partition("-")[0], []).append(difference(folder / path.stem))
    for kind, found in kinds.items():
        record(
            f"logits of Keras's `{kind}`, {len(found)} ways to save it",
            "TensorFlow, Keras 2 and 3",
            max(found),
            at_most=1e-4,
        )
