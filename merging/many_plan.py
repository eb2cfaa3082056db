"""Which compiled loop makes a merge; see :mod:`merging.many`.

For each method with a fast path a small function turns checked settings into a :class:`Form` (which loop, which random
masks) and one last factor per merge, with the definition's own arithmetic in double precision; torch rounds a factor to
the type of the rows where it is applied, and so do we.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from merging.method import Method
from merging.methods.adamerging import adamerging_flat
from merging.methods.average import average_flat
from merging.methods.consensus_ta import consensus_ta_flat
from merging.methods.consensus_ties import consensus_ties_flat
from merging.methods.curvature_optimal import curvature_optimal_flat
from merging.methods.dare import dare_flat
from merging.methods.dare_ties import dare_ties_flat
from merging.methods.emr import emr_flat
from merging.methods.magmax import magmax_flat
from merging.methods.risk_optimal import risk_optimal_flat
from merging.methods.task_arithmetic import task_arithmetic_flat
from merging.methods.ties import ties_flat
from merging.methods.uniform_soup import uniform_soup_flat
from merging.methods.weighted import weighted_flat
from merging.methods.wise_ft import wise_ft_flat

Kind = Literal["combine", "elect_sum", "elect_mean", "largest", "unify"]


@dataclass(frozen=True)
class Masks:
    """Which random masks are applied to the experts first; the arguments of :func:`merging.methods.dare.sparsify`."""

    seed: int
    drop: float
    rescale: bool
    rescaling: Literal["probability", "l1"]

    @property
    def factor(self) -> float:
        """What the merge of masked rows is divided by."""
        return 1.0 - self.drop if self.rescale and self.rescaling == "probability" else 1.0


@dataclass(frozen=True)
class Form:
    """The loop that a merge needs.  Merges of one form run together.

    Attributes:
        kind: what is computed.
        divide: the last factor divides.
        weighted: coefficients weigh what is summed.
        turned: in a disjoint sum, what votes is what is summed (weighted rows).
        voting: coefficients weigh the votes.
        scope: what magnitudes are ranked over; ``None``: nothing is trimmed.
        rounding: how ``density * n`` is rounded.
        masks: random masks.
        strictness: ``l`` of consensus masks; ``None``: no consensus.
        threshold: experts that have to agree, for consensus masks.
    """

    kind: Kind
    divide: bool = False
    weighted: bool = False
    turned: bool = False
    voting: bool = False
    scope: Literal["global", "tensor"] | None = None
    rounding: Literal["up", "down"] = "up"
    masks: Masks | None = None
    strictness: float | None = None
    threshold: float = 0.0


@dataclass(frozen=True)
class Row:
    """One merge: its form, its last factor, its density, and whether its coefficients are to be normalised."""

    form: Form
    scale: float
    density: float = 1.0
    normalise: bool = False


Settings = Mapping[str, Any]
Planner = Callable[[Settings, int, int, bool], Row | None]
"""Settings of one merge, number of its experts, seed, whether it has coefficients; ``None``: no fast path."""


def _average(settings: Settings, experts: int, seed: int, weighted: bool) -> Row:
    return Row(Form("combine", divide=True), experts)


def _wise_ft(settings: Settings, experts: int, seed: int, weighted: bool) -> Row:
    return Row(Form("combine"), settings["alpha"] / experts)


def _task_arithmetic(settings: Settings, experts: int, seed: int, weighted: bool) -> Row:
    return Row(Form("combine", weighted=weighted), settings["coefficient"])


def _weighted(settings: Settings, experts: int, seed: int, weighted: bool) -> Row:
    return Row(Form("combine", weighted=True), 1.0, normalise=settings["normalize"])


def _given(settings: Settings, experts: int, seed: int, weighted: bool) -> Row | None:
    return None if settings.get("groups") else Row(Form("combine", weighted=True), 1.0)


def _elected(settings: Settings, weighted: bool) -> dict[str, Any]:
    """The part of a form that says who votes and what is summed, as :func:`merging.election.fuse` has it."""
    by_weight = weighted and settings.get("election") == "weighted"
    total = settings["aggregation"] == "sum"
    kind = "elect_sum" if total else "elect_mean"
    return {"kind": kind, "weighted": weighted, "voting": by_weight, "turned": by_weight and total}


def _ties(settings: Settings, experts: int, seed: int, weighted: bool) -> Row:
    form = Form(**_elected(settings, weighted), scope=settings["scope"], rounding=settings["rounding"])
    return Row(form, settings["coefficient"], settings["density"])


def _masks(settings: Settings, seed: int) -> Masks:
    return Masks(seed, settings["drop"], settings["rescale"], settings["rescaling"])


def _dare(settings: Settings, experts: int, seed: int, weighted: bool) -> Row:
    masks = _masks(settings, seed)
    return Row(Form("combine", weighted=weighted, masks=masks), settings["coefficient"] / masks.factor)


def _dare_ties(settings: Settings, experts: int, seed: int, weighted: bool) -> Row:
    masks, trims = _masks(settings, seed), settings["density"] < 1.0
    form = Form(**_elected(settings, weighted), scope=settings["scope"] if trims else None, masks=masks)
    return Row(form, settings["coefficient"] / masks.factor, settings["density"])


def _magmax(settings: Settings, experts: int, seed: int, weighted: bool) -> Row:
    return Row(Form("largest"), settings["coefficient"])


def _emr(settings: Settings, experts: int, seed: int, weighted: bool) -> Row:
    return Row(Form("unify"), 1.0)


def _consensus_ta(settings: Settings, experts: int, seed: int, weighted: bool) -> Row | None:
    if settings.get("mask_lambdas") is not None or settings["threshold"] > experts:
        return None
    strictness = settings["mask_lambda"]
    form = Form("combine", weighted=weighted, strictness=strictness, threshold=settings["threshold"])
    return Row(form, settings["coefficient"])


def _consensus_ties(settings: Settings, experts: int, seed: int, weighted: bool) -> Row | None:
    if settings.get("mask_lambdas") is not None or settings["threshold"] > experts:
        return None
    form = Form(
        **_elected(settings, weighted),
        scope=settings["scope"],
        rounding=settings["rounding"],
        strictness=settings["mask_lambda"],
        threshold=settings["threshold"],
    )
    return Row(form, settings["coefficient"], settings["density"])


_PLANNERS: tuple[tuple[Callable[..., Tensor], Planner], ...] = (
    (average_flat, _average),
    (uniform_soup_flat, _average),
    (wise_ft_flat, _wise_ft),
    (task_arithmetic_flat, _task_arithmetic),
    (weighted_flat, _weighted),
    (risk_optimal_flat, _given),
    (curvature_optimal_flat, _given),
    (adamerging_flat, _given),
    (ties_flat, _ties),
    (dare_flat, _dare),
    (dare_ties_flat, _dare_ties),
    (magmax_flat, _magmax),
    (emr_flat, _emr),
    (consensus_ta_flat, _consensus_ta),
    (consensus_ties_flat, _consensus_ties),
)


def planner_of(method: Method) -> Planner | None:
    """How to plan merges of a method; told by its definition, so that one's own method of the same name has none."""
    return next((planner for flat, planner in _PLANNERS if method.flat is flat), None)
