"""Small networks for 8x8 grey images, built from timm's own classes."""

from __future__ import annotations

from functools import partial

from torch import nn

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
    _describe(model)
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
    _describe(model)
    return model


def _describe(model: nn.Module) -> None:
    """What the network takes, where timm keeps it."""
    config = {"input_size": (1, 8, 8), "mean": (0.5,), "std": (0.5,), "interpolation": "bicubic", "crop_pct": 1.0}
    model.pretrained_cfg = config  # type: ignore[assignment]
