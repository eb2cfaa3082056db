"""Which statement of the theory needs which assumptions, and what follows from the verdicts.

Every statement names the function of ``theory`` that computes it, so that a verdict feeds a number.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from experiments.measure.verdicts.finding import Finding
from theory.assumptions import Tier, tier_of

Scope = Literal["expert", "merge"]
Standing = Literal["holds", "open", "broken"]


@dataclass(frozen=True)
class Statement:
    """One statement.

    Attributes:
        name: theorem and form.
        section: of theory.md.
        function: dotted path below ``theory``.
        bounds: what it bounds.
        needs: keys of assumptions, each of every expert that it speaks of, and of the merge.
        constants: that are measured when nothing certifies them.
        scope: one expert, or the merge.
        covers: needs of which a violation is allowed where the finding says that it is covered.
    """

    name: str
    section: str
    function: str
    bounds: str
    needs: tuple[str, ...]
    constants: tuple[str, ...] = ()
    scope: Scope = "expert"
    covers: tuple[str, ...] = ()


_RUN = ("sgd", "no_clipping", "same_coordinates", "per_sample_loss", "trained_loss")
_STABLE = (*_RUN, "smooth", "known_sampling", "suprema")
_FORM = ("coupled_decay", "heavy_ball")
_TRAINED = (*_RUN, "smooth", "unbiased_batches", "no_momentum", "noise_on_path")

STATEMENTS: tuple[Statement, ...] = (
    Statement("training clock, any momentum", "4", "clocks.clock", "tau, nu", (*_RUN, "smooth", *_FORM), ("L",),
              covers=_FORM),
    Statement("training clock, convex (kappa = 0)", "4", "clocks.sgd_times", "tau, nu",
              (*_RUN, "smooth", "convex", "step_nonexpansive", "no_momentum"), ("L",)),
    Statement("training clock, convex momentum", "4", "clocks.convex_momentum_log_response", "tau, nu",
              (*_RUN, "smooth", "convex", "step_momentum", *_FORM), ("L",), covers=_FORM),
    Statement("Theorem 2, sup", "5", "stability.epsilon_sup", "eps_i", (*_STABLE, *_FORM), ("D_inf", "L"),
              covers=_FORM),
    Statement("Theorem 2, rms", "5", "stability.epsilon_rms", "eps_i",
              (*_STABLE, *_FORM, "unbiased_batches", "fresh_gap"), ("D_2", "L"), covers=_FORM),
    Statement("Theorem 2, recursion", "5", "stability.epsilon_recursion", "eps_i",
              (*_STABLE, "unbiased_batches", "fresh_gap", "no_momentum"), ("D_2", "L")),
    Statement("Theorem 2, gap from the loss log", "5", "stability.epsilon_from_losses", "eps_i",
              (*_RUN, "smooth", "nonnegative", "known_sampling", "log", *_FORM), ("L", "batch losses"), covers=_FORM),
    Statement("stability cap sqrt(2) d", "5", "stability.epsilon_cap", "eps_i",
              ("independent_base", "independent_choices"), ("drift",)),
    Statement("Theorem 3 (a)", "6", "drift.drift_noise", "|Delta_i|", (*_TRAINED, "smooth"), ("g", "sigma", "kappa")),
    Statement("Theorem 3 (b)", "6", "drift.drift_base", "|Delta_i|", (*_RUN, "smooth", *_FORM),
              ("g", "sigma_0", "kappa"), covers=_FORM),
    Statement("Theorem 3 (c)", "6", "drift.drift_energy", "|Delta_i|", (*_TRAINED, "step_descent"),
              ("initial_risk", "training_risk", "sigma", "L")),
    Statement("Theorem 3 (d), gradient log", "6", "drift.drift_log", "|Delta_i| of this run",
              ("log", "same_coordinates", *_FORM), (), covers=_FORM),
    Statement("Theorem 3 (d), loss log", "6", "drift.drift_losses", "|Delta_i|",
              (*_RUN, "smooth", "nonnegative", "log", "no_decay"), ("L",)),
    Statement("training risk, PL", "8", "training.pl_training_risk", "F_S(x_i)", (*_TRAINED, "pl", "step_descent"),
              ("mu", "sigma", "initial_risk", "L")),
    Statement("training risk, convex", "8", "training.convex_training_risk", "F_S(x_i)",
              (*_TRAINED, "convex", "step_descent"), ("sigma", "minimizer_distance", "L")),
    Statement("training risk, descent", "8", "training.descent_training_risk", "F_S(x_i)", (*_TRAINED, "step_descent"),
              ("sigma", "initial_risk", "L")),
    Statement("Theorem 1", "3", "generalization.theorem_1", "F(M)",
              ("independent_samples", "independent_choices", "independent_base", "per_sample_loss", "nonnegative",
               "smooth_merged"), ("L", "eps_i"), "merge", ("independent_samples",)),
    Statement("Theorem 1, l1", "3", "generalization.l1_gap", "F(M) - F_S(M)",
              ("independent_samples", "independent_choices", "independent_base", "per_sample_loss", "lipschitz",
               "frozen_head"), ("G", "D_inf"), "merge", ("independent_samples", "frozen_head")),
    Statement("Theorem 1, high probability", "3", "generalization.high_probability", "F(M)",
              ("independent_samples", "independent_choices", "independent_base", "per_sample_loss", "lipschitz",
               "bounded", "frozen_head", "no_momentum", "sgd", "no_clipping", "smooth", "suprema"),
              ("G", "B", "D_inf", "L"), "merge"),
    Statement("Theorem 4", "7", "master.optimization_side", "F_S(M)", ("nonnegative", "smooth_merged", "trained_loss"),
              ("L", "V"), "merge"),
    Statement("V, orthogonal", "7", "dispersion.orthogonal_bound", "V", ("orthogonal",), ("drift",), "merge",
              ("orthogonal",)),
    Statement("V, triangle or centred", "7", "dispersion.smallest_bound", "V", (), ("drift",), "merge"),
    Statement("master bound", "8", "risk.master_bound", "F(M)",
              ("independent_samples", "independent_choices", "independent_base", "per_sample_loss", "trained_loss",
               "nonnegative", "smooth_merged", "smooth", "frozen_head", "sgd", "no_clipping"),
              ("L", "eps_i", "drift", "training_risk"), "merge",
              ("independent_samples", "frozen_head", "sgd", "no_clipping")),
    Statement("master bound on held-out risks", "8", "network.network_bound", "F(M)",
              ("fresh_judges", "nonnegative", "smooth_merged"), ("L", "expert risks", "V"), "merge"),
    Statement("output-space certificate, own logits", "8", "certificate.output_bound", "F(M) on these images", (), (),
              "merge"),
    Statement("function-space and curvature predictions", "8", "function_space", "F(M) on fresh images",
              ("fresh_judges",), ("logits or products",), "merge"),
)  # fmt: skip
"""In the order of the theory."""


@dataclass(frozen=True)
class Judged:
    """A statement with what the verdicts make of it.

    Attributes:
        statement: which.
        about: expert, or ``merge``.
        standing: ``holds`` (every need holds or is covered), ``open`` (some are unknown, none is broken), ``broken``
            (one is violated and not covered: the number is no bound).
        broken, open, covered: names of the needs in question.
        measured: constants that are measured, not known.
        tier: of :func:`theory.assumptions.tier_of`.
    """

    statement: Statement
    about: str
    standing: Standing
    broken: tuple[str, ...]
    open: tuple[str, ...]
    covered: tuple[str, ...]
    measured: tuple[str, ...]
    tier: Tier

    def row(self) -> dict[str, object]:
        """Columns of a table."""
        return {
            "about": self.about,
            "statement": self.statement.name,
            "section": self.statement.section,
            "bounds": self.statement.bounds,
            "standing": self.standing,
            "tier": self.tier,
            "broken": ", ".join(self.broken),
            "open": ", ".join(self.open),
            "covered": ", ".join(self.covered),
            "measured": ", ".join(self.measured),
            "function": f"theory.{self.statement.function}",
        }


def judge_statements(findings: Sequence[Finding], experts: Sequence[str]) -> tuple[Judged, ...]:
    """Every statement for every expert, or for the merge of all.

    Args:
        findings: of every expert and of the merge.
        experts: names.

    A need without any finding counts as open.  For a merge, a need of the experts is that of all of them.
    """
    found = []
    for statement in STATEMENTS:
        owners = experts if statement.scope == "expert" else ("merge",)
        found += [_judged(statement, owner, findings) for owner in owners]
    return tuple(found)


def _judged(statement: Statement, owner: str, findings: Sequence[Finding]) -> Judged:
    needed: dict[str, list[Finding]] = {key: [] for key in dict.fromkeys(statement.needs)}
    for item in findings:
        if item.key in needed and (owner == "merge" or item.about in (owner, "merge")):
            needed[item.key].append(item)
    every = [item for items in needed.values() for item in items]
    missing = [key for key, items in needed.items() if not items]
    covered = _names(owner, (f for f in every if f.verdict == "violated" and f.covered and f.key in statement.covers))
    hard = [f for f in every if f.verdict == "violated" and not (f.covered and f.key in statement.covers)]
    broken = _names(owner, hard)
    unknown = (*_names(owner, (f for f in every if f.verdict == "unknown")), *missing)
    known = {"L", "kappa"} if _certain(needed.get("smooth", []) + needed.get("smooth_merged", [])) else set()
    measured = tuple(c for c in statement.constants if c not in known)
    standing: Standing = "broken" if broken else "open" if unknown else "holds"
    tier = tier_of((f.assumption for f in every), (*measured, *missing, *broken))
    return Judged(statement, owner, standing, broken, unknown, covered, measured, tier)


def _certain(findings: Sequence[Finding]) -> bool:
    return bool(findings) and all(f.verdict == "holds" for f in findings)


def _names(owner: str, items: Iterable[Finding]) -> tuple[str, ...]:
    """Keys in order; for a merge with the experts concerned."""
    groups: dict[str, list[str]] = {}
    for f in items:
        groups.setdefault(f.key, []).extend([] if f.about in (owner, "merge") else [f.about])
    return tuple(f"{key} ({', '.join(experts)})" if experts else key for key, experts in groups.items())
