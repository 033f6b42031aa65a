"""Describes image towers as `network` builds them, and gives their weights the names that they have there."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ACTIVATIONS = {"GELU": "gelu", "QuickGELU": "quick_gelu", "gelu": "gelu", "quick_gelu": "quick_gelu",
               "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh"}  # fmt: skip
"""timm's names of activations, by the classes of OpenCLIP and by the words of transformers."""
OF_OPEN_CLIP = (
    ("conv1.", "patch_embed.proj."),
    ("class_embedding", "cls_token"),
    ("positional_embedding", "pos_embed"),
    ("transformer.resblocks.", "blocks."),
    ("ln_pre.", "norm_pre."),
    ("ln_post.", "norm."),
    (".ln_", ".norm"),
    (".in_proj_", ".qkv."),
    (".out_proj.", ".proj."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
    (".ls_", ".ls"),
)
OF_STEMS = ((r"^conv(\d)", r"stem.conv\1.conv"), (r"^bn(\d)", r"stem.conv\1.bn"))
OF_RESNETS = (
    (r"\.conv1\.", ".conv1_1x1.conv."),
    (r"\.conv2\.", ".conv2_kxk.conv."),
    (r"\.conv3\.", ".conv3_1x1.conv."),
    (r"\.bn1\.", ".conv1_1x1.bn."),
    (r"\.bn2\.", ".conv2_kxk.bn."),
    (r"\.bn3\.", ".conv3_1x1.bn."),
    (r"\.downsample\.0\.", ".shortcut.conv.conv."),
    (r"\.downsample\.1\.", ".shortcut.conv.bn."),
    (r"^attnpool\.positional_embedding", "head.pos_embed"),
    (r"^attnpool\.c_proj", "head.proj"),
    (r"^attnpool\.([qkv])_proj", r"head.\1"),
)
HEAD_WIDTH = 64
"""Channels of each head in timm's attention pooling."""


@dataclass(frozen=True)
class Tower:
    """An image tower, as `network` builds it.

    Attributes:
        arguments: of `network`, `tower` there.
        dimensions: of its embeddings.
        state: its weights, by the names that they have in `ClipClassifier.tower`.
    """

    arguments: dict[str, Any]
    dimensions: int
    state: dict[str, Tensor]


def open_clip_tower(visual: Any, config: Mapping[str, Any], dimensions: int, side: int, quick_gelu: bool) -> Tower:
    """Describes an image tower of OpenCLIP.

    Args:
        visual: the tower, with its weights.
        config: the part of the model's configuration about it.
        dimensions: of its embeddings.
        side: of the images, pixels.
        quick_gelu: whether the configuration asks for the faster activation.
    """
    state = dict(visual.state_dict())
    if model := config.get("timm_model_name"):
        words = {"pool": config.get("timm_pool", "avg"), "proj": config.get("timm_proj", "linear") or ""}
        found = {"kind": "timm", "model": model, **words, "bias": bool(config.get("timm_proj_bias"))}
        return Tower({**found, "side": side}, dimensions, state)
    kind = type(visual).__name__
    if kind == "VisionTransformer" and (arguments := _vit_arguments(visual)):
        return Tower({"kind": "vit", "side": side, **arguments}, dimensions, _vit_state(state, arguments))
    if kind == "ModifiedResNet" and visual.attnpool.k_proj.in_features == HEAD_WIDTH * visual.attnpool.num_heads:
        depths = [len(getattr(visual, f"layer{stage}")) for stage in range(1, 5)]
        arguments = {"depths": depths, "width": visual.conv3.out_channels}
        renamed = {_renamed(key): tensor for key, tensor in state.items()}
        return Tower({"kind": "resnet", "side": side, **arguments}, dimensions, renamed)
    # Without what is only for training: it is not part of the function.
    plain = {key: value for key, value in config.items() if key not in ("image_size", "patch_dropout")}
    return Tower({"kind": "open_clip", "side": side, "config": plain, "quick_gelu": quick_gelu}, dimensions, state)


def _renamed(key: str) -> str:
    in_stage = key.startswith("layer")
    if in_stage:
        key = f"stages.{int(key[5]) - 1}{key[6:]}"
    for pattern, new in OF_RESNETS if in_stage or key.startswith("attnpool") else OF_STEMS:
        key = re.sub(pattern, new, key)
    return key


def _vit_arguments(visual: Any) -> dict[str, Any] | None:
    """Returns the arguments with which timm builds the same vision transformer; None where it has no such one."""
    blocks = visual.transformer.resblocks
    block, norm = blocks[0], visual.ln_post
    activation = _activation(block.mlp.gelu)
    plain = type(block).__name__ == "ResidualAttentionBlock" and visual.attn_pool is None
    if not plain or activation is None or visual.pool_type not in ("tok", "avg") or visual.proj is None:
        return None
    width, hidden = visual.conv1.out_channels, block.mlp.c_fc.out_features
    scaled = not isinstance(block.ls_1, nn.Identity)
    return {
        "patch_size": visual.conv1.kernel_size[0],
        "embed_dim": width,
        "depth": len(blocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": mlp_ratio(hidden, width),
        "act_layer": activation,
        "pre_norm": not isinstance(visual.ln_pre, nn.Identity),
        "init_values": 1.0 if scaled else None,
        "global_pool": {"tok": "token", "avg": "avg"}[visual.pool_type],
        "fc_norm": bool(visual.final_ln_after_pool),
        "norm_eps": norm.eps,
        "projected": True,
    }


def _activation(module: nn.Module) -> str | None:
    name = ACTIVATIONS.get(type(module).__name__)
    return "gelu_tanh" if name == "gelu" and getattr(module, "approximate", "none") == "tanh" else name


def mlp_ratio(hidden: int, width: int) -> float:
    """Returns the ratio from which timm computes the hidden width: floor(width · ratio)."""
    # Half a channel more where the division is not exact, so that rounding cannot lose one.
    return hidden / width if hidden % width == 0 else (hidden + 0.5) / width


def _vit_state(state: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    found = {}
    for key, tensor in state.items():
        name, value = key, tensor
        for old, new in OF_OPEN_CLIP:
            name = name.replace(old, new)
        if name == "proj":
            name, value = "head.weight", tensor.T.contiguous()
        elif name == "cls_token":
            value = tensor[None, None]
        elif name == "pos_embed":
            value = tensor[None]
        elif name.startswith("norm.") and arguments["fc_norm"]:
            name = f"fc_{name}"
        found[name] = value
    found["head.bias"] = torch.zeros(len(found["head.weight"]))
    if not arguments["pre_norm"]:
        found["patch_embed.proj.bias"] = torch.zeros(arguments["embed_dim"])
    return found


def transformers_tower(state: Mapping[str, Tensor], config: Any, side: int) -> Tower:
    """Describes an image tower of a CLIP or SigLIP of transformers.

    Args:
        state: weights of the whole network, by its own names.
        config: `vision_config` of it.
        side: of the images, pixels.
    """
    projected, cls = "visual_projection.weight" in state, "vision_model.embeddings.class_embedding" in state
    arguments = {
        "patch_size": config.patch_size,
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": mlp_ratio(config.intermediate_size, config.hidden_size),
        "act_layer": ACTIVATIONS[config.hidden_act],
        "class_token": cls,
        "pre_norm": cls,
        "global_pool": "token" if cls else "map",
        "norm_eps": config.layer_norm_eps,
        "projected": projected,
    }
    read = _Reader(state, "vision_model.")
    found = {
        "patch_embed.proj.weight": read("embeddings.patch_embedding.weight"),
        "pos_embed": read("embeddings.position_embedding.weight")[None],
        **read.norm("norm", "post_layernorm"),
    }
    if cls:
        found |= {"cls_token": read("embeddings.class_embedding")[None, None], **read.norm("norm_pre", "pre_layrnorm")}
    else:
        found |= {"patch_embed.proj.bias": read("embeddings.patch_embedding.bias"), **_map_pool(read)}
    for number in range(config.num_hidden_layers):
        found |= _block(read, f"blocks.{number}.", f"encoder.layers.{number}.")
    dimensions = config.hidden_size
    if projected:
        found["head.weight"] = state["visual_projection.weight"]
        dimensions = len(found["head.weight"])
        found["head.bias"] = torch.zeros(dimensions)
    return Tower({"kind": "vit", "side": side, **arguments}, dimensions, found)


class _Reader:
    """Reads tensors below a prefix."""

    def __init__(self, state: Mapping[str, Tensor], prefix: str) -> None:
        self.state, self.prefix = state, prefix

    def __call__(self, name: str) -> Tensor:
        return self.state[self.prefix + name]

    def norm(self, ours: str, theirs: str) -> dict[str, Tensor]:
        """Weight and bias of a layer, by its name here."""
        return {f"{ours}.{part}": self(f"{theirs}.{part}") for part in ("weight", "bias")}


def _block(read: _Reader, ours: str, theirs: str) -> dict[str, Tensor]:
    """The tensors of a block of attention."""
    found = {
        f"{ours}attn.qkv.{part}": torch.cat([read(f"{theirs}self_attn.{each}_proj.{part}") for each in "qkv"])
        for part in ("weight", "bias")
    }
    pairs = {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.proj": "self_attn.out_proj", "mlp.fc1": "mlp.fc1",
             "mlp.fc2": "mlp.fc2"}  # fmt: skip
    for new, old in pairs.items():
        found |= read.norm(ours + new, theirs + old)
    return found


def _map_pool(read: _Reader) -> dict[str, Tensor]:
    """The tensors of the pooling by attention of SigLIP, whose query, key and value are one tensor there."""
    width = read("head.probe").shape[-1]
    found = {"attn_pool.latent": read("head.probe")}
    for part in ("weight", "bias"):
        query, rest = read(f"head.attention.in_proj_{part}").split([width, 2 * width])
        found |= {f"attn_pool.q.{part}": query, f"attn_pool.kv.{part}": rest}
    pairs = {"proj": "attention.out_proj", "norm": "layernorm", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    for new, old in pairs.items():
        found |= read.norm(f"attn_pool.{new}", f"head.{old}")
    return found
