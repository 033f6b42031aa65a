"""Loads networks of transformers from folders as its `save_pretrained` writes them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from funmatch.errors import InputError, first_line, some_of
from funmatch.models.checkpoints.checkpoint import open_checkpoint, weights_in
from funmatch.models.origins.origin import CONFIG_KEYS, Origin, own_entries
from funmatch.models.transformers import processor
from funmatch.models.transformers.config import Kind, build_config, class_names, kind_of
from funmatch.models.transformers.library import quiet
from funmatch.models.transformers.network import POOLED, TransformersNet, probe

HEAD = "funmatch_head."
"""Prefix of the weights of a head that transformers' own class does not have."""
POOLER = ("pooler.", "layernorm_after_pooling.")
LISTED = 5
PROBLEMS = {"multi_label_classification": "multilabel", "single_label_classification": "multiclass"}
"""What transformers calls the tasks, in the `problem_type` of a `config.json`."""


def transformers_origin(folder: Path, entries: Mapping[str, Any], kwargs: dict[str, Any], side: int | None) -> Origin:
    """Returns the origin of a network of transformers.

    Args:
        folder: with `config.json`, weights and the configuration of a processor.
        entries: of `config.json`.
        kwargs: entries that replace those, and `resample` in place of the processor's.
        side: of the views that the user chose, pixels; None for the processor's.

    Raises:
        InputError: it needs code of its repository, weights are missing or left over, or network and processor
            contradict each other.
    """
    options = {key: value for key, value in kwargs.items() if key != processor.RESAMPLE}
    config = build_config(folder, entries, options)
    kind = kind_of(folder, config, entries)
    state = read_weights(folder)
    head = {key.removeprefix(HEAD): state.pop(key) for key in [*state] if key.startswith(HEAD)}
    model = build_network(folder, kind, state)
    if ours := entries.get("pretrained_cfg"):
        card, notes, flip = _own_card(entries, ours), (), bool(ours.get("flip"))
    else:
        images = processor.read_images(folder, config, side, kwargs.get(processor.RESAMPLE))
        card, notes, flip = images.card(), images.notes, images.flip
    card["task"] = card.get("task") or PROBLEMS.get(str(entries.get("problem_type")))
    net = TransformersNet(model, classes=kind.config.num_labels if kind.classifies else 0, flip=flip)
    if head:
        net.reset_classifier(len(head["bias"]))
        net.get_classifier()[0].load_state_dict(head)
    if net.pooled is not None and not net.num_classes:
        notes += (f"features are {POOLED[net.pooled]}",)
    if net.num_classes and (names := class_names(model.config)):
        card["label_names"] = names
    if not side and not ours:
        _check_side(folder, net, card["input_size"][-1])
    return Origin(str(folder), type(model).__name__, card=card, notes=notes, net=net)


def _own_card(entries: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the card that we wrote into the `config.json` of a student."""
    missing = [key for key in CONFIG_KEYS if key not in ours]
    if missing:
        raise InputError(f"pretrained_cfg of {entries.get('model_type')} lacks {', '.join(missing)}")
    card = {key: ours[key] for key in (*CONFIG_KEYS, "crop_mode", "interpolation") if key in ours}
    return card | own_entries(entries.get("funmatch") or {})


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Reads the tensors of a folder's weights, and nothing else of these files."""
    path = weights_in(folder)
    if path is None:
        raise InputError(f"{folder} has no model.safetensors")
    if (folder / "adapter_config.json").is_file():
        raise InputError(
            f"{folder} is an adapter for another network; merge it into that one and save the whole network"
        )
    entries = open_checkpoint(path).entries
    # One by one, and as single precision: half precision halves the file, not what is computed.
    read = {key.removeprefix(entry.home): entry.read() for key, entry in entries.items()}
    return {key: each.float() if each.is_floating_point() else each for key, each in read.items()}


def build_network(folder: Path, kind: Kind, state: dict[str, Tensor]) -> nn.Module:
    """Builds a network with the weights of a file, all of which it must take.

    Raises:
        InputError: weights are missing, left over, of another shape or not finite.
    """
    model, problems = _try(folder, kind, state)
    # Backbones are published with and without a pooler's weights.
    if problems and all(each.startswith(POOLER) for each in problems["missing"]) and not problems["other"]:
        model, problems = _try(folder, kind, state, add_pooling_layer=False)
    if problems:
        listed = "; ".join(
            f"{what}: {some_of(each, LISTED)}"
            for what, each in (("missing", problems["missing"]), ("not of this network", problems["other"]))
            if each
        )
        raise InputError(f"the weights of {folder} do not fit {kind.build.__name__}: {listed}")
    bad = [key for key, each in model.state_dict().items() if each.is_floating_point() and not each.isfinite().all()]
    if bad:
        raise InputError(f"the weights of {folder} have values that are not finite, as in {bad[0]}")
    return model


def _try(folder: Path, kind: Kind, state: dict[str, Tensor], **options: bool) -> tuple[nn.Module, dict[str, list[str]]]:
    """Builds a network, and lists the weights that are missing, and those that are left over or of another shape."""
    try:
        # Transformers renames tensors of earlier versions; files are read by us, and never by it.
        with quiet():
            model, about = kind.build.from_pretrained(
                None, config=kind.config, state_dict={**state}, output_loading_info=True, ignore_mismatched_sizes=True,
                attn_implementation="sdpa" if getattr(kind.build, "_supports_sdpa", False) else "eager",
                dtype=torch.float32, **options,
            )  # fmt: skip
    except Exception as error:  # constructors fail in as many ways as configurations can be wrong
        raise InputError(f"transformers cannot build {folder} as {kind.build.__name__}: {first_line(error)}") from error
    shapes = [f"{key} {tuple(found)}, expected {tuple(wanted)}" for key, found, wanted in about["mismatched_keys"]]
    left = sorted(str(key) for key in about["unexpected_keys"] if not str(key).startswith(kind.leaves or "\0"))
    missing = sorted(map(str, about["missing_keys"]))
    return model, {"missing": missing, "other": [*left, *sorted(shapes)]} if missing or left or shapes else {}


def _check_side(folder: Path, net: TransformersNet, side: int) -> None:
    """Raises `InputError` if the processor's images are not of the size that the network was built for."""
    if side == net.side or net.side is None:
        return
    # Position embeddings are fitted only where the user chose the size: transformers' own pipeline does not.
    try:
        with torch.no_grad(), quiet():
            net.eval().run(probe(net.model, side), fit=False)
    except Exception as error:  # networks fail in as many ways as they are built
        raise InputError(
            f"the processor of {folder} makes images of {side} pixels, but its network was built for {net.side} "
            f"({first_line(error)}); choose one with --side"
        ) from None
