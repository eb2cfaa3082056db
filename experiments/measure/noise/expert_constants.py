"""The constants of experts as data: what was measured, as attributes and as tables."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from experiments.measure.noise.at_point import PARTS, PointNoise
from experiments.measure.noise.constant import Constant
from experiments.measure.noise.one_step import OneStep


@dataclass(frozen=True)
class ExpertConstants:
    """Constants of one expert; suprema are over the points that were looked at.

    Largest values over samples or batches (``D_inf*``, ``G``, ``L``, ``highest``, ``kappa``) are lower estimates: their
    ``high`` is infinite, ``lowest`` likewise has no lower limit.

    Attributes:
        name, task: of the expert.
        n: size of S_i; ``None`` where S_i is not known and the samples stand for the task itself.
        points: in the order of the path (base first, expert last), chord points among them.
        g: |grad F_S(x_0) + omega x_0| (theory.md's g_i).
        sigma0, sigma: gradient noise at x_0, and its largest value on the path.
        sigma_batch: rms noise of a batch's mean gradient, largest on the path: sigma sqrt((n-b)/(n-1)/b) for distinct
            samples, sigma/sqrt(b) with replacement; ``None`` where the run is not known.
        D_2, D_inf: gradient gap, rms per point and largest over points; largest pair seen.
        D_inf_shared, D_inf_private: of the two parts of the gradient.
        G: largest per-sample gradient norm seen.
        L: largest absolute eigenvalue of a single sample's Hessian seen (a lower estimate of the smoothness).
        lowest, highest: ends of the Hessian of F_S (over the samples) on the path, without decay.
        pl: smallest PL ratio on the path.
        initial_risk, training_risk: F_S at x_0 (with the starting head) and at the expert.
        base_norm: |x_0| of what was trained.
        drift, private_drift: |Delta_i| of the shared part and of the head, both of what was trained.
        steps: the one-step factor; ``None`` where no learning rate is known.
    """

    name: str
    task: str
    n: int | None
    points: tuple[PointNoise, ...]
    g: Constant
    sigma0: Constant
    sigma: Constant
    sigma_batch: Constant | None
    D_2: Constant
    D_inf: Constant
    D_inf_shared: Constant
    D_inf_private: Constant
    G: Constant
    L: Constant
    lowest: Constant
    highest: Constant
    pl: Constant
    initial_risk: Constant
    training_risk: Constant
    base_norm: Constant
    drift: Constant
    private_drift: Constant
    steps: OneStep | None

    @property
    def kappa(self) -> Constant | None:
        """Measured one-step rate."""
        return None if self.steps is None else self.steps.kappa

    def lower_estimates(self, names: Iterable[str]) -> tuple[str, ...]:
        """Those of the recipe's fields that are lower estimates; without a measured kappa, L stands for it."""
        found = []
        for name in dict.fromkeys("L" if name == "kappa" and self.kappa is None else name for name in names):
            constants = (self.L, self.highest) if name == "L" else (getattr(self, name, None),)
            if any(isinstance(c, Constant) and c.lower_estimate for c in constants):
                found.append(name)
        return tuple(found)

    @property
    def total_drift(self) -> float:
        """|Delta_i| of everything trained."""
        return float(np.hypot(self.drift.value, self.private_drift.value))

    def gaps_from_loss(self) -> tuple[tuple[str, Constant, Constant | None], ...]:
        """Gradient gaps from the loss at every point (theory.md section 5).

        Name of the point, ``2 sqrt(2 L F_S)`` (steps that do not contract) and ``sqrt(2 L F_S) + sqrt(2 L F)`` (fresh
        loss; any steps under independent batches).
        """
        found = []
        for point in self.points:
            trained = _root_product(self.L, point.loss)
            fresh = None if point.fresh_loss is None else _sum(trained, _root_product(self.L, point.fresh_loss))
            found.append((point.point, trained.scaled(2.0), fresh))
        return tuple(found)


@dataclass(frozen=True)
class Constants:
    """Constants of all experts of a subject, in its order.

    Attributes:
        experts: one each.
        seed: of all draws.
        per_sample_loss: whether training saw a per-sample loss (A3): False with BatchNorm on batch statistics.
        augmented: experts whose training images were augmented; the constants are of plain images.
        notes: what a reader must know.
    """

    experts: tuple[ExpertConstants, ...]
    seed: int
    per_sample_loss: bool
    augmented: tuple[str, ...]
    notes: tuple[str, ...]

    def to_frame(self) -> pd.DataFrame:
        """One row per expert and constant: value, interval, how."""
        names = (
            *(
                "g",
                "sigma0",
                "sigma",
                "sigma_batch",
                "D_2",
                "D_inf",
                "D_inf_shared",
                "D_inf_private",
                "G",
                "L",
                "lowest",
                "highest",
            ),
            *("kappa", "pl", "initial_risk", "training_risk", "base_norm", "drift", "private_drift"),
        )
        rows = []
        for expert in self.experts:
            for name in names:
                constant = getattr(expert, name)
                if constant is not None:
                    rows.append({"expert": expert.name, "constant": name, **vars(constant)})
        return pd.DataFrame(rows)

    def points_frame(self) -> pd.DataFrame:
        """One row per expert, point, part of the gradient and quantity."""
        rows = []
        for expert in self.experts:
            for point, (_, twice, both) in zip(expert.points, expert.gaps_from_loss(), strict=True):
                place = {"expert": expert.name, "point": point.point, "step": point.step}
                whole: dict[str, Constant | None] = {"loss": point.loss, "fresh_loss": point.fresh_loss}
                whole |= {"pl_ratio": point.pl_ratio, "gap_from_loss": twice, "gap_from_both_losses": both}
                rows += [place | {"part": "all", "constant": k} | vars(c) for k, c in whole.items() if c is not None]
                for part in PARTS:
                    found = point[part]
                    for name, value in vars(found).items():
                        listed = [(f"norm_q{share:g}", c) for share, c in value] if name == "norms" else [(name, value)]
                        rows += [place | {"part": part, "constant": k} | vars(c) for k, c in listed]
        return pd.DataFrame(rows)


def _root_product(L: Constant, loss: Constant) -> Constant:
    values = [float(np.sqrt(2.0 * L.at(w) * max(loss.at(w), 0.0))) for w in ("value", "low", "high")]
    high = float("inf") if L.lower_estimate else values[2]
    return Constant(values[0], values[1], high, loss.samples, f"L {L.how}, loss {loss.how}", loss.seed)


def _sum(first: Constant, second: Constant) -> Constant:
    return Constant(
        first.value + second.value,
        first.low + second.low,
        first.high + second.high,
        first.samples + second.samples,
        first.how,
        first.seed,
    )
