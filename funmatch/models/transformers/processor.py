"""Reads what images a network of transformers takes, from the configuration of its image processor."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from PIL import Image
from torch import Tensor

from funmatch.config.choices import EvalResample
from funmatch.errors import InputError, first_line
from funmatch.models.classifier import crop_fraction
from funmatch.models.transformers.library import quiet, transformers_for
from funmatch.models.transformers.network import own_side
from funmatch.ops.resizing.libraries import FROM_FILTER, TORCHVISION
from funmatch.ops.view_spec import Preprocessing
from funmatch.runtime.disk.json_files import parse_json

FILES = ("processor_config.json", "preprocessor_config.json")
"""Files that describe a processor; a part of the first, where it has one, goes before the second."""
RESAMPLE = "resample"
"""Option that replaces the method by which a processor resizes images."""
METHOD_NAMES: dict[str, EvalResample] = {name: name for name in get_args(EvalResample)}
PILLOW_ALONE = (Image.Resampling.BOX, Image.Resampling.HAMMING)
"""Filters that torchvision does not have for tensors, so that transformers' own default fails."""
LEVELS = 4
"""Largest difference from a processor's pixels, in grey levels: some do not round after resizing, or resize columns
before rows. A crop that is a pixel off makes more."""


@dataclass(frozen=True)
class Images:
    """What images a network takes.

    Attributes:
        view: from an image to what is normalised.
        mean, std: of the normalisation of values in [0, 1], red, green and blue.
        flip: whether the network takes blue, green and red.
        notes: sentences that a user should know.
    """

    view: Preprocessing
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool = False
    notes: tuple[str, ...] = ()

    def card(self) -> dict[str, Any]:
        """Returns entries of timm's `pretrained_cfg`, as `timm_models.card_of` reads them."""
        view = self.view
        return {
            "input_size": (len(self.mean), view.side, view.side),
            "crop_pct": crop_fraction(view.side, view.short_side),
            "crop_mode": "squash" if view.squash else "center",
            "mean": self.mean,
            "std": self.std,
            "resample": view.resample,
            "floor": view.floor,
        }


def read_images(folder: Path, config: Any, side: int | None, resample: str | None) -> Images:
    """Returns what images the network in a folder takes.

    Args:
        folder: with the configuration of the processor.
        config: of the network.
        side: that the user chose, pixels; it stands in where a processor does not resize images to a square.
        resample: method that the user chose in place of the processor's, one of `EvalResample`.

    Raises:
        InputError: the processor needs code of its repository, or does something that is not offered.
    """
    if resample is not None and resample not in METHOD_NAMES:
        raise InputError(f"{RESAMPLE}={resample} is not a method; expected {', '.join(METHOD_NAMES)}")
    processor, notes = _open_processor(folder, config)
    kind = type(processor).__name__.removesuffix("Pil")
    mean, std = _normalisation(processor, kind)
    channels = getattr(config, "num_channels", None)
    if isinstance(channels, int) and channels != len(mean):
        raise InputError(f"{folder} has {len(mean)} means in its processor, but its network takes {channels} channels")
    method = METHOD_NAMES[resample] if resample else _method(folder, processor)
    flip = bool(getattr(processor, "do_flip_channel_order", False))
    found = _geometry(folder, processor, kind)
    if isinstance(found, str):
        if side is None:
            raise InputError(f"{folder}: {found}, so the size of its images is not known; pass --side N")
        how = Preprocessing(side=side, short_side=side, resample=method)
        notes += (f"{found}; a central square is resized to --side",)
        return Images(how, mean, std, flip, notes)
    images = Images(replace(found, resample=method), mean, std, flip, notes)
    if resample is None and (difference := _difference(processor, images)) > LEVELS:
        raise InputError(
            f"{folder}: its {kind} does more than to resize, crop, rescale and normalise images (its pixels differ by "
            f"{difference:.0f} grey levels); pass it as package.module:function with a funmatch.Card of your own"
        )
    return images


def _open_processor(folder: Path, config: Any) -> tuple[Any, tuple[str, ...]]:
    """Returns the processor of a network, and a note where it is assumed."""
    transformers = transformers_for(str(folder))
    for name in FILES:
        path = folder / name
        if path.is_file() and "auto_map" in _read_json(path):
            raise InputError(
                f"{path} needs code of its repository, which is never run; remove auto_map from it if transformers has "
                "the processor itself"
            )
    is_there = any((folder / name).is_file() for name in FILES)
    try:
        with quiet():
            if is_there:
                options = {"config": config, "trust_remote_code": False, "local_files_only": True}
                # As users of transformers get it: its default resizes by torchvision.
                found = transformers.AutoImageProcessor.from_pretrained(str(folder), **options)
                if getattr(found, "resample", None) in PILLOW_ALONE:
                    found = transformers.AutoImageProcessor.from_pretrained(str(folder), backend="pil", **options)
                return found, ()
            classes = transformers.IMAGE_PROCESSOR_MAPPING[type(config)]
            if (built_for := own_side(config)) is None:
                raise ValueError("its configuration names no square size of images")
            fitting = {"size": {"height": built_for, "width": built_for}, "do_center_crop": False}
            processor = (classes.get("torchvision") or classes["pil"])(**fitting)
    except Exception as error:  # libraries fail in as many ways as files can be wrong
        missing = "" if is_there else f"has no {FILES[1]}, and what images it takes cannot be assumed"
        raise InputError(
            f"{folder} {missing or 'has a processor that cannot be read'} ({first_line(error)}); "
            f"copy {FILES[1]} of the repository into the folder"
        ) from error
    kind = type(processor).__name__.removesuffix("Pil")
    note = f"{folder} has no {FILES[1]}; assuming the defaults of {kind}: mean {_short(processor.image_mean)}"
    return processor, (f"{note}, std {_short(processor.image_std)}",)


def _short(values: Any) -> str:
    return " ".join(f"{value:.3g}" for value in values)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return parse_json(path.read_bytes(), dict)
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({first_line(error)})") from None


def _method(folder: Path, processor: Any) -> EvalResample:
    if getattr(processor, "do_resize", True) is False:
        return "antialias"
    number = getattr(processor, "resample", None)
    # Newer versions of Pillow have filters of other numbers.
    name = {int(Image.Resampling[each.upper()]): each for each in FROM_FILTER}.get(2 if number is None else int(number))
    if name is None:
        raise InputError(
            f"{folder}: its processor resizes images by a method that is not offered (resample {number}); pass "
            f"{RESAMPLE}=antialias or {RESAMPLE}=bicubic in --teacher-kwargs, --student-kwargs or --model-kwargs to "
            "resize them so instead"
        )
    # Torchvision has no filters of its own for some names.
    own = METHOD_NAMES.get(f"{TORCHVISION}{name}") if getattr(processor, "backend", "") == "torchvision" else None
    return own or FROM_FILTER[name]


def _normalisation(processor: Any, kind: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and standard deviation for values in [0, 1] that do what a processor does to bytes.

    A processor computes ((byte · factor − offset) − mean) / std.
    """
    is_efficientnet = kind == "EfficientNetImageProcessor"
    factor = float(processor.rescale_factor) if processor.do_rescale else 1.0
    offset = 1.0 if is_efficientnet and processor.do_rescale and processor.rescale_offset else 0.0
    # MobileViT's has a mean and a standard deviation that it does not use.
    normalises = processor.do_normalize and kind != "MobileViTImageProcessor"
    plain = [float(each) for each in processor.image_std or (1.0, 1.0, 1.0)]
    mean = [float(each) for each in processor.image_mean] if normalises else [0.0] * len(plain)
    std = plain if normalises else [1.0] * len(plain)
    # EfficientNet's divides by the standard deviation once more for networks with a head.
    if is_efficientnet and processor.include_top:
        std = [each * again for each, again in zip(std, plain, strict=True)]
    scale = 255 * factor
    # 1/255 is not exact, and 255 of it should leave the numbers as people know them.
    scale = 1.0 if abs(scale - 1) < 1e-9 else scale
    return tuple((each + offset) / scale for each in mean), tuple(each / scale for each in std)


def _geometry(folder: Path, processor: Any, kind: str) -> Preprocessing | str:
    """Returns how a processor resizes and crops, or a clause that says why its images have no size of their own."""
    if not processor.do_resize:
        return "its processor does not resize images"
    size, crop = _sides(getattr(processor, "size", None)), None
    if getattr(processor, "do_center_crop", False):
        crop = _sides(processor.crop_size)
    short, height = size.get("shortest_edge"), size.get("height")
    # The whole image becomes a square, or its short side is resized and the rest kept in proportion.
    squash = short is None
    if short is None and (height is None or height != size.get("width")):
        return f"its processor resizes images to {_listed(size) or 'no size of their own'}, which is not a square"
    length = side = short or height or 0
    if kind == "ConvNextImageProcessor":
        squash, length = (True, side) if side >= 384 else (False, int(side / processor.crop_pct))
    elif kind == "PoolFormerImageProcessor" and processor.crop_pct:
        squash, length = False, int(side / processor.crop_pct)
    elif kind == "LevitImageProcessor" and short:
        length = int((256 / 224) * side)
    if crop is not None:
        side = crop.get("height") or 0
        if side != crop.get("width") or not side:
            return f"its processor crops images to {_listed(crop)}, which is not a square"
    elif not squash and kind != "ConvNextImageProcessor":
        return "its processor leaves images their aspect"
    if length < side:
        raise InputError(
            f"{folder}: its processor pads images of {length} pixels to {side}, which is not offered; change size or "
            f"crop_size in its {FILES[1]}"
        )
    return Preprocessing(side=side, short_side=length, squash=squash, floor=True)


def _sides(size: Any) -> dict[str, int]:
    return {key: int(value) for key, value in dict(size or {}).items() if value is not None}


def _listed(sizes: dict[str, int]) -> str:
    return ", ".join(f"{key} {value}" for key, value in sizes.items())


def _difference(processor: Any, images: Images) -> float:
    """Returns the largest difference of our pixels from a processor's, in grey levels; infinite for another shape."""
    mean, std = (torch.tensor(each).view(-1, 1, 1) for each in (images.mean, images.std))
    largest = 0.0
    # One wide and one high image, smooth and coloured; of odd lengths, where corners of crops must be rounded.
    short = images.view.short_side + images.view.short_side // 3
    for height, width in ((short, short + 31), (short + 58, short + 1)):
        image = _gradient(height, width)
        with quiet():
            expected = processor(images=image.numpy(), return_tensors="pt", input_data_format="channels_last")
        pixels = expected.get("pixel_values")
        if pixels is None or pixels.shape[1:] != (3, images.view.side, images.view.side):
            return float("inf")
        ours = (images.view.view(image) - mean) / std
        found = pixels[0].flip(0) if images.flip else pixels[0]
        largest = max(largest, float((255 * std * (found.float() - ours)).abs().max()))
    return largest


def _gradient(height: int, width: int) -> Tensor:
    """Returns a smooth image in three colours, (height, width, 3) uint8."""
    rows, columns = torch.arange(height)[:, None, None] / 11, torch.arange(width)[None, :, None] / 13
    waves = torch.sin(rows + columns * torch.tensor([1.0, -0.6, 0.3]) + torch.tensor([0.0, 1.0, 2.0]))
    return (127.5 + 100 * waves).round().to(torch.uint8)
