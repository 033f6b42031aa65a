"""Saves a classifier as a folder that timm loads without this package."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import nn

from funmatch.models import bit
from funmatch.models.classifier import Card, Classifier, timm_config, to_memory_format
from funmatch.models.inference.outputs import NEAR, is_close
from funmatch.models.names import GIVEN
from funmatch.models.transformers.network import TransformersNet
from funmatch.models.transformers.save import save_transformers
from funmatch.ops.resizing.libraries import filter_of
from funmatch.runtime.disk.json_files import read_json

# Entries of timm's configuration that describe the architecture's published weights, and would be wrong for ours.
ABOUT_OTHER_WEIGHTS = (
    "tag",
    "test_input_size",
    "test_crop_pct",
    "pool_size",
    "license",
    "origin_url",
    "paper_ids",
    "notes",
)


def save(classifier: Classifier, folder: Path, *, card: Card, about: dict[str, Any]) -> None:
    """Writes `model.safetensors` and `config.json` in timm's own layout, or in transformers' for a network of its.

    `timm.create_model("local-dir:<folder>", pretrained=True)` then loads the network with the same logits. A network
    that is not timm's, or was changed after timm built it, is written in the same layout for this package alone.

    Args:
        classifier: on the CPU. Its memory layout changes, and its BiT kernels may be scaled, so that they are the same
            function with timm's eps.
        folder: an empty folder.
        card: input and class names to save.
        about: provenance, saved under the key `funmatch`.
    """
    # Files of tensors have no memory layout and no shared tensors.
    to_memory_format(classifier.net, torch.contiguous_format)
    _untie(classifier.net)
    if isinstance(classifier.net, TransformersNet):
        config = save_transformers(classifier.net, folder, card)
        _write_config(config, classifier, folder, replace(card, classes=None), about)
        return
    if classifier.function or not _save_with_timm(classifier, folder, card, about):
        for file in folder.iterdir():  # what the attempt with timm left
            file.unlink()
        # `bit.network` builds with timm's eps, whether this network came from there or from a published file.
        if classifier.function == bit.OWN:
            bit.rescale_for_timm(classifier.net)
        save_file(classifier.net.state_dict(), folder / "model.safetensors")
        architecture = classifier.function or classifier.card.name
        config = {"architecture": architecture, "num_classes": classifier.num_classes, "pretrained_cfg": {}}
        _write_config(config, classifier, folder, card, about)


def _save_with_timm(classifier: Classifier, folder: Path, card: Card, about: dict[str, Any]) -> bool:
    """Saves a network that timm built; returns False if it did not, or would build another from these files."""
    net = classifier.net
    if not timm_config(net):
        return False
    # A module from Python may have been changed after timm built it, which only a comparison of logits shows.
    given = classifier.card.name.startswith(GIVEN)
    # Copied before scaling, so that a failed attempt leaves the network as it was.
    before = copy.deepcopy(net) if given else net
    bit.rescale_for_timm(net)
    try:
        timm.models.save_for_hf(net, str(folder), safe_serialization=True)
        (folder / "model.safetensors").chmod(0o644)  # safetensors writes files that only their owner can read
        _write_config(read_json(folder / "config.json", dict), classifier, folder, card, about)
        if not given or _same_logits(before, timm.create_model(f"local-dir:{folder}", pretrained=True), card):
            return True
    except (ValueError, TypeError, RuntimeError):
        if not given:
            raise
    classifier.net = before
    return False


@torch.no_grad()
def _same_logits(net: nn.Module, other: nn.Module, card: Card) -> bool:
    """Returns whether two networks have the same logits, up to rounding."""
    probe = torch.randn(2, len(card.mean), card.side, card.side, generator=torch.Generator().manual_seed(0))
    expected, actual = net.eval()(probe), other.eval()(probe)
    return is_close(actual, expected, NEAR)


def _write_config(
    config: dict[str, Any], classifier: Classifier, folder: Path, card: Card, about: dict[str, Any]
) -> None:
    """Writes `config.json`, with the values of the card."""
    for key in ABOUT_OTHER_WEIGHTS:
        config["pretrained_cfg"].pop(key, None)
    config["pretrained_cfg"] |= {
        "input_size": [len(card.mean), card.side, card.side],
        "crop_pct": card.crop_fraction,
        "crop_mode": "squash" if card.squash else "center",
        # timm's transform always resizes by Pillow; `funmatch.eval_resample` says where the run did not.
        "interpolation": filter_of(card.resample),
        "mean": list(card.mean),
        "std": list(card.std),
    }
    if card.classes:
        config["label_names"] = list(card.classes)
    config["model_args"] = config.get("model_args", {}) | classifier.options
    config["funmatch"] = about | {"eval_resample": card.resample} | ({"eval_floor": True} if card.floor else {})
    if card.task == "multilabel":
        config["funmatch"]["task"] = card.task  # one class an image is what all others give
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _untie(net: nn.Module) -> None:
    """Copies parameters that share memory with others, which safetensors refuses to save."""
    pointers: set[int] = set()
    for owner in net.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            # Empty tensors all have the pointer 0.
            if parameter.data_ptr() in pointers and parameter.numel():
                setattr(owner, name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
            pointers.add(parameter.data_ptr())
