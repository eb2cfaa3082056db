"""What a network takes, read from the network."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

import numpy as np
from torch import nn

from experiments.tasks.form import InputFormat
from theory.errors import MergeboundError

_log = logging.getLogger(__name__)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGENET_CROP = 0.875
"""timm's defaults, written out: importing timm takes seconds, which a worker that trains perceptrons need not spend."""


def input_format(
    model: nn.Module,
    image_size: int | None = None,
    *,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> InputFormat:
    """Channels, size and normalisation that a network expects, from the configuration that timm's models carry.

    The size is that which the network was built for, where it was built for one; else that of the configuration
    (``input_size``).  Means and deviations for another number of channels than the network's are averaged.

    A configuration that squashes or pads photographs that are not square (``crop_mode``) is warned of once: here their
    middle is cut out.  Square images come out alike.

    Args:
        image_size: pixels, instead of the network's own.
        mean, std: one number or one per channel, instead of the network's own.

    Raises:
        MergeboundError: a size that is not positive, or as many means as there are not channels.
    """
    config = _config(model)
    channels = _channels(model, config)
    height, width = _size(model, config)
    if image_size is not None:
        if image_size < 1:
            raise MergeboundError(f"image_size = {image_size}: give a positive number of pixels")
        height = width = image_size

    def per_channel(values: tuple[float, ...]) -> tuple[float, ...]:
        return values if len(values) in (1, channels) else (float(np.mean(values)),)

    if str(config.get("crop_mode") or "center") != "center":
        _warn_of_crop(type(model).__name__, str(config["crop_mode"]))
    interpolation = str(config.get("interpolation") or "bicubic")
    return InputFormat(
        channels,
        height,
        width,
        per_channel(tuple(config["mean"])) if mean is None else mean,
        per_channel(tuple(config["std"])) if std is None else std,
        interpolation if interpolation in ("bilinear", "bicubic") else "bicubic",
        float(config["crop_pct"]),
    )


@lru_cache(maxsize=64)
def _warn_of_crop(name: str, mode: str) -> None:
    _log.warning(
        "%s: its weights were measured with crop_mode %r; here photographs that are not square are cut to their "
        "middle, so make them square before to repeat the published accuracy",
        name,
        mode,
    )


def _config(model: nn.Module) -> dict[str, Any]:
    default = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "input_size": (3, 224, 224), "crop_pct": IMAGENET_CROP}
    own = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    return {**default, **{key: value for key, value in dict(own).items() if value is not None}}


def _channels(model: nn.Module, config: dict[str, Any]) -> int:
    said = getattr(model, "in_chans", None)
    if isinstance(said, int):
        return said
    first = config.get("first_conv")
    modules = dict(model.named_modules())
    layer = modules.get(first) if isinstance(first, str) else None
    if not isinstance(layer, nn.Conv2d):
        layer = next((m for m in modules.values() if isinstance(m, nn.Conv2d)), None)
    return layer.in_channels if isinstance(layer, nn.Conv2d) else int(config["input_size"][0])


def _size(model: nn.Module, config: dict[str, Any]) -> tuple[int, int]:
    traits = getattr(model, "_traits", None)
    built = traits.get("img_size") if isinstance(traits, dict) else None
    built = built or getattr(getattr(model, "patch_embed", None), "img_size", None)
    if isinstance(built, int):
        built = (built, built)
    height, width = tuple(built) if built is not None else tuple(config["input_size"])[-2:]
    return int(height), int(width)
