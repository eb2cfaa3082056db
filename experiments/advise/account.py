"""The account of a merge of existing experts by the theory: terms of the bound, and what to change first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from experiments.advise.candidates import affine_fields, convex_surface
from experiments.advise.numbers import Z95
from experiments.measure.backbone import Readout, smoothness
from experiments.measure.predictors.statistics import FieldStatistics
from experiments.measure.subject import Subject
from theory.errors import MergeboundError
from theory.function_space import Array, cross_entropy, joint_standard_error
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
        low, high: 95 % interval of the gain over images, paired where both merges see the same ones; NaN: none.
        tier: of the gain.
        why: which number says so.
    """

    what: str
    gain: float
    low: float
    high: float
    tier: str
    why: str


@dataclass(frozen=True)
class Chosen:
    """The recommended merge against the average and the base, in nats.

    Attributes:
        label: its name.
        risk: its joint risk.
        tier: of the risks.
        over_average: fall of the joint risk against averaging, with its standard error over images.
        over_base: likewise against the base.
        z: standard errors of their intervals (more than 1.96 where the best of several was chosen on these images).
    """

    label: str
    risk: float
    tier: str
    over_average: tuple[float, float]
    over_base: tuple[float, float]
    z: float


def changes(statistics: FieldStatistics, found: Account, chosen: Chosen) -> tuple[Change, ...]:
    """What could be changed, by predicted gain over averaging everything; the first is what to change first.

    Args:
        statistics: of the images that judge.
        found: the account.
        chosen: the recommended merge; "in place of averaging" is no change where it is the average.
    """
    rows, names, tier = found.per_expert, statistics.image_names(), chosen.tier
    own = [cross_entropy(statistics.own_logits(j), y) for j, y in enumerate(statistics.labels)]
    options = []
    if chosen.label != "average":
        options.append(
            _change(
                f"merge by {chosen.label} in place of averaging", *chosen.over_average, tier, "paired risks", chosen.z
            )
        )
    worst = int(np.nanargmax(rows["own_risk"].to_numpy(dtype=float)))
    risk = float(rows["own_risk"].iloc[worst])
    options.append(
        _change(
            f"train {rows['expert'].iloc[worst]} better (its own risk is {risk:.3g} nats)",
            (risk - float(rows["own_risk"].median())) / len(rows), _above_median_error(own, worst), "estimated",
            "its own risk brought down to the median of the experts",
        )
    )  # fmt: skip
    if len(rows) > 2:
        hurts = int(np.nanargmax(rows["alone"].to_numpy(dtype=float)))
        gain = float(rows["alone"].iloc[hurts])
        if gain > 0.0:
            options.append(
                _change(
                    f"keep {rows['expert'].iloc[hurts]} as a model of its own, out of the merge", gain,
                    joint_standard_error(_gain_alone(statistics, own, hurts), names), "estimated",
                    "predicted joint risk of averaging the others, and its own expert on its task",
                )
            )  # fmt: skip
    far = rows.iloc[int(np.nanargmax(rows["share_of_dispersion"].to_numpy(dtype=float)))]
    mean = float(np.mean([losses.mean() for losses in own]))
    nan = float("nan")
    if found.measured_active == "dispersion":
        options.append(
            Change(
                f"fine-tune with less training time or ask `mergebound advise training`, first {far['expert']} "
                f"({far['share_of_dispersion']:.0%} of the dispersion)",
                nan, nan, nan, "estimated",
                f"merging costs {chosen.risk - mean:.3g} nats, more than the experts' own risk ({mean:.3g}); no "
                "prediction prices it",
            )
        )  # fmt: skip
    worse, error = -chosen.over_base[0], chosen.over_base[1]
    if worse >= 0.0:
        what = "do not merge these experts: the base is no worse"
        options.append(_change(what, worse, error, tier, "paired risks", chosen.z))
    priced = sorted((c for c in options if np.isfinite(c.gain)), key=lambda c: -c.gain)
    return (*priced, *(c for c in options if not np.isfinite(c.gain)))


def _change(what: str, gain: float, error: float, tier: str, why: str, z: float = Z95) -> Change:
    return Change(what, gain, gain - z * error, gain + z * error, tier, why)


def _above_median_error(own: list[Array], worst: int) -> float:
    """Standard error of (worst - median) / N of the experts' own risks, each over its own images."""
    means = [float(losses.mean()) for losses in own]
    order, size = [int(j) for j in np.argsort(means, kind="stable")], len(own)
    middle = {order[(size - 1) // 2], order[size // 2]}
    weights = np.zeros(size)
    weights[list(middle)] -= 1.0 / len(middle)
    weights[worst] += 1.0
    return joint_standard_error(own, weights=weights / size)


def _gain_alone(statistics: FieldStatistics, own: list[Array], k: int) -> list[Array]:
    """Per image, by how much the loss falls if expert k is kept out of the average and serves its task alone."""
    size = statistics.size
    name, _ = convex_surface(statistics)
    everyone, others = np.full(size, 1.0 / size), np.full(size, 1.0 / max(size - 1, 1))
    others[k] = 0.0
    gains = []
    for j, (field, y) in enumerate(zip(affine_fields(statistics, name), statistics.labels, strict=True)):
        after = own[j] if j == k else cross_entropy(field.at(others), y)
        gains.append(cross_entropy(field.at(everyone), y) - after)
    return gains
