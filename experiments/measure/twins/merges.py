"""Twins through merging methods: M(S) against M(S^(j)) with the other experts fixed, and with it c_i end to end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from experiments.measure.twins.estimates import Quantity, log_interval, summary
from merging.flat import FlatSpace
from merging.merge import merge_flat
from merging.partition import Partition
from merging.registry import get
from merging.registry import methods as all_methods
from theory.errors import MergeboundError
from theory.operators import operator

if TYPE_CHECKING:
    import pandas as pd

_BOOTSTRAP = 0xC1


@dataclass(frozen=True)
class MergeChoice:
    """A merging method with its settings.

    Attributes:
        method: its name.
        settings: its parameters, coefficients and statistics, kept fixed between S and S^(j) (theory.md section 10).
    """

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MethodStability:
    """What a change of one sample of expert i does to the merge.

    Attributes:
        method: its name.
        expert: i.
        epsilon: rms of |M(S) - M(S^(j))| over the merged coordinates (parameters only).
        sensitivity: root of sum |M - M'|^2 / sum |x_i - x_i'|^2, c_i as Theorem 1 uses it, with its interval.
        largest: largest ratio of one twin.
        theory: c_i of theory.operators at these settings, NaN where it has none.
        guarantee: for which inputs that holds.
        reason: why.
    """

    method: str
    expert: int
    epsilon: Quantity
    sensitivity: Quantity
    largest: float
    theory: float
    guarantee: str
    reason: str


@dataclass(eq=False)
class MergeTwins:
    """Collects merges of twins; give :meth:`collect` to :func:`~.train.train_twins`.

    Args:
        base: x_0 in the layout, (P,).
        vectors: (N, P) experts x_i(S); row ``expert`` is replaced by the base run.
        space, partition: layout of the merged coordinates.
        expert: i, whose sample is exchanged.
        choices: methods and settings.
        names: of the experts.
        seed: of methods that draw (shared by M(S) and M(S^(j))).
        step: checkpoint at which twins are merged.
    """

    base: Tensor
    vectors: Tensor
    space: FlatSpace
    partition: Partition
    expert: int
    choices: Sequence[MergeChoice]
    step: int
    names: Sequence[str] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.expert < len(self.vectors):
            raise MergeboundError(f"expert = {self.expert}: there are {len(self.vectors)} experts")
        self._size = self.space.take(0, len(self.partition.shared)).size
        self._own = self.vectors[self.expert]
        self._merged: list[Tensor] = []
        self._moved: dict[int, list[float]] = {}

    def collect(self, twin: int, step: int, state: Mapping[str, Tensor]) -> None:
        """Merge one twin by every method and keep its distances only."""
        if step != self.step:
            return
        vector = self.space.flatten(state).to(self.base)
        if twin < 0:
            self._own = vector
            self._merged = [self._merge(choice, vector) for choice in self.choices]
            return
        own = _distance(vector, self._own, self._size)
        moved = [
            _distance(self._merge(choice, vector), merged, self._size)
            for choice, merged in zip(self.choices, self._merged, strict=True)
        ]
        self._moved[twin] = [own, *moved]

    def results(self, twins: int) -> list[MethodStability]:
        """What was found, for T twins of which those that were not collected equal the base run."""
        table = np.zeros((twins, 1 + len(self.choices)))
        for twin, row in self._moved.items():
            table[twin] = row
        own = table[:, 0]
        return [self._result(choice, own, table[:, 1 + k]) for k, choice in enumerate(self.choices)]

    def _result(self, choice: MergeChoice, own: np.ndarray, moved: np.ndarray) -> MethodStability:
        rng = np.random.default_rng([self.seed, _BOOTSTRAP])
        total = float((own**2).sum())
        value = float(np.sqrt((moved**2).sum() / total)) if total else float("nan")
        low, high, error = _ratio_interval(own**2, moved**2, value, rng)
        there = own > 0
        theory, guarantee, reason = self._theory(choice)
        return MethodStability(
            choice.method,
            self.expert,
            summary([moved], "rms", seed=self.seed),
            Quantity(value, float(low), float(high), error, len(own), self.seed),
            float((moved[there] / own[there]).max()) if there.any() else float("nan"),
            theory,
            guarantee,
            reason,
        )

    def _merge(self, choice: MergeChoice, vector: Tensor) -> Tensor:
        """Linear methods in double precision: their ratio is the same for all twins, and rounding must not spread it
        (others draw numbers and break ties in the networks' own type, and do so here)."""
        base, space = self.base, self.space
        if get(choice.method).linear:
            base, space = base.double(), replace(space, dtype=torch.float64)
        rows = [(vector if i == self.expert else x).to(base) - base for i, x in enumerate(self.vectors)]
        return merge_flat(
            choice.method, base, rows, space, self.partition, names=self.names, seed=self.seed, **choice.settings
        )

    def _theory(self, choice: MergeChoice) -> tuple[float, str, str]:
        known = operator(choice.method)
        allowed = {setting.name for setting in known.settings} | {"coefficients"}
        given = {name: value for name, value in choice.settings.items() if name in allowed}
        if set(choice.settings) - allowed:
            return float("nan"), "local", "its statistics are not passed on to the theory's operator"
        try:
            effect = known.effect(len(self.vectors), **given)
        except MergeboundError as error:
            return float("nan"), known.guarantee, str(error)
        bound = effect.sensitivity if effect.sensitivity is not None else effect.surely
        value = float("nan") if bound is None else float(np.asarray(bound)[self.expert])
        return value, effect.guarantee, effect.reason


def default_choices(experts: int, **statistics: Mapping[str, Any]) -> tuple[MergeChoice, ...]:
    """Every method of the toolkit that takes so many experts, coefficients 1/N where it needs them.

    Methods that need data (Fisher, RegMean, AdaMerging's coefficients) are there if their statistics or coefficients
    are given by the method's name.
    """
    found = []
    for name, method in all_methods().items():
        low, high = method.experts
        if experts < low or (high is not None and experts > high):
            continue
        settings: dict[str, Any] = dict(statistics.get(name, {}))
        if method.coefficients == "required" and "coefficients" not in settings and "groups" not in settings:
            settings["coefficients"] = [1 / experts] * experts
        elif method.needs_data and not settings:
            continue
        found.append(MergeChoice(name, settings))
    return tuple(found)


def merges_frame(results: Sequence[MethodStability]) -> pd.DataFrame:
    """One row per method."""
    import pandas as pd

    return pd.DataFrame(
        [
            {
                "method": each.method, "expert": each.expert, "sensitivity": each.sensitivity.value,
                "low": each.sensitivity.low, "high": each.sensitivity.high, "largest": each.largest,
                "theory": each.theory, "guarantee": each.guarantee, "epsilon": each.epsilon.value,
                "epsilon_low": each.epsilon.low, "epsilon_high": each.epsilon.high, "twins": each.epsilon.count,
                "tier": each.sensitivity.tier, "seed": each.sensitivity.seed, "reason": each.reason,
            }
            for each in results
        ]
    )  # fmt: skip


def _distance(one: Tensor, other: Tensor, size: int) -> float:
    """Over the first coordinates, subtracted in double precision."""
    return float((one[:size].double() - other[:size].double()).norm())


def _ratio_interval(
    own: np.ndarray, moved: np.ndarray, value: float, rng: np.random.Generator
) -> tuple[float, float, float]:
    """95 % interval of the root of sum moved / sum own, (T,) each, and its standard error: on the logarithm, the wider
    of Student's t (delta method) and the studentised bootstrap of pairs."""
    T = len(own)
    if T < 2 or not value > 0:
        return float("nan"), float("nan"), float("nan")
    from scipy.stats import t

    influence = 0.5 * (moved / moved.mean() - own / own.mean())
    error = float(influence.std(ddof=1) / np.sqrt(T))
    half = float(t.ppf(0.975, T - 1)) * error
    low, high = log_interval(moved / moved.mean(), rng, below=own / own.mean())
    return value * float(np.exp(min(low / 2, -half))), value * float(np.exp(max(high / 2, half))), value * error
