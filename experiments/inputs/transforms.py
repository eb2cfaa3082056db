"""Random views of full-size images, for training; evaluation's view is :func:`experiments.tasks.fit.fit`.

Everything is done on Pillow images: crops by Pillow itself, colours and policies through
``torchvision.transforms.v2.functional``, with the same pixels as torchvision's own classes.  Views are
drawn from a generator of their own, named by seed, epoch and row of the source: torch's global generator is neither
read nor moved, and a sample's view depends neither on the batch nor on the worker that makes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast
from zlib import crc32

import numpy as np
from PIL import Image

from experiments.inputs.fast import resize_fast
from experiments.tasks.form import InputFormat
from theory.errors import MergeboundError, nearest

_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_VIEW = 0x71E35


@dataclass(frozen=True)
class Views:
    """How training views are drawn: a random crop, a mirror image, then colours.

    Attributes:
        scale: share of the area that a crop keeps, drawn uniformly (Szegedy et al., arXiv 1409.4842).
        ratio: width over height of a crop, drawn log-uniformly.
        flip: probability of a mirror image.
        policy: ``trivial`` (TrivialAugment, wide ranges: Mueller and Hutter, arXiv 2103.10158), ``rand``
            (RandAugment: Cubuk et al., arXiv 1909.13719) or ``none``.
        operations, magnitude: of RandAugment, magnitude in 0 .. 30.
        jitter: brightness, contrast and saturation are each scaled by a factor in 1 - jitter .. 1 + jitter.
        erase: probability that a rectangle (2% to 33% of the area) is filled with the mean colour.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    policy: Literal["none", "trivial", "rand"] = "none"
    operations: int = 2
    magnitude: int = 9
    jitter: float = 0.0
    erase: float = 0.0

    def __post_init__(self) -> None:
        checks = (
            ("scale", 0 < self.scale[0] <= self.scale[1] <= 1, "two shares of the area, ascending, in (0, 1]"),
            ("ratio", 0 < self.ratio[0] <= self.ratio[1] < math.inf, "two positive numbers, ascending"),
            ("flip", 0 <= self.flip <= 1, "a probability"),
            ("policy", self.policy in ("none", "trivial", "rand"), "none, trivial or rand"),
            ("operations", self.operations >= 0, "a count"),
            ("magnitude", 0 <= self.magnitude < _BINS, f"in 0 .. {_BINS - 1}"),
            ("jitter", 0 <= self.jitter < 1, "in [0, 1)"),
            ("erase", 0 <= self.erase <= 1, "a probability"),
        )
        for field, good, wanted in checks:
            if not good:
                raise MergeboundError(f"views: {field} = {getattr(self, field)!r}; give {wanted}")


_BINS = 31
VIEWS: Mapping[str, Views] = {
    "crop_flip": Views(),
    "gentle": Views(scale=(0.5, 1.0)),
    "trivial": Views(policy="trivial"),
    "rand": Views(policy="rand"),
}
"""Views by name: the customary crop and mirror image, gentler crops, and crops with a policy of random operations."""


def views_by_name(name: str | None) -> Views | None:
    """Look up :data:`VIEWS`; ``None`` and ``"none"`` mean evaluation's view.

    Raises:
        MergeboundError: the name is not known.
    """
    if name is None or name == "none":
        return None
    if name not in VIEWS:
        raise MergeboundError(f"views: there are none called {name!r}; {nearest(name, [*VIEWS, 'none'])}")
    return VIEWS[name]


def training_view(
    image: np.ndarray, form: InputFormat, views: Views, rng: np.random.Generator, *, fast: bool = False
) -> np.ndarray:
    """A random view.

    Args:
        image: uint8, (height, width, channels), 1 or 3 channels.
        form: size and ``interpolation``.
        views: what is drawn.
        rng: the sample's generator (:func:`view_generator`).
        fast: resample with :func:`experiments.inputs.fast.resize_fast`.

    Returns:
        uint8, (form.height, form.width, channels).
    """
    top, left, height, width = draw_crop(image.shape[0], image.shape[1], views, rng)
    image = image[top : top + height, left : left + width]
    if fast:
        picture = _picture(resize_fast(image, form.height, form.width, form.interpolation))
    else:
        chosen = _FILTERS.get(form.interpolation, Image.Resampling.BICUBIC)
        picture = _picture(image).resize((form.width, form.height), chosen)
    if rng.random() < views.flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if views.policy != "none":
        for name, amount in draw_operations(views, form.height, form.width, rng):
            picture = apply_operation(picture, name, amount)
    if views.jitter:
        from torchvision.transforms.v2 import functional as F

        changes = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)
        factors = rng.uniform(1 - views.jitter, 1 + views.jitter, size=3)
        for index in rng.permutation(3):
            picture = changes[index](picture, float(factors[index]))
    pixels = np.asarray(picture).reshape(form.height, form.width, image.shape[-1])
    if views.erase and rng.random() < views.erase:
        narrow = Views(scale=(0.02, 0.33), ratio=(0.3, 1 / 0.3))
        top, left, height, width = draw_crop(form.height, form.width, narrow, rng)
        pixels = pixels.copy()
        mean = np.rint(255 * np.broadcast_to(np.asarray(form.mean), form.channels)).astype(np.uint8)
        pixels[top : top + height, left : left + width] = mean if pixels.shape[2] == len(mean) else round(mean.mean())
    return pixels


def _picture(image: np.ndarray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(image[..., 0] if image.shape[-1] == 1 else image))


def view_generator(seed: int, epoch: int, row: int, name: str = "") -> np.random.Generator:
    """The generator of one sample's view in one epoch.

    Args:
        seed, name: name the stream; data sets with different names draw independently.
        row: the sample's number in the source.
    """
    return np.random.default_rng([seed, _VIEW, crc32(name.encode()), epoch, row])


def draw_crop(height: int, width: int, views: Views, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random crop; where ten draws do not fit, the middle at the nearest ratio."""
    for _ in range(10):
        area = height * width * rng.uniform(*views.scale)
        ratio = math.exp(rng.uniform(math.log(views.ratio[0]), math.log(views.ratio[1])))
        wide, tall = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < tall <= height:
            return int(rng.integers(height - tall + 1)), int(rng.integers(width - wide + 1)), tall, wide
    ratio = min(max(width / height, views.ratio[0]), views.ratio[1])
    wide, tall = min(width, max(1, round(height * ratio))), min(height, max(1, round(width / ratio)))
    return (height - tall) // 2, (width - wide) // 2, tall, wide


# --- policies --------------------------------------------------------------------------------------------------------

_TRIVIAL = {"shear": 0.99, "move": 32.0, "turn": 135.0, "colour": 0.99, "bits": 6}
_GEOMETRY = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
_COLOUR = ("Brightness", "Color", "Contrast", "Sharpness")
OPERATIONS = ("Identity", *_GEOMETRY, *_COLOUR, "Posterize", "Solarize", "AutoContrast", "Equalize")
"""The fourteen operations that RandAugment and TrivialAugment choose from, each equally often."""


def draw_operations(views: Views, height: int, width: int, rng: np.random.Generator) -> list[tuple[str, float]]:
    """Names and strengths of a policy's operations for one image of the given size."""
    trivial = views.policy == "trivial"
    found = []
    for _ in range(1 if trivial else views.operations):
        name = OPERATIONS[int(rng.integers(len(OPERATIONS)))]
        part = (int(rng.integers(_BINS)) if trivial else views.magnitude) / (_BINS - 1)
        sign = -1.0 if rng.random() < 0.5 else 1.0
        found.append((name, strength(name, part, sign, height, width, trivial=trivial)))
    return found


def strength(name: str, part: float, sign: float, height: int, width: int, *, trivial: bool) -> float:
    """An operation's own number for a magnitude ``part`` in [0, 1]: shear, pixels, degrees, change of factor, bits
    kept or threshold in [0, 1]; 0 where it has none."""
    if name in ("ShearX", "ShearY"):
        return sign * part * (_TRIVIAL["shear"] if trivial else 0.3)
    if name in ("TranslateX", "TranslateY"):
        side = width if name.endswith("X") else height
        return sign * part * (_TRIVIAL["move"] if trivial else 150.0 / 331.0 * side)
    if name == "Rotate":
        return sign * part * (_TRIVIAL["turn"] if trivial else 30.0)
    if name in _COLOUR:
        return sign * part * (_TRIVIAL["colour"] if trivial else 0.9)
    if name == "Posterize":
        return float(round(8 - part * (_TRIVIAL["bits"] if trivial else 4)))
    return 1.0 - part if name == "Solarize" else 0.0


def apply_operation(picture: Image.Image, name: str, amount: float) -> Image.Image:
    """Apply one of :data:`OPERATIONS` to a Pillow image; what comes in from outside is black."""
    from torchvision.transforms.v2 import functional as F

    whole: dict[str, Any] = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
    degrees = math.degrees(math.atan(amount)) if name.startswith("Shear") else 0.0
    calls: dict[str, Callable[[], Any]] = {
        "Identity": lambda: picture,
        "ShearX": lambda: F.affine(picture, **whole | {"shear": [degrees, 0.0]}, center=[0, 0]),
        "ShearY": lambda: F.affine(picture, **whole | {"shear": [0.0, degrees]}, center=[0, 0]),
        "TranslateX": lambda: F.affine(picture, **whole | {"translate": [int(amount), 0]}),
        "TranslateY": lambda: F.affine(picture, **whole | {"translate": [0, int(amount)]}),
        "Rotate": lambda: F.rotate(picture, amount),
        "Brightness": lambda: F.adjust_brightness(picture, 1.0 + amount),
        "Color": lambda: F.adjust_saturation(picture, 1.0 + amount),
        "Contrast": lambda: F.adjust_contrast(picture, 1.0 + amount),
        "Sharpness": lambda: F.adjust_sharpness(picture, 1.0 + amount),
        "Posterize": lambda: F.posterize(picture, int(amount)),
        "Solarize": lambda: F.solarize(picture, 255.0 * amount),
        "AutoContrast": lambda: F.autocontrast(picture),
        "Equalize": lambda: F.equalize(picture),
    }
    return cast(Image.Image, calls[name]())
