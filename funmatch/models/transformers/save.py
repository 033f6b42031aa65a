"""Saves networks of transformers as folders that transformers and this package load."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from funmatch.models.classifier import Card
from funmatch.models.inference.outputs import is_close
from funmatch.models.transformers import processor
from funmatch.models.transformers.config import classifiers_for
from funmatch.models.transformers.folder import HEAD
from funmatch.models.transformers.library import quiet
from funmatch.models.transformers.network import PROBE_SIDE, TransformersNet
from funmatch.ops.resizing.libraries import filter_of
from funmatch.runtime.disk.json_files import read_json


def save_transformers(net: TransformersNet, folder: Path, card: Card) -> dict[str, Any]:
    """Writes weights, the processor's configuration and `config.json` as transformers loads them.

    Args:
        net: on the CPU.
        folder: an empty folder.
        card: input and class names.

    Returns:
        the contents of `config.json`, for our own entries to be added.
    """
    net = with_own_head(net) or net
    with quiet():
        net.model.save_pretrained(str(folder), max_shard_size="1000GB")
    path = folder / "model.safetensors"
    if net.head is not None:
        own = {f"{HEAD}{key}": each.contiguous() for key, each in net.head.state_dict().items()}
        save_file(load_file(path) | own, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors writes files that only their owner can read
    config = read_json(folder / "config.json", dict)
    names = card.classes or [f"LABEL_{number}" for number in range(net.num_classes)]
    if net.num_classes:
        config |= {"id2label": {str(number): name for number, name in enumerate(names)}}
        config |= {"label2id": {name: number for number, name in enumerate(names)}}
    if card.task == "multilabel":
        config["problem_type"] = "multi_label_classification"  # by which its pipeline takes probabilities
    (folder / processor.FILES[1]).write_text(json.dumps(_processor_config(card, flip=net.flip), indent=2))
    return config | {"pretrained_cfg": {"flip": net.flip}}


@torch.no_grad()
def with_own_head(net: TransformersNet) -> TransformersNet | None:
    """Returns a network that got a head as transformers' own classifier; None where that is another function.

    A linear layer on a ConvNeXt's pooled features is its `ForImageClassification`; DINOv2's takes the mean token, too.
    """
    kinds = classifiers_for(net.model.config)
    if net.head is None or len(kinds) != 1:
        return None
    config = copy.deepcopy(net.model.config)
    config.num_labels = net.num_classes
    # Without an effect on the random numbers that a run draws.
    with torch.random.fork_rng(devices=[]), quiet():
        model = kinds[0](config).eval()
        missing = getattr(model, model.base_model_prefix).load_state_dict(net.model.state_dict(), strict=False)
        found = TransformersNet(model, classes=net.num_classes, flip=net.flip)
        layers = found.get_classifier()
        if missing.missing_keys or len(layers) != 1 or layers[0].weight.shape != net.head.weight.shape:
            return None
        layers[0].load_state_dict(net.head.state_dict())
        side, channels = net.side or PROBE_SIDE, getattr(config, "num_channels", 3)
        views = torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(0))
        expected = net.eval()(views)
        same = is_close(found(views), expected)
    return found if same else None


def _processor_config(card: Card, *, flip: bool) -> dict[str, Any]:
    """Returns the configuration of a processor that shows images as a card says, up to a pixel at the crop's corner."""
    short = round(card.side / card.crop_fraction)
    size = {"height": short, "width": short} if card.squash else {"shortest_edge": short}
    config = {
        "image_processor_type": "DeiTImageProcessor" if card.squash else "BitImageProcessor",
        "do_resize": True, "size": size, "resample": int(Image.Resampling[filter_of(card.resample).upper()]),
        "do_center_crop": True, "crop_size": {"height": card.side, "width": card.side},
        "do_rescale": True, "rescale_factor": 1 / 255, "do_convert_rgb": True,
        "do_normalize": True, "image_mean": list(card.mean), "image_std": list(card.std),
    }  # fmt: skip
    # MobileViT's processor alone swaps colours, and normalises nothing.
    return config | ({"image_processor_type": "MobileViTImageProcessor", "do_flip_channel_order": True} if flip else {})
