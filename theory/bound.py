"""The bound as an object: value, terms, tier, assumptions, and the texts that explain it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from theory.assumptions import Assumption, Tier
from theory.master import master_formula
from theory.recipe import Merge
from theory.symbolic import FloatArray


@dataclass(frozen=True, eq=False)
class Term:
    """One named term: ``value`` (square root, unit sqrt(loss)), ``share`` of the sum of terms, formula and sources."""

    name: str
    value: FloatArray
    share: FloatArray
    formula: str
    source: str


@dataclass(frozen=True, eq=False)
class ExpertTerms:
    """What the bound used of one expert: training risk, drift d, stability, sensitivity c, and by which form."""

    name: str
    risk: FloatArray
    risk_form: str
    drift: FloatArray | None
    drift_form: str
    epsilon: FloatArray
    epsilon_form: str
    sensitivity: FloatArray


@dataclass(frozen=True, eq=False)
class Bound:
    """An upper bound on the joint risk of a merged model, with everything needed to check and to read it.

    ``value`` (loss, shape ``(...)``, ``inf`` where vacuous) comes with its ``tier``; ``terms`` are training, dispersion
    and instability; ``measured`` lists the measured constants that were used.

    ``V`` (param^2) is an upper bound on the dispersion ``E sum_j p_j ||M - x_j||^2``, from the drifts or given.
    ``effective_V`` is *not* a dispersion: it is the number for which ``sqrt(max_j L_j/2 effective_V)`` is the second
    term, by the inequality that ``dispersion_form`` names.  Where experts differ in smoothness, or anchors are taken
    task by task, it may lie below the true dispersion: never report it as V.
    """

    value: FloatArray
    terms: tuple[Term, ...]
    tier: Tier
    assumptions: tuple[Assumption, ...]
    measured: tuple[str, ...]
    experts: tuple[ExpertTerms, ...]
    V: FloatArray
    effective_V: FloatArray
    dispersion_form: str
    merge: Merge | None = field(default=None, repr=False)

    @property
    def symbolic(self) -> Any:
        """The bound as a sympy expression in the glossary's symbols."""
        return master_formula().expression

    def latex(self) -> str:
        """The inequality, and the three terms, in LaTeX."""
        return r"\mathbb E F(M) \le " + master_formula().latex()

    def excess(self, minimal_risk: ArrayLike) -> FloatArray:
        """Bound on the excess risk: ``value - min F``."""
        return np.asarray(self.value - np.asarray(minimal_risk, dtype=np.float64))

    @property
    def vacuous(self) -> np.ndarray:
        """Where the bound is infinite and says nothing."""
        return np.isinf(self.value)

    def elasticity(self, name: str, expert: str | None = None) -> float:
        """``d log(value) / d log(field)`` for one expert or for all together, one configuration at a time.

        By symbolic differentiation for plain SGD at constant learning rates; by differences of the bound for schedules,
        momentum, reshuffling and trained heads (not for whole numbers).  Raises :class:`MergeboundError` elsewhere.
        """
        from theory.elasticity import elasticity

        return elasticity(self, name, expert)

    def explain(self) -> str:
        """Readable table: terms with value, share and formula, experts with sources, assumptions with verdicts."""
        return explain(self)


def _number(value: FloatArray | None) -> str:
    if value is None:
        return "-"
    array = np.asarray(value)
    if array.ndim == 0 or array.size == 1:
        return f"{float(array.reshape(-1)[0]):.4g}"
    return f"{array.min():.3g} to {array.max():.3g}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def explain(bound: Bound) -> str:
    lines = [f"E F(M) <= {_number(bound.value)}   (tier: {bound.tier})", ""]
    if np.any(bound.vacuous):
        lines[0] += "   vacuous where infinite: the clock overflows (too many steps at an expanding rate)"
    lines += _table(
        [("term", "square root", "share", "formula", "source")]
        + [
            (
                term.name,
                _number(term.value),
                f"{100 * float(np.mean(term.share)):.0f} %",
                term.formula,
                term.source,
            )
            for term in bound.terms
        ]
    )
    lines.append("")
    lines += _table(
        [("expert", "risk", "drift d", "by", "stability eps", "by", "sensitivity c")]
        + [
            (
                row.name,
                f"{_number(row.risk)} ({row.risk_form})",
                _number(row.drift),
                row.drift_form,
                _number(row.epsilon),
                row.epsilon_form,
                _number(row.sensitivity),
            )
            for row in bound.experts
        ]
    )
    lines.append("")
    lines += _table(
        [("assumption", "verdict", "statement", "why")]
        + [
            (item.name, item.verdict + (" (covered)" if item.covered else ""), item.statement, item.why)
            for item in bound.assumptions
        ]
    )
    if bound.measured:
        lines += ["", "measured, therefore estimated: " + ", ".join(bound.measured)]
    return "\n".join(lines)
