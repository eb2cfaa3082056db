"""Per-sample gradients in blocks of bounded memory, and what is computed from them in one or two passes.

A block of m samples costs m d numbers; blocks are kept between passes where all of them fit the given memory, and
computed again where they do not.  Sums are in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from experiments.measure.noise.objective import Objective
from theory.errors import MergeboundError

LARGE = 2**18
"""From so many parameters on, samples go one after the other: grouped convolutions of many samples are slower then
(0.29 against 0.70 s a sample for a ResNet of 2.8M parameters on 8 x 8 images; 0.006 against 0.003 at 39K)."""
MEMORY = 256 * 2**20
"""Default bytes for per-sample gradients."""
_LONGEST = 128


@dataclass(frozen=True, eq=False)
class Rows:
    """Per-sample gradients of an objective at its point, (m, d), block by block.

    Attributes:
        objective: losses and point.
        inputs, labels: m samples.
        memory: bytes that gradients may take; at least one sample's always fits.
    """

    objective: Objective
    inputs: Tensor
    labels: Tensor
    memory: int = MEMORY
    _kept: list[tuple[Tensor, Tensor]] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        if len(self.labels) < 1 or len(self.inputs) != len(self.labels):
            raise MergeboundError(
                f"samples: {len(self.inputs)} inputs and {len(self.labels)} labels; give as many of both, at least one"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def length(self) -> int:
        """Samples in a block."""
        row = self.objective.size * self.objective.theta.element_size()
        return int(max(1, min(_LONGEST, self.memory // max(4 * row, 1))))

    @property
    def fits(self) -> bool:
        """Whether all gradients are kept between passes."""
        return len(self) * self.objective.size * self.objective.theta.element_size() <= self.memory

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Gradients (k, d) and losses (k,) of consecutive samples; without decay."""
        if self._kept:
            yield from self._kept
            return
        objective = self.objective

        def one(image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
            function = grad_and_value(lambda t: objective.losses(t, image[None], label[None])[0])
            found: tuple[Tensor, Tensor] = function(objective.theta)
            return found

        kept = []
        for images, labels in zip(
            torch.split(self.inputs, self.length), torch.split(self.labels, self.length), strict=True
        ):
            with torch.no_grad():  # not across a yield: blocks of several points are read in turns
                if objective.size < LARGE:
                    block = vmap(one, randomness="error")(images, labels)
                else:
                    singly = [one(image, label) for image, label in zip(images, labels, strict=True)]
                    block = (torch.stack([g for g, _ in singly]), torch.stack([loss for _, loss in singly]))
            if not bool(torch.isfinite(block[0]).all()):
                raise MergeboundError(
                    "per-sample gradients: NaN or infinite values; the point is not one of a run that stayed finite"
                )
            if self.fits:
                kept.append(block)
            yield block
        self._kept.extend(kept)


@dataclass(frozen=True, eq=False)
class Moments:
    """What one pass over per-sample gradients gives.

    Attributes:
        mean: mean gradient, (d,) float64.
        squares: squared norms of the shared and of the head part, (m, 2).
        losses: (m,).
    """

    mean: Tensor
    squares: np.ndarray
    losses: np.ndarray

    @property
    def count(self) -> int:
        """Number of samples m."""
        return len(self.losses)


def moments(rows: Rows) -> Moments:
    """Mean gradient, squared norms by part and losses, in one pass."""
    total = torch.zeros(rows.objective.size, dtype=torch.float64)
    squares, losses = [], []
    cut = rows.objective.shared
    for block, values in rows.blocks():
        total += block.sum(dim=0, dtype=torch.float64)
        wide = block.double().square()
        squares.append(torch.stack([wide[:, :cut].sum(dim=1), wide[:, cut:].sum(dim=1)], dim=1).numpy())
        losses.append(values.double().numpy())
    return Moments(total / len(rows), np.concatenate(squares), np.concatenate(losses))


def along(rows: Rows, directions: Tensor) -> np.ndarray:
    """Inner products of every per-sample gradient with k directions (k, d), by part: (m, k, 2)."""
    cut = rows.objective.shared
    wide = directions.double()
    parts = []
    for block, _ in rows.blocks():
        g = block.double()
        parts.append(torch.stack([g[:, :cut] @ wide[:, :cut].T, g[:, cut:] @ wide[:, cut:].T], dim=2).numpy())
    return np.concatenate(parts)


def squared_gaps(first: Rows, second: Rows) -> np.ndarray:
    """Squared distances of every gradient of ``first`` from every one of ``second``, by part: (m, m', 2).

    Blocks of ``second`` are computed again for every block of ``first`` where they do not fit the memory.
    """
    cut = first.objective.shared
    lines = []
    for block, _ in first.blocks():
        a = block.double()
        cells = []
        for other, _ in second.blocks():
            b = other.double()
            parts = [_distances(a[:, :cut], b[:, :cut]), _distances(a[:, cut:], b[:, cut:])]
            cells.append(torch.stack(parts, dim=2))
        lines.append(torch.cat(cells, dim=1).numpy())
    return np.concatenate(lines)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    squares = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)[None] - 2.0 * (a @ b.T)
    return squares.clamp(min=0.0)
