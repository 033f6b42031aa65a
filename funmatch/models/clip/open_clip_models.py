"""Loads networks of image and text by OpenCLIP: its own names, repositories and folders in its layout."""

import json
import logging
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from funmatch.errors import InputError, first_line, is_out_of_memory, unknown
from funmatch.models.checkpoints.torch_files import HOW_TO_SAVE
from funmatch.models.classifier import fingerprint
from funmatch.models.clip.convert import open_clip_tower
from funmatch.models.clip.names import HUB, LOCAL, OPEN_CLIP_CONFIG, ClipName, require_open_clip
from funmatch.models.clip.pair import Pair
from funmatch.runtime.disk.json_files import parse_json

CONFIG = {"model_cfg": {"embed_dim": int, "vision_cfg": dict, "text_cfg": dict}, "preprocess_cfg?": dict}
"""What `open_clip_config.json` holds."""
OF_CODE = ("trust_remote_code", "code_revision", "auto_map")
"""Keys by which a configuration would have transformers run code that came with it."""


def load_open_clip(name: str, model: ClipName, weights: Path | None) -> Pair:
    """Loads a network of OpenCLIP.

    Args:
        name: as the user gave it.
        model: what it means.
        weights: a file with weights, for an architecture without a tag.

    Raises:
        InputError: OpenCLIP is not installed, the tag is unknown, or weights are missing or do not fit.
    """
    require_open_clip(name)
    import open_clip

    notes: tuple[str, ...] = ()
    options: dict[str, Any] = {}
    if model.architecture:
        found = open_clip.get_model_config(model.architecture)
        assert found is not None, "architectures are named after the files that it reads"
        spelled, config = model.architecture, found
        trained = {} if weights else _of_tag(name, model)
        # Weights that were trained with one activation are another function with the other.
        wanted = bool(trained.get("quick_gelu", config.get("quick_gelu")))
        if trained and wanted != bool(config.get("quick_gelu")):
            options["quick_gelu"] = config["quick_gelu"] = wanted
            notes = (f"{model.tag} was trained with {'QuickGELU' if wanted else 'GELU'}, which is used",)
        pretrained = str(weights) if weights else model.tag
    else:
        spelled = f"{HUB}{model.repository}" if model.repository else f"{LOCAL}{model.folder}"
        config, pretrained = _read_config(name, model), None
    with _plain_errors(name):
        net = open_clip.create_model(
            spelled, pretrained=pretrained, pretrained_text=False, require_pretrained=True, weights_only=True, **options
        ).eval()
        tokenizer = _tokenizer(spelled, config)
    pair = _pair(name, net, config, tokenizer)
    return replace(pair, notes=notes + pair.notes)


def _of_tag(name: str, model: ClipName) -> dict[str, Any]:
    """Returns what OpenCLIP knows of published weights; raises `InputError` if it has none of this tag."""
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    tags = list_pretrained_tags_by_model(model.architecture)
    if not model.tag:
        some = f"add a tag ({', '.join(tags)}), or" if tags else "pass"
        raise InputError(
            f"{name} is an architecture without weights; {some} a file of weights (--teacher-weights; other commands: "
            "--weights)"
        )
    if found := get_pretrained_cfg(model.architecture, model.tag):
        return found
    # All of them: they are few, and seldom near to each other.
    hint = f"its tags are {', '.join(tags)}" if len(tags) > 20 else ""
    raise unknown(f"tag of {model.architecture}", model.tag, tags, hint=hint)


def _read_config(name: str, model: ClipName) -> dict[str, Any]:
    """Reads the configuration of a folder or repository, and refuses one that asks for code to be run."""
    if model.folder:
        path = model.folder / OPEN_CLIP_CONFIG
    else:
        from huggingface_hub import hf_hub_download

        with _plain_errors(name):
            path = Path(hf_hub_download(model.repository, OPEN_CLIP_CONFIG))
    try:
        content = parse_json(path.read_bytes(), CONFIG)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not the configuration of a model of OpenCLIP ({first_line(error)})") from None
    text = json.dumps(content)
    if asked := [key for key in OF_CODE if f'"{key}"' in text]:
        raise InputError(
            f"{path} asks for code that comes with the model to be run ({', '.join(asked)}); it is not used"
        )
    return content["model_cfg"]


def _tokenizer(spelled: str, config: dict[str, Any]) -> Any:
    import open_clip

    # Said, since transformers would ask on the terminal otherwise.
    plain: dict[str, Any] = {"trust_remote_code": False} if config["text_cfg"].get("hf_tokenizer_name") else {}
    return open_clip.get_tokenizer(spelled, **plain)


def _pair(name: str, net: Any, config: dict[str, Any], tokenizer: Any) -> Pair:
    image = net.visual.preprocess_cfg
    sides = {*image["size"]} if isinstance(image["size"], tuple | list) else {image["size"]}
    if len(sides) != 1:
        raise InputError(
            f"{name} takes images of {' × '.join(map(str, image['size']))} pixels; only square ones are made"
        )
    side, vision = sides.pop(), config["vision_cfg"]
    tower = open_clip_tower(net.visual, vision, config["embed_dim"], side, bool(config.get("quick_gelu")))
    squash, padded = image["resize_mode"] == "squash", image["resize_mode"] == "longest"
    card = {"input_size": (3, side, side), "crop_pct": 1.0, "mean": image["mean"], "std": image["std"],
            "interpolation": image["interpolation"], "crop_mode": "squash" if squash else "center"}  # fmt: skip
    bias = getattr(net, "logit_bias", None)

    def encode(texts: list[str]) -> Tensor:
        with _plain_errors(name):
            return net.encode_text(tokenizer(texts), normalize=True)

    def tokens(texts: Sequence[str]) -> list[list[int]]:
        with _plain_errors(name):
            return _tokens(tokenizer, texts)

    return Pair(
        name, tower, card, encode, tokens, int(tokenizer.context_length),
        float(net.logit_scale.detach().exp()), 0.0 if bias is None else float(bias.detach()), bias is not None,
        fingerprint(net) + json.dumps(config, sort_keys=True),
        ("its own preprocessing pads images to squares; here their centre is shown",) if padded else (),
    )  # fmt: skip


def _tokens(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Returns the tokens of texts, however many there are, with those at the beginning and at the end."""
    if callable(encode := getattr(tokenizer, "encode", None)):
        return [[tokenizer.sot_token_id, *encode(text), tokenizer.eot_token_id] for text in texts]
    clean = getattr(tokenizer, "clean_fn", lambda text: text)
    # A mode of OpenCLIP's puts two tokens of its own around these, and one behind them.
    own = getattr(tokenizer, "tokenizer_mode", "") == "clips"
    found = tokenizer.tokenizer([clean(text) for text in texts], add_special_tokens=not own).input_ids
    return [[-1, *each, -2, -3] for each in found] if own else found


@contextmanager
def _plain_errors(name: str) -> Generator[None]:
    """Turns what OpenCLIP raises into messages, and keeps what it would print to itself."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with _without_questions(), warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            yield
    except InputError:
        raise
    except Exception as error:  # files and repositories can be wrong in as many ways as there are
        if is_out_of_memory(error):
            raise
        raise InputError(f"cannot load {name}: {_reason(error)}") from error
    finally:
        logger.setLevel(level)


def _reason(error: Exception) -> str:
    """Returns in a sentence why a network cannot be loaded."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if "custom code" in str(error):
        return "it needs code of its repository, which is never run"
    if lines and lines[0].startswith("Weights only load failed"):
        return f"its weights hold more than tensors; {HOW_TO_SAVE}"
    # The first line of such a list is its heading.
    return " ".join(lines[:2]) if "in loading state_dict" in str(error) else first_line(error)


@contextmanager
def _without_questions() -> Generator[None]:
    """Has transformers refuse code of a repository at once, where it would ask for permission otherwise."""
    with suppress(ImportError):  # OpenCLIP needs it for some tokenizers and texts only
        from transformers import dynamic_module_utils

        module: Any = dynamic_module_utils
        seconds, module.TIME_OUT_REMOTE_CODE = module.TIME_OUT_REMOTE_CODE, 0
        try:
            yield
        finally:
            module.TIME_OUT_REMOTE_CODE = seconds
        return
    yield
