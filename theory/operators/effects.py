"""What a merging method is to the theory: how far it carries a change of one expert, what it adds, on which terms."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from theory.assumptions import Assumption, Tier, tier_of
from theory.errors import AssumptionError, RecipeError
from theory.symbolic import FloatArray, times, vacuous

Guarantee = Literal["global", "mean square", "local", "none"]
"""For which pairs of inputs a sensitivity holds: all of them (given the settings), all of them in mean square over the
seeds, those near the given checkpoints, or no statement."""

Direction = Literal["lowers", "raises", "either way", "leaves"]
NO_GUARANTEE = "no guarantee"


@dataclass(frozen=True)
class Action:
    """What an operator does to one term of the master bound (training, dispersion, instability), and when."""

    term: str
    direction: Direction
    why: str
    under: str = "always"


@dataclass(frozen=True)
class Setting:
    """A setting of a method with its default and domain: the names, defaults and domains of ``merging``."""

    name: str
    default: float | str | bool
    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False
    choices: tuple[str, ...] = ()

    def check(self, owner: str, value: Any) -> Any:
        """The value: a choice, a switch, or numbers (an array over configurations) inside the domain."""
        if self.choices:
            if not isinstance(value, str) or value not in self.choices:
                raise RecipeError(f"{owner}: {self.name} is {value!r}; choose one of {', '.join(self.choices)}")
            return value
        if isinstance(self.default, bool):
            if not isinstance(value, (bool, np.bool_)):
                raise RecipeError(f"{owner}: {self.name} is {value!r}; give True or False")
            return bool(value)
        array = numbers(owner, self.name, value)
        above = array > self.low if self.low_open else array >= self.low
        below = array < self.high if self.high_open else array <= self.high
        if not np.all(above & below & np.isfinite(array)):
            left, right = "(" if self.low_open else "[", ")" if self.high_open else "]"
            raise RecipeError(f"{owner}: {self.name} is outside {left}{self.low:g}, {self.high:g}{right}; correct it")
        return array


@dataclass(frozen=True, eq=False)
class Effect:
    """An operator at given settings (and statistics): numbers of shape ``(N, ...)``, ``None`` where there is none.

    Attributes:
        guarantee: for which inputs ``sensitivity`` holds.
        sensitivity: c_i, ``E_seed |M(.. x_i ..) - M(.. x_i' ..)|^2 <= c_i^2 |x_i - x_i'|^2``.
        surely: the same for every single seed.
        mean: coefficients of ``E_seed M - x_0 = sum_i mean_i Delta_i``, where it has this form.
        reference: coefficients of the task arithmetic that the method is a variant of.
        noise: ``E |M - E M|^2 <= sum_i noise_i |Delta_i|^2`` (equality for DARE).
        reason: why the guarantee is what it is.
        assumptions: with verdicts.
        tier: *certified* only for a global guarantee with every assumption holding.
    """

    guarantee: Guarantee
    reason: str
    sensitivity: FloatArray | None = None
    surely: FloatArray | None = None
    mean: FloatArray | None = None
    reference: FloatArray | None = None
    noise: FloatArray | None = None
    assumptions: tuple[Assumption, ...] = ()

    @property
    def tier(self) -> Tier:
        """*certified* for a guarantee on all inputs whose assumptions hold, else *estimated*."""
        if self.guarantee in ("local", "none"):
            return "estimated"
        return tier_of(self.assumptions, ())

    @vacuous
    def bias(self, gram: ArrayLike) -> FloatArray:
        """``|E M - M_TA|^2`` from inner products of task vectors, shape ``(N, N)``; unit param^2.

        Raises :class:`AssumptionError` where the operator is not linear in expectation.
        """
        if self.mean is None or self.reference is None:
            raise AssumptionError(
                "operator: its expectation is not linear in the task vectors, so its bias does not follow from their "
                "inner products; measure M and compare it with task arithmetic"
            )
        gap, G = self.mean - self.reference, np.asarray(gram, dtype=np.float64)
        return np.asarray(np.maximum(np.einsum("i...,ik,k...->...", gap, G, gap), 0.0))

    @vacuous
    def dispersion(self, gram: ArrayLike, weights: ArrayLike | None = None) -> FloatArray:
        """``E V = V(mean) + sum noise_i |Delta_i|^2`` from inner products of task vectors, shape ``(N, N)``.

        ``weights`` p default to 1/N.  An upper bound where ``noise`` is one.  Raises :class:`AssumptionError` where
        mean or noise are not known.
        """
        if self.mean is None or self.noise is None:
            raise AssumptionError(
                "operator: its dispersion does not follow from inner products of task vectors; measure V on the "
                "checkpoints (sum_j p_j |M - x_j|^2)"
            )
        G = np.asarray(gram, dtype=np.float64)
        p = np.full(len(G), 1.0 / len(G)) if weights is None else np.asarray(weights, dtype=np.float64)
        a = self.mean
        quadratic = np.einsum("i...,ik,k...->...", a, G, a)
        cross = np.einsum("i...,ik,k->...", a, G, p)
        own = np.einsum("i...,i->...", self.noise, np.diag(G))
        return np.asarray(np.maximum(quadratic - 2 * cross + p @ np.diag(G), 0.0) + own)


@dataclass(frozen=True, eq=False)
class Operator:
    """A merging method as a theory object.

    Attributes:
        name: as in ``merging``.
        statement: the merged task vector ``M - x_0`` as a formula.
        guarantee: at default settings (those of some methods change it: ask :meth:`effect`).
        sensitivity: c_i in words and symbols.
        bias: ``E M`` against task arithmetic with the same coefficients.
        second_moment: what randomness adds to V.
        actions: which terms of the master bound it moves, and which way.
        source: paper of the method; the statements are theory section 10.
        settings: names, defaults and domains.
        coefficients: whether per-expert coefficients are taken.
        statistics: what :meth:`effect` can be given of the checkpoints, by name, with shapes.
        experts: smallest and largest number of experts.
        compute: the numbers behind :meth:`effect`.
    """

    name: str
    statement: str
    guarantee: Guarantee
    sensitivity: str
    bias: str
    second_moment: str
    actions: tuple[Action, ...]
    source: str
    compute: Callable[[int, Mapping[str, Any]], Effect]
    settings: tuple[Setting, ...] = ()
    coefficients: Literal["none", "optional", "required"] = "none"
    statistics: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    experts: tuple[int, int | None] = (1, None)

    def effect(self, experts: int, **given: Any) -> Effect:
        """The operator's numbers for N experts at these settings, with whatever is known of the checkpoints.

        Settings may be arrays over configurations, shape ``(...)``; ``coefficients`` has shape ``(N, ...)`` or is one
        number.  Raises :class:`RecipeError` for unknown names and values outside their domain.

        >>> from theory.operators import operator
        >>> effect = operator("dare").effect(2, coefficient=0.3, drop=0.75)
        >>> effect.sensitivity.tolist(), effect.surely.tolist(), effect.guarantee
        ([0.6, 0.6], [1.2, 1.2], 'mean square')
        """
        low, high = self.experts
        if isinstance(experts, bool) or not isinstance(experts, (int, np.integer)) or experts < low:
            raise RecipeError(f"{self.name}: experts is {experts!r}; give a whole number of at least {low}")
        if high is not None and experts > high:
            raise RecipeError(f"{self.name}: it merges at most {high} experts and there are {experts}; use fewer")
        known = {setting.name: setting for setting in self.settings}
        extra = () if self.coefficients == "none" else ("coefficients",)
        filled: dict[str, Any] = {name: setting.default for name, setting in known.items()}
        for name, value in given.items():
            if name in known:
                filled[name] = known[name].check(self.name, value)
            elif name in self.statistics:
                filled[name] = value
            elif name in extra:
                filled[name] = per_expert_numbers(self.name, name, value, int(experts))
            else:
                options = [*known, *extra, *self.statistics]
                close = get_close_matches(name, options, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"choose among {', '.join(options) or 'none'}"
                raise RecipeError(f"{self.name}: it has no setting {name!r}; {hint}")
        if self.coefficients == "required" and "coefficients" not in filled:
            raise RecipeError(f"{self.name}: coefficients is missing; give one number per expert")
        shapes = [np.shape(filled[name]) for name in known]
        shapes.append(np.shape(filled.get("coefficients", ()))[1:])
        try:
            np.broadcast_shapes(*shapes)
        except ValueError as error:
            raise RecipeError(
                f"{self.name}: settings of shapes {shapes} do not broadcast; give arrays over the same configurations"
            ) from error
        with np.errstate(all="ignore"):
            return self.compute(int(experts), filled)


def numbers(owner: str, field: str, value: Any) -> FloatArray:
    """Numbers that are not NaN, or a :class:`RecipeError` naming the field."""
    if isinstance(value, (bool, np.bool_)):
        raise RecipeError(f"{owner}: {field} is {value!r}, not a number; give a number")
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{owner}: {field} is not a number or an array of numbers; give numbers") from error
    if array.size == 0 or np.any(np.isnan(array)):
        raise RecipeError(f"{owner}: {field} is empty or holds NaN; give numbers")
    return array


def per_expert_numbers(owner: str, field: str, value: Any, experts: int) -> FloatArray:
    """Finite numbers of shape ``(N, ...)``; one number serves all experts."""
    array = numbers(owner, field, value)
    if not np.all(np.isfinite(array)):
        raise RecipeError(f"{owner}: {field} is not finite; give finite numbers")
    if array.ndim == 0:
        return np.full(experts, float(array))
    if array.shape[0] != experts:
        raise RecipeError(
            f"{owner}: {field} has shape {array.shape} for {experts} experts; give one number per expert on axis 0"
        )
    return array


def rows_of(owner: str, field: str, value: Any, experts: int) -> FloatArray:
    """Statistics of shape ``(N, P)``: one flat, finite row per expert."""
    array = per_expert_numbers(owner, field, value, experts)
    if array.ndim < 2:
        raise RecipeError(f"{owner}: {field} has shape {array.shape}; give one flat row per expert, shape (N, P)")
    return array.reshape(experts, -1)


def one_number(owner: str, field: str, value: Any) -> float:
    """A setting that must not be an array over configurations here."""
    array = numbers(owner, field, value)
    if array.size != 1:
        raise RecipeError(f"{owner}: {field} over configurations does not go with statistics; give one number")
    return float(array.reshape(-1)[0])


def boolean_rows(owner: str, field: str, value: Any, experts: int) -> FloatArray:
    """Which entries, ``(N, P)`` of zeros and ones, from booleans (or numbers, nonzero meaning yes)."""
    return np.asarray(rows_of(owner, field, value, experts) != 0, dtype=np.float64)


def group_rows(owner: str, value: Any, experts: int) -> list[FloatArray]:
    """Coefficients of groups of tensors: N numbers for each, from a mapping or a sequence."""
    try:
        groups = list(value.values()) if isinstance(value, Mapping) else list(value)
    except TypeError as error:
        raise RecipeError(f"{owner}: groups is no mapping or sequence; give N numbers for each group") from error
    rows = [per_expert_numbers(owner, "groups", group, experts) for group in groups]
    if any(row.ndim != 1 for row in rows):
        raise RecipeError(f"{owner}: a group holds more than one number per expert; give N numbers for each group")
    return rows


def normalised(weights: FloatArray) -> FloatArray:
    """``w / max |w|``: the same weighted means, without overflow; zeros stay zeros."""
    peak = np.abs(weights).max(axis=0)
    return np.asarray(weights / np.where(peak > 0, peak, 1.0))


def scaled(given: Mapping[str, Any], experts: int) -> FloatArray:
    """``lambda alpha_i`` of shape ``(N, ...)`` from ``coefficient`` and ``coefficients`` (default one)."""
    weights = np.asarray(given.get("coefficients", np.ones(experts)), dtype=np.float64)
    scale = np.asarray(given.get("coefficient", 1.0), dtype=np.float64)
    return np.asarray(times(*over(weights, scale)))


def over(experts: ArrayLike, configurations: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Per-expert numbers ``(N, ...)`` and configurations ``(...)``, shaped to broadcast."""
    a, b = np.asarray(experts, dtype=np.float64), np.asarray(configurations, dtype=np.float64)
    depth = max(a.ndim - 1, b.ndim)
    return a.reshape(a.shape[:1] + (1,) * (depth + 1 - a.ndim) + a.shape[1:]), b[None]


def frozen(what: str, why: str) -> Assumption:
    """The assumption that coefficients computed from the experts are treated as constants."""
    return Assumption("10", f"{what} do not change with the experts", "unknown", why)
