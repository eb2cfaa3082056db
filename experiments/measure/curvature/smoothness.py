"""Smoothness: L on sampled points of a segment, of mini-batches, and upper bounds where a global one exists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from torch import Tensor

from experiments.measure.curvature.lanczos import Eigenvalues, both_ends
from experiments.measure.curvature.number import Number
from experiments.measure.curvature.operators import Kind, curvature_operator
from experiments.measure.curvature.risk import EmpiricalRisk
from theory.errors import MergeboundError

if TYPE_CHECKING:
    import pandas as pd

Array = npt.NDArray[np.float64]
BATCHES = 0xBA7C5
"""Names the stream of the mini-batches whose smoothness is measured."""


@dataclass(frozen=True, eq=False)
class Smoothness:
    """Ends of the curvature's spectrum at several points (or of several mini-batches at one point).

    Attributes:
        where: t of each point of a segment, or the number of each batch.
        largest, smallest: extreme eigenvalues found, (points,): Rayleigh quotients, so the truth lies outside.
        residuals: of both, (points, 2).
        limits: what the smallest and the largest eigenvalue do not lie beyond, with probability ``1 - chance`` each,
            (points, 2); infinite where the steps were too few.
        chance: see ``limits``; one value for all points together.
        kind: which curvature.
        what: ``segment`` or ``batches of b``.
        name: of the task.
        seed: of start vectors and batches.
        tier: of every number.
    """

    where: Array
    largest: Array
    smallest: Array
    residuals: Array
    limits: Array
    chance: float
    kind: str
    what: str
    name: str
    seed: int
    tier: str = "estimated"

    def high(self) -> Number:
        """L: the largest eigenvalue over the points; interval from the value to the probable limit.

        It errs low for what lies between the points, or for the batches that were not drawn.
        """
        top = int(self.largest.argmax())
        return Number(
            float(self.largest[top]), float(self.largest[top]), float(self.limits[:, 1].max()), float("nan"),
            f"these points: with chance {self.chance:g} of an error; between them ({self.what}) L may be larger",
            self.seed, self.tier,
        )  # fmt: skip

    def low(self) -> Number:
        """m: the smallest eigenvalue over the points; interval from the probable limit to the value."""
        least = int(self.smallest.argmin())
        return Number(
            float(self.smallest[least]), float(self.limits[:, 0].min()), float(self.smallest[least]), float("nan"),
            f"these points: with chance {self.chance:g} of an error; between them ({self.what}) m may be smaller",
            self.seed, self.tier,
        )  # fmt: skip

    def mean(self) -> Number:
        """Mean of the largest eigenvalues with a 95 % interval over batches (a summary, no bound)."""
        count = len(self.largest)
        error = float(self.largest.std(ddof=1) / np.sqrt(count)) if count > 1 else float("nan")
        return Number.normal(float(self.largest.mean()), error, f"{self.what} (95 %)", self.seed)

    def to_frame(self) -> pd.DataFrame:
        """One row per point or batch."""
        import pandas as pd

        return pd.DataFrame(
            {
                "task": self.name,
                "what": self.what,
                "where": self.where,
                "largest": self.largest,
                "largest_residual": self.residuals[:, 1],
                "largest_limit": self.limits[:, 1],
                "smallest": self.smallest,
                "smallest_residual": self.residuals[:, 0],
                "smallest_limit": self.limits[:, 0],
                "kind": self.kind,
                "tier": self.tier,
                "seed": self.seed,
            }
        )


def segment_smoothness(
    risk: EmpiricalRisk,
    start: Tensor,
    end: Tensor,
    *,
    points: int = 3,
    kind: Kind = "hessian",
    columns: Tensor | None = None,
    steps: int = 30,
    chance: float = 0.01,
    seed: int = 0,
) -> Smoothness:
    """Extreme curvature of a task's risk at equally spaced points of a segment, ends included.

    This is L (and m) *restricted to the sampled points*: lower estimates of L on the segment and, for a network, no
    statement about any other place.  Theorem 1 needs L everywhere; section 2's directional form needs less
    (:func:`experiments.measure.curvature.directional.segment_curvature`).

    Args:
        risk: of one task.
        start, end: (P,).
        points: 1 measures at ``start`` alone.
        kind: which curvature.
        columns: only these coordinates, (m,): what was trained, or one layer for Lemma 1's per-layer form.
        steps: Lanczos products per point (and end of the spectrum: both ends come from one run).
        chance: of any of the limits being wrong.
        seed: names start vectors.

    Raises:
        MergeboundError: counts below one, or products that are not finite.
    """
    if points < 1 or steps < 2:
        raise MergeboundError(f"points = {points}, steps = {steps}: give 1 or more points and 2 or more steps")
    at = np.linspace(0.0, 1.0, points) if points > 1 else np.zeros(1)
    found = []
    for number, t in enumerate(at):
        point = start + float(t) * (end - start)
        operator = curvature_operator(risk, point, kind, columns=columns, seed=seed)
        found.append(both_ends(operator, steps=steps, chance=chance / points, seed=seed + number))
    return _collected(at, found, chance, kind, "segment", risk.name, seed)


def batch_smoothness(
    risk: EmpiricalRisk,
    point: Tensor,
    batch_size: int,
    *,
    batches: int = 8,
    kind: Kind = "hessian",
    columns: Tensor | None = None,
    steps: int = 20,
    chance: float = 0.01,
    seed: int = 0,
) -> Smoothness:
    """Extreme curvature of mini-batch losses at one point: what the one-step factor q of theorem 2 sees.

    ``q(eta) = max(1 - eta (m + omega), eta (L + omega) - 1)`` with m, L over *all* batches that can be drawn; those
    that were drawn here give a lower estimate of L and an upper one of m.

    Args:
        risk: on the training sample (``task_risk`` with ``part="train"``, and ``head=True`` where the head is trained).
        point: (P,).
        batch_size: b.
        batches: how many, drawn without replacement each.
        kind, columns, steps, chance, seed: as :func:`segment_smoothness`; the seed also names the batches.

    Raises:
        MergeboundError: a batch larger than the sample, or counts below one.
    """
    if not 1 <= batch_size <= len(risk) or batches < 1:
        raise MergeboundError(f"batch_size = {batch_size}, batches = {batches}: give 1 to {len(risk)}, and 1 or more")
    rng = np.random.default_rng([seed, BATCHES])
    found = []
    for number in range(batches):
        part = risk.take(np.sort(rng.permutation(len(risk))[:batch_size]))
        operator = curvature_operator(part, point, kind, columns=columns, seed=seed)
        found.append(both_ends(operator, steps=steps, chance=chance / batches, seed=seed + number))
    where = np.arange(batches, dtype=np.float64)
    return _collected(where, found, chance, kind, f"batches of {batch_size}", risk.name, seed)


def _collected(
    where: Array,
    found: Sequence[tuple[Eigenvalues, Eigenvalues]],
    chance: float,
    kind: str,
    what: str,
    name: str,
    seed: int,
) -> Smoothness:
    low, high = zip(*found, strict=True)
    return Smoothness(
        where,
        np.array([e.values[0] for e in high]),
        np.array([e.values[0] for e in low]),
        np.array([(a.residuals[0], b.residuals[0]) for a, b in found]),
        np.array([(a.limit, b.limit) for a, b in found]),
        chance,
        kind,
        what,
        name,
        seed,
    )
