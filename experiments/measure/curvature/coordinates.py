"""Which coordinates a curvature is taken in: what was trained, or everything that is merged."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from experiments.measure.landscape.lines import shared_size
from experiments.measure.subject import Subject
from theory.errors import MergeboundError, nearest

Coordinates = Literal["trained", "merged"]
COORDINATES: tuple[Coordinates, ...] = get_args(Coordinates)


def check_coordinates(wanted: str) -> None:
    """Refuse an unknown word.

    Raises:
        MergeboundError: names the nearest.
    """
    if wanted not in COORDINATES:
        raise MergeboundError(f"coordinates {wanted!r}: {nearest(wanted, COORDINATES)}")


def coordinates(subject: Subject, wanted: Coordinates = "trained", size: int | None = None) -> Tensor | None:
    """Places of the wanted coordinates in a point, for ``curvature_operator(columns=)``.

    A point holds parameters first, then BatchNorm's running statistics, then (where there is one) the expert's head.
    Statistics are merged like weights, but no gradient moves them: a Hessian that differentiates them is not the one
    that training or SAM sees.

    Args:
        subject: says which coordinates are which.
        wanted: ``trained`` leaves running statistics out; ``merged`` takes all.
        size: of the point; more than P with a head behind it.  Default P.

    Returns:
        (m,) int64 ascending, or ``None`` where these are all of them.

    Raises:
        MergeboundError: another word.
    """
    check_coordinates(wanted)
    total = subject.base.numel()
    cut = shared_size(subject)
    if wanted == "merged" or cut == total:
        return None
    return torch.cat([torch.arange(cut), torch.arange(total, total if size is None else size)])


def about_coordinates(subject: Subject, wanted: Coordinates) -> list[str]:
    """What a reader has to know where the two differ: one line, or none."""
    total, cut = subject.base.numel(), shared_size(subject)
    if cut == total:
        return []
    if wanted == "merged":
        return [
            f"spectrum, trace, density and smoothness also differentiate {total - cut:,} running statistics, which no "
            "gradient moves"
        ]
    return [
        f"spectrum, trace, density and smoothness are over {cut:,} parameters; {total - cut:,} running statistics stay "
        "fixed (--coordinates merged takes them too)"
    ]
