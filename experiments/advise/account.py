"""The account of a merge of existing experts by the theory: terms of the bound, and what to change first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from experiments.advise.candidates import convex_surface
from experiments.measure.backbone import Readout, smoothness
from experiments.measure.predictors.statistics import FieldStatistics
from experiments.measure.subject import Subject
from theory.errors import MergeboundError
from theory.function_space import Array
from theory.network import network_bound
from theory.surfaces import averaging
from theory.what_if import leave_one_out

IMAGES = 32
"""Images per task for the measured smoothness."""


@dataclass(frozen=True)
class Account:
    """What the theory says of one merge.

    Attributes:
        bound: master bound on the joint held-out risk in nats; NaN where the smoothness could not be measured.
        terms: square roots of its terms, in sqrt(nats).
        vacuous: at or above the loss of guessing.
        active: the largest term of the bound.
        measured_active: the larger of the experts' own risk (``training``) and the merging cost (``dispersion``).
        smoothness: (N,), largest over base and expert; lower estimates.
        dispersion: V, squared units of parameters.
        per_expert: columns ``expert``, ``own_risk``, ``drift``, ``share_of_dispersion``, ``without`` (predicted change
            of the mean risk of the other tasks if it is left out of the average, nats), ``alone`` (fall of the joint
            risk if its task is then served by it alone), ``tier``, ``seed``.
        why: why there is no bound; empty where there is one.
    """

    bound: float
    terms: dict[str, float]
    vacuous: bool
    active: str
    measured_active: str
    smoothness: Array
    dispersion: float
    per_expert: pd.DataFrame
    why: str = ""
    tier: str = "estimated"


def account(
    subject: Subject, statistics: FieldStatistics, alpha: Array, merged_risk: float, *, seed: int = 0
) -> Account:
    """The bound on a merge from held-out risks, measured smoothness and distances, and each expert's part in it.

    Args:
        subject, statistics: of the images that judge.
        alpha: (N,), of the merge; for methods that are not linear their projection on the task vectors.
        merged_risk: joint risk of the merge, predicted or measured, in nats.
        seed: of the power iteration.

    Source: theory.md sections 7 and 8 (Theorem 4 with held-out risks: the instability is not needed).
    """
    own = statistics.own_risks()
    gram = statistics.gram.sum(axis=0)
    apart = alpha[None] - np.eye(len(alpha))
    squares = np.maximum(np.einsum("ji,ik,jk->j", apart, gram, apart), 0.0)
    dispersion, drift = float(squares.mean()), np.sqrt(np.diag(gram))
    classes = [h.shape[-1] for h in (statistics.base_logits(j) for j in range(statistics.size))]
    bound, terms, active, why = float("nan"), {}, "", ""
    stiffness = np.full(statistics.size, np.nan)
    try:
        stiffness = _smoothness(subject, seed)
        found = network_bound(
            own, stiffness, drift, names=statistics.names, dispersion=dispersion, trained_heads=bool(subject.heads[0]),
            held_out=True,
        )  # fmt: skip
        bound = float(found.value)
        terms = {term.name: float(term.value) for term in found.terms}
        active = max(terms, key=lambda name: terms[name])
    except MergeboundError as error:
        why = str(error)
    cost = merged_risk - float(own.mean())
    return Account(
        bound=bound,
        terms=terms,
        vacuous=not bound < float(np.mean(np.log(classes))),
        active=active,
        measured_active="training" if float(own.mean()) >= cost else "dispersion",
        smoothness=stiffness,
        dispersion=dispersion,
        per_expert=_per_expert(statistics, alpha, own, drift, squares, seed),
        why=why,
    )


def _smoothness(subject: Subject, seed: int) -> Array:
    """Largest Gauss-Newton eigenvalue over base and expert of each task, in the merged coordinates."""
    found = []
    for j, network in enumerate(subject.networks):
        images = subject.calibration[j].images[:IMAGES]
        try:
            values = [
                smoothness(network, point, Readout(), images, iterations=4, seed=seed)
                for point in (subject.base, subject.vectors[j])
            ]
        except (RuntimeError, NotImplementedError) as error:
            reason = str(error).partition("\n")[0]
            raise MergeboundError(f"the smoothness of {subject.architecture} cannot be measured ({reason})") from error
        found.append(max(values))
    return np.array(found)


def _per_expert(
    statistics: FieldStatistics, alpha: Array, own: Array, drift: Array, squares: Array, seed: int
) -> pd.DataFrame:
    size = statistics.size
    total = float(squares.sum())
    without = alone = np.full(size, np.nan)
    if size > 1:
        _, surface = convex_surface(statistics)
        without = leave_one_out(surface, averaging(), with_task=True).change
        before = surface.per_task(np.full(size, 1.0 / size))
        alone = (before - own - (size - 1) * without) / size
    table: dict[str, Any] = {
        "expert": list(statistics.names),
        "alpha": alpha,
        "own_risk": own,
        "drift": drift,
        "share_of_dispersion": squares / total if total > 0.0 else np.full(size, 1.0 / size),
        "without": without,
        "alone": alone,
        "tier": "estimated",
        "seed": seed,
    }
    return pd.DataFrame(table)


@dataclass(frozen=True)
class Change:
    """One thing that could be changed.

    Attributes:
        what: the change, as an instruction.
        gain: by how much the joint risk falls, in nats; NaN where nothing prices it.
        tier: of the gain.
        why: which number says so.
    """

    what: str
    gain: float
    tier: str
    why: str


def changes(
    found: Account, base: float, average: float, chosen: float, own: float, label: str, tier: str
) -> tuple[Change, ...]:
    """What could be changed, by predicted gain over averaging everything; the first is what to change first.

    Args:
        found: the account.
        base, average, chosen: joint risks of base, average and the recommended merge, in nats.
        own: mean risk of the experts alone.
        label: of the recommended merge.
        tier: of the joint risks.
    """
    rows = found.per_expert
    options = [Change(f"merge by {label} in place of averaging", average - chosen, tier, f"{tier} risks")]
    worst = rows.iloc[int(np.nanargmax(rows["own_risk"].to_numpy(dtype=float)))]
    excess = float(worst["own_risk"] - rows["own_risk"].median()) / len(rows)
    options.append(
        Change(
            f"train {worst['expert']} better (its own risk is {worst['own_risk']:.3g} nats)", excess, "estimated",
            "its own risk brought down to the median of the experts",
        )
    )  # fmt: skip
    if len(rows) > 2:
        hurts = rows.iloc[int(np.nanargmax(rows["alone"].to_numpy(dtype=float)))]
        if float(hurts["alone"]) > 0.0:
            options.append(
                Change(
                    f"keep {hurts['expert']} as a model of its own, out of the merge",
                    float(hurts["alone"]),
                    "estimated",
                    "predicted joint risk of averaging the others, and its own expert on its task",
                )
            )
    far = rows.iloc[int(np.nanargmax(rows["share_of_dispersion"].to_numpy(dtype=float)))]
    cost = chosen - own
    if found.measured_active == "dispersion":
        options.append(
            Change(
                f"fine-tune with less training time or ask `mergebound advise training`, first {far['expert']} "
                f"({far['share_of_dispersion']:.0%} of the dispersion)",
                float("nan"), "estimated",
                f"merging costs {cost:.3g} nats, more than the experts' own risk ({own:.3g}); no prediction prices it",
            )
        )  # fmt: skip
    if chosen >= base:
        options.append(Change("do not merge these experts: the base is no worse", chosen - base, tier, f"{tier} risks"))
    priced = sorted((c for c in options if np.isfinite(c.gain)), key=lambda c: -c.gain)
    return (*priced, *(c for c in options if not np.isfinite(c.gain)))
