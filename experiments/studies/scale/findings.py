"""The five findings of the paper, each asked of every family, base and score: an effect with an interval and a verdict.

How a verdict is given is in ``verdicts.py``; what the interval of a held-out measure is over, in ``over_tasks.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from experiments.statistics import Estimate
from experiments.studies.scale.comparisons import (
    base_effects,
    multitask_effects,
    no_effects,
    number_effects,
    size_effects,
    spread,
)
from experiments.studies.scale.effects import Effects, Table
from experiments.studies.scale.over_tasks import judged_over_tasks, limits
from experiments.studies.scale.spec import FamilySpec, ScaleSpec
from experiments.studies.scale.verdicts import borderline, can_test, poorest, verdict

FINDINGS = {
    "1 stronger base": "Experts of a stronger base merge better.",
    "2 larger model": "Larger models merge more easily.",
    "3 more experts": "Held-out performance improves with the number of experts.",
    "4 beats multitask": "All experts of a strong base, merged, beat multitask training on held-out tasks.",
    "5 methods converge": "Methods come closer to each other at large scale.",
}


@dataclass(frozen=True, eq=False)
class Question:
    """One comparison that is made of a study.

    Attributes:
        finding, scope: what is asked, and of what.
        measure: that it is asked of.
        accuracy: the same in plain accuracy, where ``measure`` is a ratio.
        effects: of a measure.
        direction: the paper's, +1 or -1.
        unit: of the effect.
        sides: points on each side of the comparison (a base, a network): their experts must be better than chance.
        role: ``yes`` (the paper's own comparison in the first family), ``other family``, ``optimised multitask``, or
            ``widened``.
        compared: where ``measure`` is of held-out tasks, the kinds of points on each side that are compared there:
            their held-out accuracy must be better than chance as well.
    """

    finding: str
    scope: str
    measure: str
    accuracy: str | None
    effects: Callable[[str], Effects]
    direction: int
    unit: str
    sides: Sequence[Table]
    role: str
    compared: Sequence[str] = ()


@dataclass(frozen=True)
class Chance:
    """Mean accuracy of guessing on the held-in and on the held-out tasks; NaN where it is not known."""

    held_in: float = np.nan
    held_out: float = np.nan


def answer(question: Question, spec: ScaleSpec, chance: Chance) -> dict[str, Any]:
    """A question's row: effect, verdict, the accuracies behind it, and the same effect in plain accuracy.

    Args:
        question: what is asked.
        spec: rule and seed.
        chance: accuracy of guessing.
    """
    effects = question.effects(question.measure)
    judged = judged_over_tasks(effects, seed=spec.seed)
    found = judged.general
    experts = poorest(question.sides, spec.seed)
    nan = float("nan")
    scores = Estimate(nan, nan, nan)
    if question.measure.startswith("held_out"):
        scored = accuracy_of(question.measure)
        scores = poorest(question.sides, spec.seed, kinds=question.compared, measure=scored)
    near = not (can_test(experts, chance.held_in, spec.rule) and can_test(scores, chance.held_out, spec.rule))

    def word(estimate: Estimate) -> str:
        said = verdict(estimate, question.direction)
        return "not testable" if near and said != "not measured" else said

    row: dict[str, Any] = {
        "finding": question.finding,
        "scope": question.scope,
        "verdict": word(found),
        "measure": question.measure,
        "effect": found.value,
        "effect_low": found.low,
        "effect_high": found.high,
        "unit": question.unit,
        "paper": "above 0" if question.direction > 0 else "below 0",
        "borderline": "yes" if borderline(found, spec.rule.borderline) else "no",
        **limits(judged),
        "verdict_on_these_tasks": word(judged.fixed) if judged.held_out_tasks else "",
        "experts_accuracy": experts.value,
        "experts_accuracy_low": experts.low,
        "experts_accuracy_high": experts.high,
        "chance": chance.held_in,
        "held_out_accuracy": scores.value,
        "held_out_accuracy_low": scores.low,
        "held_out_accuracy_high": scores.high,
        "held_out_chance": chance.held_out if question.compared else nan,
        **dict.fromkeys(("in_accuracy", "in_accuracy_low", "in_accuracy_high"), nan),
        "verdict_in_accuracy": "",
    }
    if question.accuracy is not None:
        plain = judged_over_tasks(question.effects(question.accuracy), seed=spec.seed).general
        row |= {"in_accuracy": plain.value, "in_accuracy_low": plain.low, "in_accuracy_high": plain.high}
        row["verdict_in_accuracy"] = verdict(plain, question.direction)
    return {
        **row,
        "comparisons": int(np.isfinite(effects.value).sum()),
        "interval_over": f"{judged.over}; {seeds_words(spec)}",
        "papers_own": question.role,
        "tier": "measured",
        "seed": spec.seed,
    }


def seeds_words(spec: ScaleSpec) -> str:
    """That no interval is over seeds of fine-tuning, and how many there were."""
    return f"not over training seeds ({len(spec.seeds)})"


def findings_table(table: Table, spec: ScaleSpec, chance: Chance | None = None) -> pd.DataFrame:
    """One row per finding, scope and measure.

    The first family's rows with the paper's own measure come first (``papers_own == "yes"``); the others widen them.

    Args:
        table: of all points.
        spec: the study.
        chance: accuracy of guessing; where it is not known everything is testable.

    Returns:
        ``finding``, ``scope``, ``verdict``, ``measure``, ``effect`` with ``_low`` and ``_high`` (95 %, over merged
        tasks, test images and held-out tasks), ``unit``, ``paper`` (its direction), ``borderline``; for held-out
        measures the columns of :func:`experiments.studies.scale.over_tasks.limits` (the interval with the held-out
        tasks as they are, the one over them) and ``verdict_on_these_tasks``; ``experts_accuracy`` with limits (of the
        poorest side of the comparison), ``chance``, ``held_out_accuracy`` with limits (the poorest of what is compared
        on held-out tasks), ``held_out_chance``, ``in_accuracy`` with limits and ``verdict_in_accuracy`` (the same
        without ratios), ``comparisons``, ``interval_over``, ``papers_own``, ``tier``, ``seed``.
    """
    return pd.DataFrame([answer(question, spec, chance or Chance()) for question in questions(table, spec)])


def questions(table: Table, spec: ScaleSpec) -> Iterator[Question]:
    """Everything that is asked, family by family, the paper's own first among equals."""
    for place, family in enumerate(spec.families):
        own = table.where(family=family.name)
        yield from _of_family(own, spec, family, "yes" if place == 0 else "other family")


def _of_family(table: Table, spec: ScaleSpec, family: FamilySpec, paper: str) -> Iterator[Question]:
    merges = table.where(kind="merge")
    name, bases = family.name, spec.bases_of(family)
    outs = [f"held_out/{one}" for one in spec.transfers]
    by_base = {base: table.where(base=base) for base in bases}
    by_size = {base: [by_base[base].where(architecture=one) for one in family.architectures] for base in bases}

    strongest = bases[-1]

    def role(main: bool) -> str:
        return paper if main else "widened"

    def compared(measure: str) -> tuple[str, ...]:
        return ("base", "merge") if measure in outs else ()

    for weak, strong in _pairs(bases):
        for measure, plain in (("held_in", "held_in_accuracy"), ("held_in_accuracy", None)):
            yield Question(
                "1 stronger base", f"{name}: {strong} against {weak}", measure, plain,
                lambda m, weak=weak, strong=strong: base_effects(merges.where(measure=m), weak, strong),  # type: ignore[misc]
                1, "difference", (by_base[weak], by_base[strong]),
                role(measure == "held_in" and (weak, strong) == (bases[0], bases[-1])),
            )  # fmt: skip
    for base in bases[::-1]:
        for measure in ("held_in", outs[0]):
            yield Question(
                "2 larger model", f"{name}: {base} base", measure, accuracy_of(measure),
                lambda m, base=base: size_effects(merges.where(measure=m, base=base), spec),  # type: ignore[misc]
                1, "per tenfold size", by_size[base], role(base == strongest and measure == "held_in"),
                compared(measure),
            )  # fmt: skip
    for base in bases[::-1]:
        for measure in outs:
            yield Question(
                "3 more experts", f"{name}: {base} base", measure, accuracy_of(measure),
                lambda m, base=base: number_effects(merges.where(measure=m, base=base), spec),  # type: ignore[misc]
                1, "per doubling of N", (by_base[base],), role(base == strongest and measure == outs[0]),
                compared(measure),
            )  # fmt: skip
    yield from _against_multitask(table, spec, family, paper)
    for base in bases[::-1]:
        for measure in ("held_in", outs[0]):
            yield Question(
                "5 methods converge", f"{name}: {base} base", measure, accuracy_of(measure),
                lambda m, base=base: _spreads(merges.where(measure=m, base=base), spec),  # type: ignore[misc]
                -1, "per tenfold size", by_size[base], role(base == strongest and measure == "held_in"),
                compared(measure),
            )  # fmt: skip


def _spreads(merges: Table, spec: ScaleSpec) -> Effects:
    spreads = spread(merges, ("family", "architecture", "parameters", "base", "experts", "chain", "seed"))
    return size_effects(spreads, spec) if len(spreads.rows) else no_effects(merges)


def accuracy_of(measure: str) -> str:
    """The plain accuracy behind a ratio."""
    return measure.replace("held_out/", "held_out_accuracy/").replace("held_in", "held_in_accuracy")


def _against_multitask(table: Table, spec: ScaleSpec, family: FamilySpec, paper: str) -> Iterator[Question]:
    name, bases = family.name, spec.bases_of(family)
    trained = spec.multitask.bases if spec.multitask is not None else ()
    wanted_bases = [base for base in bases[::-1] if base in trained or base == bases[-1]]  # not trained: not measured
    networks = tuple(table.rows.drop_duplicates("architecture").sort_values("parameters")["architecture"])
    for base in wanted_bases:
        for model in ("fixed", "optimised"):
            for measure in [f"held_out_accuracy/{one}" for one in spec.transfers]:
                for scope, wanted in (("largest network", networks[-1:]), ("all networks", networks)):
                    own = table.where(base=base, architecture=wanted)
                    main = measure.endswith(spec.transfers[0]) and base == bases[-1] and scope == "largest network"
                    mine = {"fixed": paper, "optimised": "optimised multitask"}[model]

                    def effects(m: str, own: Table = own, model: str = model) -> Effects:
                        scored = own.where(measure=m)
                        return multitask_effects(_of_all(scored, spec), scored.where(kind=f"multitask_{model}"))

                    yield Question(
                        "4 beats multitask", f"{name}: {base} base, {scope}, {model} multitask", measure, None, effects,
                        1, "accuracy", (own.where(kind=["expert", f"multitask_{model}"]), _of_all(own, spec)),
                        mine if main else "widened", ("merge", f"multitask_{model}"),
                    )  # fmt: skip


def _of_all(table: Table, spec: ScaleSpec) -> Table:
    """Merges of the most experts."""
    return table.where(kind="merge", experts=spec.experts[-1])


def _pairs(bases: Sequence[str]) -> list[tuple[str, str]]:
    ends = [(bases[0], bases[-1])]
    return ends + [pair for pair in pairwise(bases) if pair not in ends]
