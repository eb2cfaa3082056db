"""What a network takes: the size of images and how they are normalised."""

from __future__ import annotations

from dataclasses import dataclass

from theory.errors import MergeboundError


@dataclass(frozen=True)
class InputFormat:
    """What a network takes: channels, height and width in pixels, and the normalisation of images in [0, 1].

    ``mean`` and ``std`` have one number per channel; ``interpolation`` is ``bilinear`` or ``bicubic``; ``crop`` is the
    share of a photograph's short side that is kept.
    """

    channels: int
    height: int
    width: int
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    interpolation: str = "bicubic"
    crop: float = 1.0

    def __post_init__(self) -> None:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.channels):
                raise MergeboundError(
                    f"{name}: {len(values)} numbers for a network that takes {self.channels} channel(s); give one "
                    "number or one per channel"
                )
        if not all(value > 0 for value in self.std):
            raise MergeboundError(f"std: {self.std} holds a number that is not positive; give positive numbers")
