"""One image of any size, made to fit the network as timm evaluates: scaled on its short side, cut out of the middle."""

from __future__ import annotations

from math import floor

import numpy as np

from experiments.tasks.form import InputFormat


def fit(image: np.ndarray, form: InputFormat) -> np.ndarray:
    """Scale and cut one image; channels stay as they are.

    The sizes are those of ``timm.data.create_transform`` (``crop_mode="center"``): the short side becomes
    ``floor(size / form.crop)``, and the middle is cut out.  Resampling is Pillow's, which smooths when it reduces.  An
    image of the network's own size is unchanged when ``form.crop`` is 1.

    Args:
        image: uint8, (height, width, 1 | 3).
        form: what the network takes.

    Returns:
        uint8, (form.height, form.width, channels).
    """
    from PIL import Image

    height, width = scaled_size(image.shape[0], image.shape[1], form)
    if (height, width) != image.shape[:2]:
        picture = Image.fromarray(np.ascontiguousarray(image[..., 0] if image.shape[2] == 1 else image))
        filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
        resized = picture.resize((width, height), filters.get(form.interpolation, Image.Resampling.BICUBIC))
        image = np.asarray(resized).reshape(height, width, image.shape[2])
    top, left = round((height - form.height) / 2), round((width - form.width) / 2)
    return image[top : top + form.height, left : left + form.width]


def scaled_size(height: int, width: int, form: InputFormat) -> tuple[int, int]:
    """Height and width that an image is scaled to before its middle is cut out."""
    target = max(form.height, floor(form.height / form.crop)), max(form.width, floor(form.width / form.crop))
    if target[0] == target[1]:  # torchvision's Resize, which rounds the long side down
        short, long = sorted((height, width))
        sizes = (target[0], int(target[0] * long / short))
        return sizes if height <= width else (sizes[1], sizes[0])
    ratio = min(height / target[0], width / target[1])  # timm's ResizeKeepRatio
    return round(height / ratio), round(width / ratio)
