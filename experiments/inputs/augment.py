"""Light augmentation of 8-bit images, drawn per sample and epoch.

The draws come from a counter-based generator: Philox4x32-10 keyed by the seed, with the counter (row, draw, epoch, 0).
What happens to a sample in an epoch therefore depends on nothing else: not on the batch, the order, the worker, the
device, nor on the share of the data that is used.

An image stays 8-bit, and all arithmetic is in whole numbers, so that every device gives the same pixels.  In order:

1. *Shift* by (dy, dx), uniform in -shift .. shift: pixel (y, x) is the old pixel (y + dy, x + dx), beyond the border
   mirrored without repeating the edge (``reflect``) or black (``zero``).
2. *Flip* left and right, with a probability.
3. *Contrast and brightness*: v becomes ``(v - 128) * gain + 128 + offset``, rounded and cut to 0 .. 255.
4. *Cutout* (DeVries and Taylor, arXiv 1708.04552): a square around a uniform pixel, cut at the border, takes the fill
   colour (the mean that normalisation subtracts).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from merging.random_masks import philox
from theory.errors import MergeboundError, nearest

ONE = 65536
"""Gain and offset are whole numbers in units of 1/65536."""


@dataclass(frozen=True)
class Augmentation:
    """What may happen to a training image; the default is nothing.

    Attributes:
        shift: at most so many pixels in each direction.
        pad: what comes in at the border: ``reflect`` or ``zero``.
        flip: probability of a mirror image; not for characters and signs.
        brightness: offset within +-brightness of the whole range 0 .. 255.
        contrast: gain within 1 +- contrast.
        cutout: side of the square in pixels; 0 for none.
    """

    shift: int = 0
    pad: Literal["reflect", "zero"] = "reflect"
    flip: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    cutout: int = 0

    def __post_init__(self) -> None:
        checks = (
            ("shift", isinstance(self.shift, int) and self.shift >= 0, "a whole number of pixels, 0 or more"),
            ("pad", self.pad in ("reflect", "zero"), "'reflect' or 'zero'"),
            ("flip", 0 <= self.flip <= 1, "a probability, 0 to 1"),
            ("brightness", 0 <= self.brightness <= 1, "in [0, 1]"),
            ("contrast", 0 <= self.contrast < 1, "in [0, 1)"),
            ("cutout", isinstance(self.cutout, int) and self.cutout >= 0, "a whole number of pixels, 0 or more"),
        )
        for field, good, wanted in checks:
            if not good:
                raise MergeboundError(f"augmentation: {field} = {getattr(self, field)!r}; must be {wanted}")

    @property
    def nothing(self) -> bool:
        """Whether images stay as they are."""
        return not (self.shift or self.flip or self.brightness or self.contrast or self.cutout)


NOTHING = Augmentation()
"""Images stay as they are."""

PRESETS = {
    "none": NOTHING,
    "light": Augmentation(shift=2, brightness=0.1, contrast=0.1),
    "flip_shift": Augmentation(shift=4, pad="zero", flip=0.5),
}
"""``light``: for any task, characters too; ``flip_shift``: the usual one of CIFAR (He et al. 2015)."""


def augmentation(spec: str | Augmentation | None) -> Augmentation:
    """An augmentation, from the name of a preset where one is given; ``None`` is ``none``.

    Raises:
        MergeboundError: an unknown name.
    """
    if isinstance(spec, Augmentation):
        return spec
    name = "none" if spec is None else spec
    if name not in PRESETS:
        raise MergeboundError(f"augmentation: there is no preset {name!r}; {nearest(name, PRESETS)}")
    return PRESETS[name]


@dataclass(frozen=True)
class Draws:
    """What happens to each of m samples: (m,) int32 each.

    Attributes:
        dy, dx: shift in pixels.
        flip: 1 for a mirror image.
        gain, offset: in units of 1/65536 (see the module's text).
        cut_y, cut_x: centre of the cutout.
    """

    dy: np.ndarray
    dx: np.ndarray
    flip: np.ndarray
    gain: np.ndarray
    offset: np.ndarray
    cut_y: np.ndarray
    cut_x: np.ndarray

    def table(self) -> np.ndarray:
        """All of them, (m, 7) int32, in the order above."""
        columns = (self.dy, self.dx, self.flip, self.gain, self.offset, self.cut_y, self.cut_x)
        return np.ascontiguousarray(np.stack(columns, axis=1), dtype=np.int32)


def draw(
    spec: Augmentation, rows: np.ndarray, epoch: int, height: int, width: int, *, seed: int = 0, name: str = ""
) -> Draws:
    """The draws of some samples in one epoch.

    Args:
        spec: the ranges.
        rows: (m,) whole numbers below 2^32 that name the samples: rows of the source, not of the batch or share.
        epoch: from 0, below 2^32.
        height, width: of the images.
        seed, name: name the stream; data sets with different names draw independently.
    """
    key = _key(seed, name)
    blocks = 2 if spec.contrast or spec.cutout else 1
    low = np.asarray(rows, dtype=np.uint64)
    counters = np.concatenate([low + np.uint64(number << 32) for number in range(blocks)])
    words = philox(np.array([*key, epoch, 0], dtype=np.uint32), counters).astype(np.uint64).reshape(blocks, -1, 4)
    second = words[-1]
    reach = 2 * spec.shift + 1
    gain, offset = round(spec.contrast * ONE), round(spec.brightness * 255 * ONE)
    return Draws(
        dy=_below(words[0, :, 0], reach) - spec.shift,
        dx=_below(words[0, :, 1], reach) - spec.shift,
        flip=(words[0, :, 2] < np.uint64(round(spec.flip * 2**32))).astype(np.int32),
        offset=_below(words[0, :, 3], 2 * offset + 1) - offset,
        gain=_below(second[:, 0], 2 * gain + 1) + (ONE - gain),
        cut_y=_below(second[:, 1], height if spec.cutout else 1),
        cut_x=_below(second[:, 2], width if spec.cutout else 1),
    )


def augment(images: Tensor, spec: Augmentation, draws: Draws, fill: tuple[int, ...] | None = None) -> Tensor:
    """Augment a batch, on whatever device it lies; :mod:`experiments.inputs.kernels` gives the same, faster, on a CPU.

    Args:
        images: uint8, (m, channels, height, width).
        spec: what may happen; its ranges are in the draws already.
        draws: of the m samples.
        fill: colour of the cutout, one whole number per channel; default mid-grey.

    Returns:
        uint8, (m, channels, height, width).
    """
    m, channels, height, width = images.shape
    device = images.device
    table = torch.from_numpy(draws.table()).to(device)
    dy, dx, flip, gain, offset, cut_y, cut_x = (table[:, number, None] for number in range(7))
    y, x = torch.arange(height, device=device), torch.arange(width, device=device)
    old_y, good_y = _source(y + dy, height, spec.pad)
    old_x, good_x = _source(torch.where(flip > 0, width - 1 - x, x) + dx, width, spec.pad)
    sample = torch.arange(m, device=device)[:, None, None, None]
    channel = torch.arange(channels, device=device)[None, :, None, None]
    moved = images[sample, channel, old_y[:, None, :, None], old_x[:, None, None, :]]
    moved = moved * (good_y[:, None, :, None] & good_x[:, None, None, :])
    if spec.brightness or spec.contrast:
        scaled = (moved.int() - 128) * gain[:, :, None, None] + (offset[:, :, None, None] + 128 * ONE + ONE // 2)
        moved = (scaled >> 16).clamp(0, 255).to(torch.uint8)
    if spec.cutout:
        first_y, first_x = cut_y - spec.cutout // 2, cut_x - spec.cutout // 2
        inside_y = (y >= first_y) & (y < first_y + spec.cutout)
        inside_x = (x >= first_x) & (x < first_x + spec.cutout)
        colour = torch.tensor(fill or (128,) * channels, dtype=torch.uint8, device=device).view(1, -1, 1, 1)
        moved = torch.where(inside_y[:, None, :, None] & inside_x[:, None, None, :], colour, moved)
    return moved


def check_shift(spec: Augmentation, height: int, width: int) -> None:
    """Check that images are large enough to be shifted.

    Raises:
        MergeboundError: a shift of a whole side or more.
    """
    if spec.shift >= min(height, width):
        raise MergeboundError(
            f"augmentation: shift = {spec.shift} pixels, but images are {height} x {width}; give a smaller shift"
        )


def _source(index: Tensor, size: int, pad: str) -> tuple[Tensor, Tensor]:
    """Where pixels come from, and whether they lie inside."""
    inside = (index >= 0) & (index < size)
    if pad == "zero":
        return index.clamp(0, size - 1), inside
    mirrored = (size - 1) - (index.abs() - (size - 1)).abs()
    return mirrored, torch.ones_like(inside)


def _below(words: np.ndarray, count: int) -> np.ndarray:
    """Whole numbers in 0 .. count - 1, uniform up to count / 2^32 (int32)."""
    return ((words * np.uint64(count)) >> np.uint64(32)).astype(np.int32)


@cache
def _key(seed: int, name: str) -> tuple[int, int]:
    digest = blake2b(f"{seed}\0{name}".encode(), digest_size=8, person=b"mergebound-view").digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
