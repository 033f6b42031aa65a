"""Loads networks of image and text of Hugging Face's transformers, from folders and from the Hub."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import errors, hf_hub_download
from torch import Tensor

from funmatch.errors import InputError, first_line
from funmatch.models.classifier import fingerprint
from funmatch.models.clip.convert import ACTIVATIONS, Tower, transformers_tower
from funmatch.models.clip.names import CLIP, HUB, OPEN_CLIP_CONFIG, TRANSFORMERS_CONFIG, has_open_clip
from funmatch.models.clip.pair import Pair
from funmatch.models.timm_models import go_offline_if_unreachable
from funmatch.models.transformers.config import Kind, build_config, read_entries
from funmatch.models.transformers.folder import build_network, read_weights
from funmatch.models.transformers.hub import hub_folder
from funmatch.models.transformers.library import quiet, transformers_for
from funmatch.models.transformers.processor import read_images

TYPES = ("clip", "metaclip_2", "siglip")
"""Networks whose image tower timm has, too, by transformers' names of their types."""
TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model")
"""Patterns of the files of a tokenizer."""
VOCABULARY = ("tokenizer.json", "vocab.*", "*.model")
INPUTS = ("input_ids", "attention_mask")
TO_THE_END = ("siglip",)
"""Types that read each text filled up to the longest one, as they were trained."""


def fetch_transformers(name: str, repository: str) -> Path | None:
    """Returns the folder of a repository of transformers, fetched once; None for one that OpenCLIP is to load.

    Raises:
        InputError: there is no such repository, access to it is not granted, or the Hub cannot be reached.
    """
    go_offline_if_unreachable()
    if has_open_clip():
        try:
            hf_hub_download(repository, OPEN_CLIP_CONFIG)
            return None
        except (errors.EntryNotFoundError, errors.HFValidationError, OSError):
            pass  # not OpenCLIP's, or not there at all, which the next request says in words
    folder = hub_folder(HUB + repository, TOKENIZER)
    if folder is None:
        raise InputError(
            f"{name} is neither a network of transformers nor of OpenCLIP; it has no {OPEN_CLIP_CONFIG}, and its "
            f"{TRANSFORMERS_CONFIG} is another library's"
        )
    return folder


def load_transformers(name: str, folder: Path) -> Pair:
    """Loads a network of image and text of transformers.

    Args:
        name: as the user gave it.
        folder: with its configuration, weights, tokenizer and image processor.

    Raises:
        InputError: transformers is not installed, the network is of a type that is not offered, or files are missing
            or do not fit.
    """
    entries = _read_entries(folder)
    config, kind = build_config(folder, entries, {}), entries["model_type"]
    build = transformers_for(name).MODEL_MAPPING[type(config)]
    net: Any = build_network(folder, Kind(build, config, classifies=False), read_weights(folder)).eval()
    images, side = read_images(folder, config, None, None), config.vision_config.image_size
    if images.view.side != side:
        raise InputError(
            f"the processor of {folder} makes images of {images.view.side} pixels, but its network was built for {side}"
        )
    tower = _tower(folder, net, config.vision_config)
    bias, limit = getattr(net, "logit_bias", None), config.text_config.max_position_embeddings
    tokenizer = _tokenizer(folder)
    fills = {"padding": "max_length", "max_length": limit} if kind in TO_THE_END else {"padding": True}

    def encode(texts: list[str]) -> Tensor:
        with quiet():
            given = tokenizer(texts, return_tensors="pt", **fills)
            # Of its outputs only these: some tokenizers also say which sentence a token is of.
            found = net.get_text_features(**{key: given[key] for key in INPUTS if key in given})
        return torch.nn.functional.normalize(getattr(found, "pooler_output", found), dim=-1)

    def tokens(texts: Sequence[str]) -> list[list[int]]:
        with quiet():
            return tokenizer([*texts]).input_ids

    return Pair(
        name, tower, images.card(), encode, tokens, limit, float(net.logit_scale.detach().exp()),
        0.0 if bias is None else float(bias.detach()), bias is not None,
        fingerprint(net) + json.dumps(entries, sort_keys=True), images.notes,
    )  # fmt: skip


def _read_entries(folder: Path) -> dict[str, Any]:
    """Returns the configuration of a network of image and text; raises `InputError` if it is of another type."""
    path = folder / TRANSFORMERS_CONFIG
    entries = read_entries(path) if path.is_file() else None
    if entries is None:
        raise InputError(
            f"{folder} has neither {OPEN_CLIP_CONFIG} nor a {TRANSFORMERS_CONFIG} of transformers, so it cannot be "
            "loaded as a network of image and text"
        )
    kind = entries.get("model_type")
    if kind not in TYPES:
        raise InputError(
            f"{folder} is of transformers' type {kind}; {CLIP} takes {', '.join(TYPES)}, or OpenCLIP's layout"
        )
    return entries


def _tower(folder: Path, net: Any, config: Any) -> Tower:
    if config.hidden_act not in ACTIVATIONS:
        raise InputError(f"{folder} has the activation {config.hidden_act}, which timm does not have")
    try:
        return transformers_tower(net.state_dict(), config, config.image_size)
    except KeyError as error:
        raise InputError(f"{folder} has an image tower of another structure: {error.args[0]} is missing") from None


def _tokenizer(folder: Path) -> Any:
    transformers = transformers_for(str(folder))
    # Without its files, transformers makes one that knows no word.
    if not any(path for pattern in VOCABULARY for path in folder.glob(pattern)):
        raise InputError(f"{folder} has no tokenizer; copy tokenizer.json of the repository into the folder")
    try:
        with quiet():
            return transformers.AutoTokenizer.from_pretrained(
                str(folder), trust_remote_code=False, local_files_only=True
            )
    except Exception as error:  # tokenizers fail in as many ways as there are files
        raise InputError(
            f"{folder} has no tokenizer that can be read ({first_line(error)}); copy tokenizer.json and "
            "tokenizer_config.json of the repository into the folder"
        ) from error
