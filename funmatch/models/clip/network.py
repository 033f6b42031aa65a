"""The classifier that a network of image and text becomes: an image tower, and a layer that compares with texts.

A saved one needs neither the text tower nor the library that it came from, unless its image tower is one that timm
does not have; its folder names `network` as its architecture.
"""

from collections import OrderedDict
from functools import partial
from typing import Any

import torch.nn.functional as F
from timm.layers.attention_pool2d import AttentionPool2d, RotAttentionPool2d
from timm.layers.mlp import Mlp
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from funmatch.errors import InputError
from funmatch.models import timm_models
from funmatch.models.clip.names import EXTRA
from funmatch.models.names import check_architecture

OWN = "funmatch.models.clip.network:network"
"""The name of `network` in a saved model."""


class ClipClassifier(nn.Module):
    """An image tower, whose embeddings are scaled to length 1 and compared with those of texts by a linear layer.

    Attributes:
        tower: (n, 3, side, side) to embeddings (n, dimensions).
        head: to logits; without classes the identity, and the outputs are the embeddings.
        num_classes: number of classes; 0 without any.
    """

    def __init__(self, tower: nn.Module, dimensions: int, num_classes: int, side: int) -> None:
        super().__init__()
        self.tower, self.num_classes, self.num_features = tower, num_classes, dimensions
        self.head = nn.Linear(dimensions, num_classes) if num_classes else nn.Identity()
        # As timm describes its networks: what other parts of the package ask of any network.
        self.pretrained_cfg = {
            "input_size": (3, side, side),
            "fixed_input_size": callable(getattr(tower, "set_input_size", None)),
            "classifier": "head",
        }

    def forward_features(self, images: Tensor) -> Tensor:
        """Computes embeddings of length 1, (n, dimensions)."""
        found = self.tower(images)
        # Some towers also return what they know of each part of the image.
        return F.normalize(found[0] if isinstance(found, tuple) else found, dim=-1)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        return features if pre_logits else self.head(features)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.forward_features(images))

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replaces the head by one of another number of classes."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def set_input_size(self, img_size: int) -> None:
        """Makes the tower one for images of another side."""
        self.tower.set_input_size(img_size=img_size)  # pyrefly: ignore[not-callable]
        self.pretrained_cfg["input_size"] = (3, img_size, img_size)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.tower.set_grad_checkpointing(enable)  # pyrefly: ignore[not-callable]


def network(
    tower: dict[str, Any], dimensions: int, num_classes: int = 0, img_size: int | None = None
) -> ClipClassifier:
    """Builds a classifier without weights.

    Args:
        tower: `kind`, one of `TOWERS`, `side` in pixels, and the other arguments of its function.
        dimensions: of the embeddings.
        num_classes: number of classes; 0 for embeddings as outputs.
        img_size: side of the images, where it is another than the tower was trained with.
    """
    arguments = {key: value for key, value in tower.items() if key not in ("kind", "side")}
    side = img_size or tower["side"]
    return ClipClassifier(TOWERS[tower["kind"]](dimensions, side, **arguments), dimensions, num_classes, side)


def _vit(dimensions: int, side: int, norm_eps: float, projected: bool, **arguments: Any) -> nn.Module:
    """A vision transformer; `arguments` are those of timm's class."""
    norm = partial(nn.LayerNorm, eps=norm_eps)
    classes = dimensions if projected else 0
    return VisionTransformer(img_size=side, num_classes=classes, norm_layer=norm, weight_init="skip", **arguments)


def _resnet(dimensions: int, side: int, depths: list[int], width: int) -> nn.Module:
    """A residual network with three convolutions at its start, and attention in place of its last pooling."""
    stages = zip(depths, (4, 8, 16, 32), (1, 2, 2, 2), strict=True)
    config = ByoModelCfg(
        blocks=tuple(
            ByoBlockCfg(type="bottle", d=depth, c=width * by, s=stride, br=0.25) for depth, by, stride in stages
        ),
        stem_chs=(width // 2, width // 2, width),
        stem_type="",
        stem_pool="avg2",
        downsample="avg",
        aa_layer="avg",
        head_type="attn_abs",
    )
    return ByobNet(config, num_classes=dimensions, img_size=side)


class TimmTower(nn.Module):
    """Any network of timm, followed by a pooling and a projection; its tensors are called as in OpenCLIP.

    Args:
        dimensions: of the embeddings.
        side: of the images, pixels.
        model: timm's name.
        pool: `abs_attn`, `rot_attn`, or one of the network's own.
        proj: `linear`, `mlp`, `none`, or an empty word for the network's own head.
        bias: whether the projection has one.
    """

    def __init__(self, dimensions: int, side: int, model: str, pool: str, proj: str, bias: bool = False) -> None:
        super().__init__()
        if ":" in model or "/" in model:
            raise InputError(f"the image tower is to be {model!r}, which timm does not have")
        check_architecture(model, model)
        card = timm_models.pretrained_config(model)
        options: dict[str, Any] = {"img_size": side} if card.get("fixed_input_size") else {}
        attends, projects = pool in ("abs_attn", "rot_attn"), proj in ("linear", "mlp")
        if not attends and not projects:
            options |= {"num_classes": 0 if proj == "none" else dimensions, "global_pool": pool}
        trunk: Any = timm_models.create(model, options)
        self.trunk = trunk
        self.head = nn.Sequential()
        if not attends and not projects:
            return
        # As in OpenCLIP: what pools instead, or the network's own pooling where no other is named.
        trunk.reset_classifier(0, **({"global_pool": "" if attends else pool} if attends or pool else {}))
        width, layers = trunk.num_features, OrderedDict[str, nn.Module]()
        if attends:
            layers["pool"] = (
                AttentionPool2d(width, feat_size=card["pool_size"], out_features=dimensions)
                if pool == "abs_attn"
                else RotAttentionPool2d(width, out_features=dimensions)
            )
            width = dimensions
        if proj == "linear":
            layers["proj"] = nn.Linear(width, dimensions, bias=bias)
        elif proj == "mlp":
            layers["mlp"] = Mlp(width, 2 * dimensions, dimensions, bias=(True, bias))
        self.head = nn.Sequential(layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.trunk(images))

    def set_input_size(self, img_size: int) -> None:
        self.trunk.set_input_size(img_size=img_size)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.trunk.set_grad_checkpointing(enable)


def _open_clip(dimensions: int, side: int, config: dict[str, Any], quick_gelu: bool) -> nn.Module:
    """A tower that timm does not have, as OpenCLIP builds it."""
    try:
        from open_clip.model import CLIPVisionCfg, _build_vision_tower
    except ImportError:
        raise InputError(f"this image tower is one of OpenCLIP, which is not installed: {EXTRA}") from None
    if config.get("timm_model_name"):
        raise InputError("the image tower names a network of timm where one of OpenCLIP is expected")
    wanted: dict[str, Any] = {**config, "image_size": side}
    return _build_vision_tower(dimensions, CLIPVisionCfg(**wanted), quick_gelu)


TOWERS = {"vit": _vit, "resnet": _resnet, "timm": TimmTower, "open_clip": _open_clip}
"""The functions that build image towers, by the kind that a saved model names."""
