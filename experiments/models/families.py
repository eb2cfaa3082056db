"""Two families of networks that grow in width and depth together, built from timm's classes: ViTs and ResNets.

Member k of seven (``vit_s1`` ... ``vit_s7``, ``resnet_s1`` ... ``resnet_s7``) has about 90,000 x 10^((k - 1) / 2)
parameters: two members per factor of ten, 0.09M to 90M, each within a quarter of that number (32x32 colour images, ten
classes).

* ViT (pre-norm, MLP ratio 4, average pooling, no class token): depth 3 x 2^((k - 1) / 3) rounded (3, 4, 5, 6, 8, 10,
  12), width the multiple of 16 that comes near the number of parameters (48 ... 768); heads of 64, 32 or 16 numbers,
  the largest that divides the width and leaves three heads.  Member 7 is ViT-B.  Patches are an eighth of the image's
  side up to 128 pixels (64 patches), and 16 pixels above.
* ResNet (basic blocks, four stages of width w, 2w, 4w, 8w): ceil(k / 2) blocks a stage, w the multiple of four that
  comes near.  Images up to 64 pixels meet a 3x3 stem of stride 1 without max-pooling, larger ones timm's deep stem
  (three 3x3 convolutions, stride 2) and max-pooling.  ``norm`` is ``"bn"``, or ``"gn"``: GroupNorm with w / 2
  groups, which at w = 64 are the usual 32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import nn

from experiments.models.counting import count_flops, count_parameters
from theory.errors import MergeboundError, nearest

Kind = Literal["vit", "resnet"]
KINDS: tuple[Kind, ...] = ("vit", "resnet")
SMALLEST = 9e4
SPACING = math.sqrt(10.0)
"""Ratio of the parameters of neighbours."""
SMALL_IMAGE = 64
"""ResNets for images of at most so many pixels have the stem for small images."""

_VIT_WIDTHS = (48, 80, 128, 192, 320, 512, 768)
_VIT_DEPTHS = (3, 4, 5, 6, 8, 10, 12)
_RESNET_WIDTHS = (8, 16, 20, 32, 48, 80, 124)
_RESNET_BLOCKS = (1, 1, 2, 2, 3, 3, 4)


@dataclass(frozen=True)
class FamilyMember:
    """One size.

    Attributes:
        name: for :func:`experiments.models.build_model`.
        kind: ``"vit"`` or ``"resnet"``.
        width: embedding width of a ViT, channels of a ResNet's first stage.
        depth: blocks of a ViT, blocks a stage of a ResNet.
        target: parameters that the member is meant to have.
    """

    name: str
    kind: Kind
    width: int
    depth: int
    target: float


@dataclass(frozen=True)
class Described:
    """A member as built for given images: ``flops`` of one image's forward pass (a multiply-add is two)."""

    member: FamilyMember
    parameters: int
    flops: int


def vit_family() -> tuple[FamilyMember, ...]:
    """The ViTs, small to large."""
    return _members("vit", _VIT_WIDTHS, _VIT_DEPTHS)


def resnet_family() -> tuple[FamilyMember, ...]:
    """The ResNets, small to large."""
    return _members("resnet", _RESNET_WIDTHS, _RESNET_BLOCKS)


def _members(kind: Kind, widths: Sequence[int], depths: Sequence[int]) -> tuple[FamilyMember, ...]:
    return tuple(
        FamilyMember(f"{kind}_s{k + 1}", kind, width, depth, SMALLEST * SPACING**k)
        for k, (width, depth) in enumerate(zip(widths, depths, strict=True))
    )


def family(kind: str) -> tuple[FamilyMember, ...]:
    """The members of a family, by its name.

    Raises:
        MergeboundError: there is no such family.
    """
    if kind == "vit":
        return vit_family()
    if kind == "resnet":
        return resnet_family()
    raise MergeboundError(f"family {kind!r}: {nearest(kind, KINDS)}")


def closest(kind: str, parameters: float) -> str:
    """Name of the member whose number of parameters is nearest by ratio, as ``closest("vit", 1e6)``.

    Raises:
        MergeboundError: no such family, or a number that is not positive.
    """
    if not parameters > 0 or math.isinf(parameters):
        raise MergeboundError(f"parameters = {parameters}: give a positive number, such as 1e6")
    return min(family(kind), key=lambda member: abs(math.log(member.target / parameters))).name


def build_member(
    member: FamilyMember,
    classes: int = 10,
    *,
    img_size: int = 32,
    in_chans: int = 3,
    norm: str = "bn",
    patch_size: int | None = None,
) -> nn.Module:
    """Build one member with fresh weights (from PyTorch's current random state).

    Args:
        classes: outputs of the head.
        img_size: side of the images, pixels.
        in_chans: channels of the images.
        norm: ``"bn"`` or ``"gn"``, for ResNets.
        patch_size: side of a ViT's patches, pixels; default as the module says.

    Raises:
        MergeboundError: an image size that does not divide into patches, or an unknown norm.
    """
    if img_size < 1 or in_chans < 1:
        raise MergeboundError(f"img_size = {img_size}, in_chans = {in_chans}: give positive numbers")
    model = _vit(member, classes, img_size, in_chans, patch_size) if member.kind == "vit" else None
    if model is None:
        model = _resnet(member, classes, img_size, in_chans, norm)
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    config: dict[str, Any] = {
        "architecture": member.name,
        "input_size": (in_chans, img_size, img_size),
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "interpolation": "bicubic",
        "crop_pct": 1.0 if img_size <= SMALL_IMAGE else 0.875,
    }
    model.pretrained_cfg = config  # type: ignore[assignment]
    return model


def patch_of(img_size: int) -> int:
    """Side of a ViT's patches: the divisor of the image's side that is nearest to an eighth of it, 16 above 128.

    Raises:
        MergeboundError: no divisor within a factor of two; names sizes that have one.
    """
    patch = _patch(img_size)
    if patch is None:
        near = [s for d in range(1, img_size) for s in (img_size - d, img_size + d) if s > 0 and _patch(s)][:2]
        raise MergeboundError(
            f"img_size = {img_size}: it does not divide into patches; give {' or '.join(str(s) for s in near)}"
        )
    return patch


def _patch(img_size: int) -> int | None:
    wanted = img_size / 8 if img_size <= 128 else 16.0
    divisors = [d for d in range(1, img_size + 1) if img_size % d == 0 and wanted / 2 <= d <= max(1.0, wanted * 2)]
    return min(divisors, key=lambda d: abs(math.log(d / wanted)), default=None)


def head_size(width: int) -> int:
    """Numbers per attention head: the largest of 64, 32 and 16 that divides the width and leaves three heads."""
    return next(size for size in (64, 32, 16) if width % size == 0 and width // size >= 3)


def _vit(member: FamilyMember, classes: int, img_size: int, in_chans: int, patch_size: int | None) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    if patch_size is not None and (patch_size < 1 or img_size % patch_size):
        raise MergeboundError(f"patch_size = {patch_size}: give a divisor of img_size = {img_size}")
    model: nn.Module = VisionTransformer(
        img_size=img_size,
        patch_size=patch_of(img_size) if patch_size is None else patch_size,
        in_chans=in_chans,
        num_classes=classes,
        embed_dim=member.width,
        depth=member.depth,
        num_heads=member.width // head_size(member.width),
        class_token=False,
        global_pool="avg",
    )
    return model


def _group_norm(channels: int, groups: int, **options: object) -> nn.Module:
    return nn.GroupNorm(groups, channels)


def _resnet(member: FamilyMember, classes: int, img_size: int, in_chans: int, norm: str) -> nn.Module:
    from timm.models.resnet import BasicBlock, ResNet

    width = member.width
    layers = {"bn": nn.BatchNorm2d, "gn": partial(_group_norm, groups=width // 2)}
    if norm not in layers:
        raise MergeboundError(f"norm = {norm!r}: choose 'bn' (BatchNorm) or 'gn' (GroupNorm)")
    model: nn.Module = ResNet(
        BasicBlock,
        [member.depth] * 4,
        num_classes=classes,
        in_chans=in_chans,
        channels=(width, 2 * width, 4 * width, 8 * width),
        stem_type="deep",
        stem_width=width // 2,
        norm_layer=layers[norm],
    )
    if img_size <= SMALL_IMAGE:
        model.conv1 = nn.Conv2d(in_chans, width, 3, 1, 1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    return model


def describe_family(
    kind: str, *, img_size: int = 32, in_chans: int = 3, classes: int = 10, norm: str = "bn"
) -> tuple[Described, ...]:
    """Parameters and operations of every member for given images; nothing but shapes is computed.

    Raises:
        MergeboundError: as :func:`family` and :func:`build_member`.
    """
    import torch

    found = []
    for member in family(kind):
        with torch.device("meta"):
            model = build_member(member, classes, img_size=img_size, in_chans=in_chans, norm=norm)
        found.append(Described(member, count_parameters(model), count_flops(model)))
    return tuple(found)
