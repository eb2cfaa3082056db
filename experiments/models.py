"""Networks, built from timm's own classes: small ones for the embedded digits, and any timm model by name.

Conventions: every model is split into a *backbone* (merged) and a linear *head* (private to a task).  BatchNorm is
used in evaluation mode for everything that is measured.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from theory.errors import MergeboundError

DIGIT_ARCHITECTURES = ("vit", "resnet_gn", "resnet_bn")


def digit_vit(classes: int = 10) -> nn.Module:
    """A ViT for 8x8 grey images: patch 4, width 40, depth 2 (34,290 parameters with ten classes).

    Position embeddings start at standard deviation 0.3: timm's 0.02 is made for long pretraining.
    """
    from timm.models.vision_transformer import VisionTransformer

    model: nn.Module = VisionTransformer(
        img_size=8,
        patch_size=4,
        in_chans=1,
        num_classes=classes,
        embed_dim=40,
        depth=2,
        num_heads=4,
        mlp_ratio=3,
        class_token=False,
        global_pool="avg",
    )
    nn.init.normal_(model.get_parameter("pos_embed"), std=0.3)
    return model


def _group_norm(channels: int, groups: int, **options: object) -> nn.Module:
    return nn.GroupNorm(groups, channels)


def digit_resnet(norm: str, classes: int = 10) -> nn.Module:
    """A four-stage ResNet for 8x8 grey images with a 3x3 stem (38,770 parameters with ten classes).

    Args:
        norm: ``"gn"`` (GroupNorm, four groups) or ``"bn"`` (BatchNorm).
    """
    from timm.models.resnet import BasicBlock, ResNet

    layer = {"gn": partial(_group_norm, groups=4), "bn": nn.BatchNorm2d}[norm]
    model: nn.Module = ResNet(
        BasicBlock,
        [1, 1, 1, 1],
        num_classes=classes,
        in_chans=1,
        channels=(8, 16, 24, 40),
        stem_type="deep",
        stem_width=4,
        norm_layer=layer,
    )
    model.conv1 = nn.Conv2d(1, 8, 3, 1, 1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model


def build_model(architecture: str, classes: int = 10, seed: int = 0, **timm_options: Any) -> nn.Module:
    """Build a network with seeded initial weights.

    Args:
        architecture: ``vit``, ``resnet_gn``, ``resnet_bn`` (digits), or any model name that timm knows.
        classes: outputs of the head.
        seed: names the initial weights.

    Raises:
        MergeboundError: timm does not know the name.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if architecture == "vit":
            return digit_vit(classes)
        if architecture in ("resnet_gn", "resnet_bn"):
            return digit_resnet(architecture.removeprefix("resnet_"), classes)
        import timm

        if not timm.is_model(architecture):
            close = ", ".join(timm.list_models(f"*{architecture.split('_')[0]}*")[:5]) or "see timm.list_models()"
            raise MergeboundError(f"architecture: timm has no model {architecture!r}; did you mean: {close}")
        model: nn.Module = timm.create_model(architecture, pretrained=False, num_classes=classes, **timm_options)
        return model


def head_prefix(model: nn.Module) -> str:
    """Name prefix of the task head's tensors (e.g. ``"head."``), found through timm's ``get_classifier``.

    Raises:
        MergeboundError: the model has no single linear classifier.
    """
    classifier = model.get_classifier() if hasattr(model, "get_classifier") else None  # type: ignore[operator]
    for name, module in model.named_modules():
        if module is classifier and isinstance(module, nn.Linear):
            return f"{name}."
    raise MergeboundError(
        f"{type(model).__name__}: no single linear classifier found; use a timm model whose get_classifier() is linear"
    )


def forward_backbone(model: nn.Module, images: Tensor) -> Tensor:
    """Pooled features before the linear head, (n, features); the head is applied to them outside the model."""
    features = model.forward_features(images)  # type: ignore[operator]
    pooled: Tensor = model.forward_head(features, pre_logits=True)  # type: ignore[operator]
    return pooled
