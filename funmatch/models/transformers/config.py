"""Reads the `config.json` of a network of transformers, and finds the class that builds it."""

import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from funmatch.errors import InputError, first_line, unknown
from funmatch.models.transformers.library import quiet, transformers_for
from funmatch.runtime.disk.json_files import parse_json

OWN_FUNCTION = "load it in a function of your own and pass package.module:function"
LEFT_OUT = (
    "attn_implementation", "_attn_implementation", "_attn_implementation_internal", "_attn_implementation_autoset",
    "experts_implementation", "_experts_implementation", "_experts_implementation_internal", "kernel_config",
    "use_kernels", "fusion_config", "distributed_config", "transformers_weights", "dtype", "torch_dtype",
    "return_dict", "use_return_dict", "output_hidden_states", "output_attentions", "torchscript", "_name_or_path",
)  # fmt: skip
"""Entries that say how a network was computed, or which further files and kernels are fetched, not what it computes."""
OURS = ("pretrained_cfg", "funmatch", "model_args")
"""Entries that we write into the configuration of a student, beside those of transformers."""


def is_of_transformers(config: Mapping[str, Any]) -> bool:
    """Returns whether the contents of a `config.json` are those of a network of transformers, not of timm."""
    return "architecture" not in config and ("model_type" in config or "architectures" in config)


def read_entries(path: Path) -> dict[str, Any] | None:
    """Returns the contents of a `config.json` of transformers; None if it is another's, or not JSON."""
    try:
        entries = parse_json(path.read_bytes(), dict)
    except ValueError:
        return None
    return entries if is_of_transformers(entries) else None


def build_config(folder: Path, entries: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """Returns the configuration of a network.

    Args:
        folder: of the network, for messages.
        entries: of its `config.json`.
        options: entries that replace those of the file.

    Raises:
        InputError: the network needs code of its repository, is not known to transformers, or has no such option.
    """
    transformers = transformers_for(str(folder))
    kind = entries.get("model_type")
    if "auto_map" in entries:
        raise InputError(
            f"{folder} needs code of its repository ({_listed(entries['auto_map'])}), which is never run; if you trust "
            f"it, {OWN_FUNCTION}; where transformers has the network itself, remove auto_map from its config.json"
        )
    if entries.get("quantization_config"):
        raise InputError(f"{folder} has quantised weights; pass a folder with its weights in floating point")
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        raise InputError(
            f"transformers {transformers.__version__} has no network of the type {kind!r}, which {folder} is; update "
            f"transformers, or {OWN_FUNCTION}"
        )
    clean = _without({key: value for key, value in entries.items() if key not in OURS}, LEFT_OUT)
    try:
        with quiet():
            config = transformers.CONFIG_MAPPING[kind].from_dict(clean)
            known = config.to_dict()
            for key, value in options.items():
                if key not in known:
                    raise unknown(f"option of a {kind} network", key, sorted(known))
                setattr(config, key, value)
    except InputError:
        raise
    except Exception as error:  # configurations are checked by their classes, each in its own way
        raise InputError(f"{folder / 'config.json'} is not the configuration of a network ({first_line(error)})") from (
            error
        )
    return config


@dataclass(frozen=True)
class Kind:
    """What a network of transformers is.

    Attributes:
        build: its class.
        config: of the network; of the part for images, where it is for images and texts.
        classifies: whether it has a head; else its outputs are features.
        leaves: prefixes of weights that belong to other parts.
    """

    build: Any
    config: Any
    classifies: bool
    leaves: tuple[str, ...] = ()


def kind_of(folder: Path, config: Any, entries: Mapping[str, Any]) -> Kind:
    """Returns what a network is, by the class that its configuration names.

    Raises:
        InputError: it is neither an image classifier nor a network for images without a head.
    """
    transformers = transformers_for(str(folder))
    names = entries.get("architectures") or []
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None
    classifiers = classifiers_for(config)
    backbones = _classes(transformers.MODEL_MAPPING, config)
    if name is None:
        # Configurations of long ago do not name their class; only a classifier has names for its outputs.
        name = next((each.__name__ for each in (classifiers if "id2label" in entries else backbones)), "")
    found = getattr(transformers, name, None)
    if found is not None and (more := _needs(found)):
        raise InputError(f"{folder} is a {name} of transformers, which needs more than images: {', '.join(more)}")
    if found is not None and found in classifiers and found.main_input_name == "pixel_values":
        return Kind(found, config, classifies=True)
    if found is not None and found.__name__.endswith(("Model", "ModelWithProjection")):
        if getattr(found, "main_input_name", None) == "pixel_values" and found.config_class is type(config):
            return Kind(found, config, classifies=False)
        # Of a network for images and texts, the part for images.
        stem, part = name.removesuffix("Model"), getattr(config, "vision_config", None)
        for ending in ("VisionModelWithProjection", "VisionModel"):
            build = getattr(transformers, stem + ending, None)
            if build is not None and build.config_class is type(part):
                return Kind(build, part, classifies=False, leaves=("text_model.", "text_projection.", "logit_"))
    raise InputError(
        f"{folder} is a {name or config.model_type} of transformers; its image classifiers (…ForImageClassification) "
        f"and image networks without a head (…Model) can be loaded; for another, {OWN_FUNCTION}"
    )


def _needs(build: Any) -> list[str]:
    """Returns what a network must be given beside images."""
    takes = list(inspect.signature(build.forward).parameters.values())[1:]
    plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = [each.name for each in takes if each.default is inspect.Parameter.empty and each.kind in plain]
    return [name for name in needed if name != build.main_input_name]


def classifiers_for(config: Any) -> tuple[Any, ...]:
    """Returns the image classifiers that transformers has for a configuration."""
    transformers = transformers_for(config.model_type)
    return _classes(transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, config)


def is_backbone(net: Any) -> bool:
    """Returns whether a module is a network of transformers for images without a head."""
    library = sys.modules.get("transformers")
    if library is None or not isinstance(net, library.PreTrainedModel) or net.main_input_name != "pixel_values":
        return False
    # Of the library itself: classes of a user's own return what they like.
    kind = type(net)
    return kind.__module__.startswith("transformers.") and kind.__name__.endswith(("Model", "ModelWithProjection"))


def _classes(mapping: Any, config: Any) -> tuple[type, ...]:
    """Returns the classes that a mapping of transformers has for a configuration."""
    if type(config) not in mapping:
        return ()
    found = mapping[type(config)]
    return found if isinstance(found, tuple) else (found,)


def class_names(config: Any) -> list[str] | None:
    """Returns the names of a classifier's classes in their order; None where they are only numbered."""
    names = config.id2label or {}
    ordered = [str(names.get(number, names.get(str(number), ""))) for number in range(len(names))]
    numbered = all(each in (f"LABEL_{number}", str(number)) for number, each in enumerate(ordered))
    return None if numbered or not all(ordered) else ordered


def _without(value: Any, keys: tuple[str, ...]) -> Any:
    """Returns a value without some keys in any of its dictionaries."""
    if isinstance(value, dict):
        return {key: _without(each, keys) for key, each in value.items() if key not in keys}
    return [_without(each, keys) for each in value] if isinstance(value, list) else value


def _listed(value: Any) -> str:
    return ", ".join(map(str, value.values())) if isinstance(value, dict) else str(value)
