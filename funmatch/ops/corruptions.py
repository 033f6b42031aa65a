"""Corrupts views as cameras, codecs and editors do, at five severities, by the transforms of torchvision.

After Hendrycks & Dietterich, "Benchmarking neural network robustness to common corruptions and perturbations", 2019,
whose own files they are not: accuracies compare between models evaluated here, and not with those of ImageNet-C.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

SEVERITIES = (1, 2, 3, 4, 5)
ELASTIC_GRID = 9
"""Points a side between which the displacements of `elastic` are interpolated."""
Corruption = Callable[[Tensor, float], Tensor]
"""Views (3, side, side) in [0, 1] and a strength, to the corrupted views."""


def _noise(view: Tensor, sigma: float) -> Tensor:
    return tv.gaussian_noise(view, sigma=sigma)


def _blur(view: Tensor, strength: float) -> Tensor:
    side = view.shape[-1]
    sigma = strength * side**0.5
    # To three deviations, at most the view: the reflected border may not be wider.
    radius = min(max(1, round(3 * sigma)), side - 1)
    return tv.gaussian_blur(view, [2 * radius + 1] * 2, [sigma] * 2) if radius else view


def _jpeg(view: Tensor, quality: float) -> Tensor:
    # Pillow's, since torchvision is about to drop its own codec.
    file = BytesIO()
    Image.fromarray(tv.to_dtype(view, torch.uint8, scale=True).permute(1, 2, 0).numpy()).save(
        file, "JPEG", quality=int(quality)
    )
    file.seek(0)
    decoded = torch.from_numpy(np.array(JpegImageFile(file)))
    return tv.to_dtype(decoded.permute(2, 0, 1), torch.float32, scale=True)


def _posterize(view: Tensor, bits: float) -> Tensor:
    return tv.posterize(view, int(bits))


def _elastic(view: Tensor, share: float) -> Tensor:
    # On a coarse grid, so that parts of the image move and not single pixels, and the same parts at every size.
    coarse = torch.rand(1, 2, ELASTIC_GRID, ELASTIC_GRID) * 2 - 1
    shift = tv.resize(coarse, [view.shape[-1]] * 2, InterpolationMode.BICUBIC, antialias=False)
    # Displacements are in halves of the side.
    shift = shift / coarse.norm(dim=1).mean() * 2 * share
    return tv.elastic(view, shift.permute(0, 2, 3, 1)).clamp(0, 1)


def _pixelate(view: Tensor, share: float) -> Tensor:
    side = view.shape[-1]
    small = tv.resize(view, [max(1, round(share * side))] * 2, InterpolationMode.BILINEAR, antialias=True)
    return tv.resize(small, [side] * 2, InterpolationMode.NEAREST_EXACT)


# Elastic and pixelate by shares of the side, blur by its root: at 32 pixels as in CIFAR-10-C, at 224 as in ImageNet-C.
CORRUPTIONS: dict[str, tuple[Corruption, tuple[float, ...]]] = {
    "noise": (_noise, (0.04, 0.08, 0.12, 0.18, 0.26)),
    "blur": (_blur, (0.07, 0.11, 0.16, 0.20, 0.27)),
    "brightness": (tv.adjust_brightness, (1.2, 1.4, 1.7, 2.0, 2.5)),
    "darkness": (tv.adjust_brightness, (0.75, 0.6, 0.45, 0.3, 0.2)),
    "contrast": (tv.adjust_contrast, (0.75, 0.6, 0.45, 0.3, 0.15)),
    "saturation": (tv.adjust_saturation, (0.7, 0.4, 0.0, 2.5, 5.0)),
    "jpeg": (_jpeg, (40, 25, 15, 10, 5)),
    "solarize": (tv.solarize, (0.95, 0.85, 0.75, 0.65, 0.5)),
    "posterize": (_posterize, (5, 4, 3, 2, 1)),
    "elastic": (_elastic, (0.005, 0.01, 0.015, 0.02, 0.03)),
    "pixelate": (_pixelate, (0.7, 0.55, 0.4, 0.3, 0.2)),
}
"""The corruptions, and the strength of each severity: deviation of the noise, in [0, 1]; deviation of the blur, over
the root of the side; factors of brightness, contrast and saturation; JPEG quality; threshold of solarize; bits of each
channel; mean shift (elastic) and size (pixelate), as shares of the side."""


@dataclass(frozen=True)
class Damage:
    """One corruption of views.

    Attributes:
        name: a key of `CORRUPTIONS`.
        severity: 1 to 5.
        seed: of noise and displacements.
    """

    name: str
    severity: int
    seed: int = 0

    def apply(self, views: Tensor, first: int = 0) -> Tensor:
        """Corrupts views (n, 3, side, side) in [0, 1]; returns new ones of the same shape, on the CPU.

        Each is a function of its own number and the seed alone: batches of another size, and other models, see the
        same.

        Args:
            first: number of the first view.
        """
        function, strengths = CORRUPTIONS[self.name]
        corrupted = torch.empty_like(views, device="cpu")
        # torchvision draws from the global generator, whose state is put back.
        with torch.random.fork_rng(devices=[]):
            for place, view in enumerate(views.cpu()):
                torch.manual_seed(zlib.crc32(f"{self.seed} {self.name} {first + place}".encode()))
                corrupted[place] = function(view, strengths[self.severity - 1])
        return corrupted
