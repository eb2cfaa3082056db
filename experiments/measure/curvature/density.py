"""The spectral density of a symmetric operator by stochastic Lanczos quadrature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from experiments.measure.curvature.lanczos import Array, lanczos
from experiments.measure.curvature.number import Number
from theory.errors import MergeboundError

if TYPE_CHECKING:
    import pandas as pd
    from scipy.sparse.linalg import LinearOperator

DENSITY = 0xDE45
"""Names the stream of quadrature probes."""


@dataclass(frozen=True, eq=False)
class SpectralDensity:
    """Gauss quadratures of the spectral measure, one per probe.

    Attributes:
        nodes: eigenvalue nodes of each probe, each (m,).
        weights: their weights, each (m,), with sum one.
        size: P.
        seed: of the probes.
        tier: of every number that comes from it.
    """

    nodes: tuple[Array, ...]
    weights: tuple[Array, ...]
    size: int
    seed: int
    tier: str = "estimated"

    def mean(self, function: Callable[[Array], Array]) -> Number:
        """Mean of a function over the eigenvalues, ``tr f(A) / P``, with a 95 % interval over probes.

        Exact for each probe's share where f is a polynomial of degree below twice the steps.
        """
        values = np.array([float(w @ function(x)) for x, w in zip(self.nodes, self.weights, strict=True)])
        error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
        return Number.normal(
            float(values.mean()), float(error), "probes (95 %), at this point on these images", self.seed
        )

    def trace(self, function: Callable[[Array], Array] = lambda x: x) -> Number:
        """``tr f(A)``; by default the trace."""
        found = self.mean(function)
        return Number.normal(found.value * self.size, found.standard_error * self.size, found.covers, self.seed)

    def share_above(self, threshold: float) -> Number:
        """Share of the eigenvalues above a threshold (in ``[0, 1]``)."""
        return self.mean(lambda x: (x > threshold).astype(np.float64))

    def curve(self, grid: Array | None = None, width: float | None = None) -> pd.DataFrame:
        """A smoothed density on a grid.

        Args:
            grid: where, (G,); default 512 points over all nodes and three widths more.
            width: standard deviation of the normal kernel; default a hundredth of the range of nodes.

        Returns:
            Columns ``eigenvalue``, ``density`` (per unit of eigenvalue, integral one), ``standard_error`` over probes.
        """
        import pandas as pd

        low, high = min(x.min() for x in self.nodes), max(x.max() for x in self.nodes)
        sigma = width if width is not None else max((high - low) / 100, 1e-12 * max(abs(low), abs(high), 1e-300))
        if sigma <= 0:
            raise MergeboundError(f"width = {width}: give a positive number")
        at = np.linspace(low - 3 * sigma, high + 3 * sigma, 512) if grid is None else np.asarray(grid, dtype=np.float64)
        rows = []
        for nodes, weights in zip(self.nodes, self.weights, strict=True):
            kernel = np.exp(-0.5 * ((at[:, None] - nodes) / sigma) ** 2) / (sigma * np.sqrt(2 * np.pi))
            rows.append(kernel @ weights)
        table = np.array(rows)
        error = table.std(axis=0, ddof=1) / np.sqrt(len(rows)) if len(rows) > 1 else np.full(len(at), np.nan)
        return pd.DataFrame({"eigenvalue": at, "density": table.mean(axis=0), "standard_error": error})


def spectral_density(operator: LinearOperator, *, steps: int = 30, probes: int = 4, seed: int = 0) -> SpectralDensity:
    """Stochastic Lanczos quadrature: ``probes`` normal start vectors, ``steps`` products each.

    Args:
        operator: symmetric, (P, P).
        steps: Lanczos steps m, with full reorthogonalisation.
        probes: start vectors.
        seed: names them.

    Raises:
        MergeboundError: counts below one, or products that are not finite.

    Source: Ubaru, Chen and Saad, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature", 2017; Ghorbani,
    Krishnan and Xiao, 2019 (arXiv:1901.10159).  Start vectors are uniform on the sphere, so that each probe's
    ``sum w f(node)`` has expectation ``tr f(A) / P`` for polynomials of degree below 2m.
    """
    if steps < 1 or probes < 1:
        raise MergeboundError(f"steps = {steps}, probes = {probes}: give 1 or more of each")
    nodes, weights = [], []
    for probe in range(probes):
        start = np.random.default_rng([seed, DENSITY, probe]).standard_normal(operator.shape[0])
        values, vectors = lanczos(operator, steps, start).ritz()
        nodes.append(values)
        weights.append(vectors[0] ** 2)
    return SpectralDensity(tuple(nodes), tuple(weights), operator.shape[0], seed)
