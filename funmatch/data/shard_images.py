"""Encodes images for TFRecord shards: as JPEG, resized where that is wanted."""

from dataclasses import dataclass
from io import BytesIO

import numpy as np
import torch
from PIL import Image

from funmatch.config.choices import Fit, ShardResample
from funmatch.data.cache.storing import CacheOptions
from funmatch.data.decode import decode, header
from funmatch.ops.crops import resize

QUALITY = 95
JPEG_MAGIC = b"\xff\xd8\xff"


@dataclass(frozen=True)
class Resizing:
    """How images are resized.

    Attributes:
        side: pixels.
        fit: `squash` makes a square of `side`, whatever the image's aspect; `keep` makes the shorter side as long.
        resample: bilinear or bicubic with antialias, as Pillow, or `tf`, bilinear without it.
    """

    side: int
    fit: Fit = "squash"
    resample: ShardResample = "antialias"

    def size_of(self, height: int, width: int) -> tuple[int, int]:
        """Returns the height and width that an image of this size gets, pixels."""
        if self.fit == "squash":
            return self.side, self.side
        short = min(height, width)
        return round(height * self.side / short), round(width * self.side / short)

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """Resizes an image, (height, width, 3) uint8."""
        height, width = self.size_of(*pixels.shape[:2])
        if self.resample == "tf":
            return resize_without_antialias(pixels, height, width)
        filters = {"antialias": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
        return np.asarray(Image.fromarray(pixels).resize((width, height), filters[self.resample]))


def resize_without_antialias(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes an image, (height, width, 3) uint8, as `tf.image.resize` does by default, rounded to bytes."""
    # A copy: decoders return arrays that are read-only, which torch warns of.
    resized = resize(torch.from_numpy(pixels.copy()), height, width)
    return resized.permute(1, 2, 0).round().clamp(0, 255).byte().numpy()


def jpeg(encoded: bytes, resizing: Resizing | None, cache_options: CacheOptions) -> bytes:
    """Returns an image as a JPEG: its own bytes where possible, else decoded, resized and encoded again."""
    if resizing is None and encoded[:3] == JPEG_MAGIC and not header(encoded, cache_options.limits).kinds:
        # Decoded only as a check: a truncated JPEG has a valid header.
        decode(encoded, decoder=cache_options.decoder, limits=cache_options.limits)
        return encoded
    pixels = decode(encoded, decoder=cache_options.decoder, limits=cache_options.limits)
    file = BytesIO()
    # No chroma subsampling: it would halve the resolution of colour in images that are small already.
    Image.fromarray(resizing.apply(pixels) if resizing else pixels).save(file, "JPEG", quality=QUALITY, subsampling=0)
    return file.getvalue()
