"""Reads images that are given in Python: paths, PIL images, NumPy arrays and tensors."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from funmatch.config import ImageOptions
from funmatch.data.decode import decode_opened
from funmatch.errors import InputError
from funmatch.runtime.addresses import allow, is_address
from funmatch.shipping import inference
from funmatch.shipping.sources.files import Decoding, one_file
from funmatch.shipping.sources.find import names_several, open_images

CHANNELS = (1, 3, 4)
WANTED = (
    "wanted paths, PIL images, NumPy arrays or tensors (height × width × 3, or 3 × height × width), or a list of such"
)


@dataclass(frozen=True)
class GivenImage:
    """An image that was given as an object.

    Attributes:
        value: a PIL image, or (height, width, channels) uint8.
        path: its name in messages.
    """

    value: Image.Image | np.ndarray
    path: str = ""

    def pixels(self, how: Decoding) -> np.ndarray:
        """Returns it as a file of it would be decoded, (height, width, 3) uint8."""
        value = self.value
        if isinstance(value, np.ndarray):
            if value.shape[-1] == 3 and min(value.shape[:2]) <= how.cap:
                return value
            value = Image.fromarray(value[..., 0] if value.shape[-1] == 1 else value)
        return decode_opened(value, how.cap)


def is_single(images: Any) -> bool:
    """Returns whether what was given is one image rather than several."""
    if isinstance(images, str | Path):
        single = os.path.isfile(os.path.expanduser(images)) or is_address(str(images))
        return single and not names_several(str(images))
    return isinstance(images, Image.Image) or (isinstance(images, np.ndarray | Tensor) and images.ndim in (2, 3))


def read_given(images: Any, config: ImageOptions) -> Iterator[inference.Image]:
    """Yields images that are given in Python, one by one.

    Args:
        images: one image, or several: a path (of a file, a folder, a pattern, a data set), a PIL image, an array or
            tensor of one image or of a batch, or an iterable of such.
        config: how files are read.

    Raises:
        InputError: something given is not an image.
    """
    if isinstance(images, str | Path):
        allow(str(images))
        # Alone, a path that names nothing is an error; in a list it is an image that cannot be read.
        yield from open_images(config, (str(images),)).images
        return
    if is_single(images):
        images = [images]
    if not isinstance(images, Iterable) or isinstance(images, bytes | dict):
        raise InputError(f"images: {WANTED}; got {type(images).__name__}")
    for number, value in enumerate(images):
        if isinstance(value, str | Path):
            allow(str(value))
            named = names_several(str(value)) or is_address(str(value))
            yield from open_images(config, (str(value),)).images if named else [one_file(os.path.expanduser(value))]
        elif isinstance(value, Image.Image):
            yield GivenImage(value, str(getattr(value, "filename", "") or ""))
        elif isinstance(value, np.ndarray | Tensor):
            yield GivenImage(_checked(value, number))
        else:
            raise InputError(f"image {number}: {WANTED}; got {type(value).__name__}")


def _checked(value: np.ndarray | Tensor, number: int) -> np.ndarray:
    """Returns an image as (height, width, channels) uint8.

    Raises:
        InputError: its shape, type or range is not that of an image.
    """
    is_tensor = isinstance(value, Tensor)
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        # NumPy has no bfloat16.
        array = (value.float() if value.is_floating_point() else value).numpy()
    else:
        array = value
    shape = tuple(array.shape)
    if array.ndim == 2:
        array = array[..., None]
    elif array.ndim != 3:
        raise InputError(f"image {number} has the shape {shape}; expected height × width × 3, or 3 × height × width")
    # Where both ends could be channels: tensors have them first, arrays last.
    first, last = array.shape[0] in CHANNELS, array.shape[-1] in CHANNELS
    if len(shape) == 3 and first and (is_tensor or not last):
        array = array.transpose(1, 2, 0)
    elif not last:
        raise InputError(f"image {number} has the shape {shape}; expected height × width × 3, or 3 × height × width")
    if 0 in shape:
        raise InputError(f"image {number} has the shape {shape}, which holds no pixels")
    if np.issubdtype(array.dtype, np.floating):
        # NaN fails the comparison, too.
        if not (array.min() >= 0 and array.max() <= 1):
            raise InputError(
                f"image {number} has values from {array.min():.4g} to {array.max():.4g}; expected floats from 0 to 1 "
                "(not normalised), or uint8"
            )
        # 8 bits, as a file holds them: the model's preprocessing is that of evaluation.
        array = (array * 255).round().astype(np.uint8)
    elif array.dtype != np.uint8:
        raise InputError(f"image {number} is of {array.dtype}; expected uint8, or floats from 0 to 1")
    return np.ascontiguousarray(array)
