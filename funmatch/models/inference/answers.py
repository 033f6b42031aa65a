"""Reads what a student matches of a network: logits, pooled features and tokens, as one row of numbers an image.

A row is [logits | pooled features | tokens], of several teachers [logits combined | pooled of each | tokens of each].
So an answer stays (n, width), as logits alone are, wherever answers are recorded, shared, cut into pieces or sent.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from funmatch.errors import InputError
from funmatch.models.classifier import Classifier
from funmatch.models.inference.features import (
    is_headless,
    is_in_halves,
    lacks_head,
    mean_given,
    watch_last_linear,
)
from funmatch.models.inference.outputs import logits_of
from funmatch.ops.features.grids import to_grid

Grid = tuple[int, int]
"""Rows and columns of a map of tokens."""


@dataclass(frozen=True)
class Parts:
    """Rows of answers, taken apart.

    Attributes:
        logits: (n, classes); of no columns where there are none.
        pooled: features of each teacher, (n, d).
        tokens: of each teacher, (n, tokens, d); none where rows hold none.
    """

    logits: Tensor
    pooled: list[Tensor]
    tokens: list[Tensor]


@dataclass(frozen=True)
class Layout:
    """Where the parts of a row are.

    Attributes:
        classes: number of logits, or 0.
        pooled: dimensions of each teacher's pooled features.
        tokens: dimensions of a token of each teacher, or none.
        grid: rows and columns of the tokens.
    """

    classes: int
    pooled: tuple[int, ...]
    tokens: tuple[int, ...] = ()
    grid: Grid = (0, 0)

    @property
    def judged(self) -> int:
        """Numbers in front of the tokens, which are many: what is compared on whole splits."""
        return self.classes + sum(self.pooled)

    @property
    def width(self) -> int:
        """Numbers of a row."""
        return self.judged + math.prod(self.grid) * sum(self.tokens)

    def split(self, rows: Tensor) -> Parts:
        """Takes rows apart, (n, width) or (n, judged); the parts share their memory."""
        logits, *pooled = rows[:, : self.judged].split((self.classes, *self.pooled), 1)
        if rows.shape[1] == self.judged:
            return Parts(logits, pooled, [])
        cells = math.prod(self.grid)
        tokens = rows[:, self.judged :].split([cells * each for each in self.tokens], 1)
        return Parts(logits, pooled, [each.unflatten(1, (cells, -1)) for each in tokens])

    def join(self, logits: Tensor, pooled: Tensor, tokens: Tensor | None) -> Tensor:
        """Joins the parts of a network that answers for all teachers: (n, classes), (n, Σ d), (n, tokens, Σ d)."""
        each = () if tokens is None else (part.flatten(1) for part in tokens.split(self.tokens, 2))
        return torch.cat([logits.float(), pooled.float(), *(part.float() for part in each)], 1)


@dataclass(frozen=True)
class Readout:
    """Reads a teacher's answers: called with a network and normalised images, it gives rows (n, width) in float32.

    Attributes:
        classes: number of logits that are read, or 0.
        grid: rows and columns of the tokens, or None.
    """

    classes: int
    grid: Grid | None = None

    def __call__(self, net: nn.Module, inputs: Tensor) -> Tensor:
        logits, pooled, maps = read(net, inputs, logits=self.classes > 0, tokens=self.grid is not None)
        parts = [] if logits is None else [logits.float()]
        parts.append(pooled.float())
        if maps is not None and self.grid:
            parts.append(to_grid(maps, self.grid).flatten(1))
        return torch.cat(parts, 1)


def read(
    net: Any, inputs: Tensor, *, logits: bool, tokens: bool, head_last: bool = False
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Computes a network's logits, its pooled features before the last layer, and its map of tokens.

    Args:
        net: a network for normalised images; only timm's have tokens.
        inputs: normalised images.
        logits, tokens: whether these are needed.
        head_last: whether the last layer alone makes logits of the pooled features.

    Returns:
        (n, classes) or None, (n, d), and (n, height, width, d) or None.

    Raises:
        InputError: it has no features, or no tokens.
    """
    if not is_in_halves(net):
        if tokens and callable(parts := getattr(net, "read_parts", None)):
            return parts(inputs)
        if tokens:
            raise InputError("a network that is not timm's has no tokens to match; leave out --match tokens")
        found, pooled = _read_by_hook(net, inputs)
        return found if logits else None, pooled, None
    maps = net.forward_features(inputs)
    # A network without classes has no layer to leave out, and its output is what it was made for.
    headless = lacks_head(net)
    pooled = net.forward_head(maps) if headless else net.forward_head(maps, pre_logits=True)
    found = None
    if logits:
        # Else the whole head once more: some have two last layers, or a convolution.
        found = net.get_classifier()(pooled) if head_last else net.forward_head(maps)
    return found, pooled.flatten(1), spatial_map(net, maps) if tokens else None


def _read_by_hook(net: nn.Module, inputs: Tensor) -> tuple[Tensor | None, Tensor]:
    """Reads a network that has no parts of its own: what its last linear layer gets, or its output without a head."""
    name = type(net).__name__
    if lacks_head(net) or not any(isinstance(each, nn.Linear) for each in net.modules()):
        return None, logits_of(net(inputs), name).flatten(1)
    output, seen = watch_last_linear(net, lambda: net(inputs))
    output = logits_of(output, name)
    # Another layer, such as one of attention, is followed by more than the classes.
    if not seen or seen[0][1].ndim != 2 or seen[0][0].out_features != output.shape[-1]:
        raise InputError(
            f"{name} has no features to match: it is not a timm network, and its last layer is not a "
            "torch.nn.Linear for rows of features"
        )
    return output, mean_given(seen)


def spatial_map(net: Any, maps: Tensor) -> Tensor:
    """Returns the output of a timm network's `forward_features` as a map, (n, height, width, d).

    Args:
        maps: (n, tokens, d) with class and register tokens in front, (n, d, height, width) or (n, height, width, d).

    Raises:
        InputError: it is none of these.
    """
    dimensions = vars(net).get("num_features")
    if maps.ndim == 4:
        # Swin and its kin keep the features last.
        last = maps.shape[1] != dimensions and maps.shape[-1] == dimensions
        return maps if last or getattr(net, "output_fmt", "NCHW") == "NHWC" else maps.permute(0, 2, 3, 1)
    if maps.ndim == 3:
        patches = maps[:, vars(net).get("num_prefix_tokens", 0) :]
        count = patches.shape[1]
        grid = getattr(getattr(net, "patch_embed", None), "grid_size", None)
        side = math.isqrt(count)
        if not grid or math.prod(grid) != count:
            grid = (side, side)  # of another image size than it was built for
        if math.prod(grid) == count:
            return patches.unflatten(1, tuple(grid))
    raise InputError(
        f"{type(net).__name__} has no map of tokens to match: its features have the shape {tuple(maps.shape[1:])}; "
        "leave out --match tokens"
    )


@torch.inference_mode()
def measure(classifier: Classifier, side: int, *, tokens: bool) -> tuple[int, int, Grid]:
    """Measures a network's answers on one image: dimensions of pooled features, of a token, and the map's size.

    Args:
        side: of the image, pixels.
        tokens: whether there are to be tokens; else their dimensions are 0.

    Raises:
        InputError: it has no features, or no tokens.
    """
    training, device = classifier.training, next(iter(classifier.net.parameters())).device
    try:
        inputs = classifier.eval().normalize(torch.zeros(1, 3, side, side, device=device))
        _, pooled, maps = read(classifier.net, inputs, logits=False, tokens=tokens)
    except InputError as error:
        raise InputError(f"{classifier.card.name}: {error}") from None
    finally:
        classifier.train(training)
    if maps is None:
        return pooled.shape[-1], 0, (0, 0)
    return pooled.shape[-1], maps.shape[-1], (maps.shape[1], maps.shape[2])


def read_out(classifier: Classifier, readout: Callable[[nn.Module, Tensor], Tensor]) -> Classifier:
    """Makes a classifier answer with rows where training compares it; returns it. Its logits stay as they are."""
    classifier.readout = readout
    return classifier


def teacher_readout(classifier: Classifier, *, logits: bool, grid: Grid | None) -> Readout:
    """Returns what is read of a teacher; `grid` is that of the tokens, None for none."""
    return Readout(classifier.num_classes if logits and not is_headless(classifier) else 0, grid)
