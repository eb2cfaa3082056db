"""One judged assumption: verdict, numbers behind it, and what the numbers say where they cannot decide."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from theory.assumptions import Assumption, Verdict

Leaning = Literal["for", "against", "nothing"]
ROUNDING = 1e-9
"""Relative slack of comparisons with stated constants."""


class _Measured(Protocol):
    """What :class:`Constant` of the noise part and :class:`Number` of the curvature part have in common."""

    @property
    def value(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...
    @property
    def seed(self) -> int: ...
    @property
    def tier(self) -> str: ...


@dataclass(frozen=True)
class Evidence:
    """A number behind a verdict.

    Attributes:
        name: what was measured, with its unit where it has one.
        value: the estimate, or a count.
        low, high: interval; equal to the value where it is exact (counts, checkpoints, logs).
        covers: what the interval accounts for.
        seed: of the draws; -1 where nothing was drawn.
        tier: ``certified`` for exact numbers and theorems, else ``estimated``.
    """

    name: str
    value: float
    low: float
    high: float
    covers: str
    seed: int = -1
    tier: str = "estimated"

    @classmethod
    def exact(cls, name: str, value: float, covers: str = "exact") -> Evidence:
        """A count, or a number read off checkpoints, logs or recipes."""
        return cls(name, float(value), float(value), float(value), covers, tier="certified")

    @classmethod
    def of(cls, name: str, measured: _Measured) -> Evidence:
        """From a constant of the noise part or a number of the curvature part."""
        covers = str(getattr(measured, "how", "") or getattr(measured, "covers", ""))
        return cls(name, measured.value, measured.low, measured.high, covers, measured.seed, measured.tier)

    def scaled(self, name: str, factor: float) -> Evidence:
        """Times a known factor of at least 0."""
        return replace(self, name=name, value=factor * self.value, low=factor * self.low, high=factor * self.high)

    def text(self) -> str:
        """``name = value [low, high]``, or ``name >= value`` of a lower estimate."""
        if self.low == self.value and math.isinf(self.high):
            return f"{self.name} >= {self.value:.4g}"
        limits = "" if self.low == self.high else f" [{self.low:.3g}, {self.high:.3g}]"
        return f"{self.name} = {self.value:.4g}{limits}"


@dataclass(frozen=True)
class Finding:
    """One assumption of one expert (or of the merge), judged.

    Attributes:
        key: short name, under which :mod:`statements` asks for it.
        about: the expert's name, or ``merge``.
        assumption: name, statement, verdict and reason (:class:`theory.assumptions.Assumption`).
        evidence: numbers.
        seen: what the numbers say where the verdict is unknown: ``for`` (nothing contradicts the assumption where it
            was looked at), ``against`` or ``nothing``.  A verdict is ``holds`` only where that follows for every place
            and sample that the theorem speaks of.
        remedy: what to do about it; empty where nothing is to be done.
    """

    key: str
    about: str
    assumption: Assumption
    evidence: tuple[Evidence, ...] = ()
    seen: Leaning = "nothing"
    remedy: str = ""

    @property
    def verdict(self) -> Verdict:
        """Of the assumption."""
        return self.assumption.verdict

    @property
    def covered(self) -> bool:
        """Violated, but some form of the theorems was widened to cover it."""
        return self.assumption.covered

    def row(self) -> dict[str, object]:
        """Columns of a table."""
        item = self.assumption
        return {
            "about": self.about,
            "key": self.key,
            "name": item.name,
            "assumption": item.statement,
            "verdict": item.verdict,
            "covered": item.covered,
            "seen": self.seen if item.verdict == "unknown" else "",
            "evidence": "; ".join(e.text() for e in self.evidence),
            "why": item.why,
            "remedy": self.remedy,
        }


def finding(
    key: str,
    about: str,
    verdict: Verdict,
    why: str,
    *evidence: Evidence,
    seen: Leaning = "nothing",
    covered: bool = False,
    remedy: str = "",
) -> Finding:
    """A finding of one of the assumptions of :data:`ASSUMPTIONS`."""
    name, statement = ASSUMPTIONS[key]
    item = Assumption(name, statement, verdict, why, covered=covered and verdict == "violated")
    return Finding(key, about, item, tuple(evidence), seen, remedy if verdict != "holds" else "")


def worst(findings: Sequence[Finding]) -> Finding | None:
    """The one that decides: violated and not covered before violated, before unknown, before holds."""
    order: Mapping[str, int] = {"violated": 0, "unknown": 2, "holds": 3}
    ranked = sorted(findings, key=lambda f: 1 if f.covered else order[f.verdict])
    return ranked[0] if ranked else None


ASSUMPTIONS: Mapping[str, tuple[str, str]] = {
    "independent_samples": ("A1", "samples of different tasks are independent (no shared images)"),
    "independent_choices": ("A2", "coefficients, checkpoints and hyperparameters do not depend on training samples"),
    "independent_base": ("A2", "the base does not depend on the training samples"),
    "fresh_judges": ("A2", "images on which a merge is judged served neither training nor any choice"),
    "per_sample_loss": ("A3", "the loss of an image depends on no other image of its batch"),
    "trained_loss": ("A3", "the loss that is measured and judged is the one that was trained"),
    "nonnegative": ("A4", "per-sample losses are nonnegative"),
    "smooth": ("A4", "per-sample losses are L-smooth in what was trained, wherever training can go"),
    "smooth_merged": ("A4", "per-sample losses are L-smooth in the merged coordinates, wherever merges can be"),
    "convex": ("4", "per-sample losses are convex in what was trained (m = 0)"),
    "step_descent": ("6(c)", "eta_k (L + omega) <= 1 at every step (descent lemma, PL)"),
    "step_nonexpansive": ("4", "eta_k (L + omega) <= 2 at every step (convex steps do not expand)"),
    "step_momentum": ("4", "eta (L + omega) <= 2 (1 - beta)^2/(1 + beta) (heavy ball, convex), or Nesterov's form"),
    "sgd": ("4-6", "steps are those of SGD (with or without momentum)"),
    "no_clipping": ("4-6", "no gradient is clipped"),
    "no_momentum": ("6", "plain SGD: no momentum"),
    "heavy_ball": ("4", "momentum, if any, is heavy ball: not Nesterov's form"),
    "coupled_decay": ("1", "weight decay, if any, is coupled: added to the gradient"),
    "no_decay": ("6(d)", "no weight decay: logged losses are those of the objective"),
    "unbiased_batches": ("6", "batches are conditionally unbiased (drawn anew at every step)"),
    "known_sampling": ("5", "samples are drawn by one of the three schemes of theorem 2, with the batch sizes stated"),
    "log": ("6(d)", "the log has every step and is of this run"),
    "same_coordinates": ("1", "what was trained is what is merged (and a private head): no low-rank factors"),
    "frozen_head": ("1", "heads are frozen: nothing private is trained"),
    "noise_on_path": ("6(a)", "sigma bounds the gradient noise uniformly on the path"),
    "noise_at_base": ("6(b)", "sigma_0, measured at the base, bounds the gradient noise on the whole path"),
    "pl": ("8", "the objective is mu-PL on the path for some mu > 0"),
    "risk_below_start": ("6(c)", "the training risk stays below its value at the base"),
    "bounded": ("3", "losses are bounded by a known B"),
    "lipschitz": ("3", "losses are G-Lipschitz wherever twins can go, for a known G"),
    "fresh_gap": ("5", "D_2 compares training samples with fresh ones"),
    "suprema": ("5", "constants are suprema over every visited point and sample, not values at some"),
    "orthogonal": ("7", "task vectors are orthogonal in expectation"),
}
"""By key: label of theory.md (an assumption of section 1, or the section that asks) and statement."""
