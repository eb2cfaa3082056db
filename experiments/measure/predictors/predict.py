"""Predictions of any merges from one collection: a table with one row per merge and predictor."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from experiments.measure.predictors.calibration import Flag, Interval
from experiments.measure.predictors.certificates import bracket_of, output_certificate, remainder_certificate
from experiments.measure.predictors.losses import LABELS, Loss, estimate
from experiments.measure.predictors.merges import Formed, Merge, form, function_projection, residual_products
from experiments.measure.predictors.predictor import Predictor
from experiments.measure.predictors.statistics import FieldStatistics
from experiments.measure.predictors.zoo import predictors
from experiments.measure.subject import Subject
from theory.errors import MergeboundError
from theory.function_space import Array
from theory.interpolation import InterpolatedField

if TYPE_CHECKING:
    import pandas as pd

Treatment = Literal["default", "none", "base", "own", "average", "function", "stretch"]
TREATMENTS: tuple[Treatment, ...] = ("default", "none", "base", "own", "average", "function", "stretch")
REFERENCES = (
    *("pairs_average", "hermite_average", "pairs_tangent", "pairs_halves", "pairs"),
    *("anchored_tangent", "anchored", "second_order", "secant_tangent"),
)
"""Remainders are read off from the first two of these that were predicted too."""
NARROW = float(np.log(1.25))
"""Gaps below it are agreement (as in ``mergebound predict``)."""
Z = 1.959964
"""Two-sided 95 % of the normal distribution."""


@dataclass(frozen=True)
class Priced:
    """Predicted logits of A merges by one predictor: (A, n_j, C_j) per task; ``seconds`` for all of them."""

    name: str
    logits: tuple[Array, ...]
    tier: str
    cost: float
    seconds: float


VOID = (
    "risk", "standard_error", "low", "high", "accuracy", "interval_low", "interval_high", "bracket_low",
    "bracket_high", "gap", "certificate_output", "certificate_remainder",
)  # fmt: skip
"""What is missing for a merge whose running variances are clamped."""


def predict_merge(
    subject: Subject,
    merges: Sequence[Merge],
    statistics: FieldStatistics,
    *,
    names: Sequence[str] | None = None,
    residual: Treatment = "default",
    weights: npt.ArrayLike | None = None,
    loss: Loss = LABELS,
    interval: Interval | None = None,
    flag: Flag | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """One row per merge and predictor.

    Args:
        subject: base, experts and calibration images, as collected.
        merges: coefficients, methods or vectors.
        statistics: from :func:`experiments.measure.predictors.collect_fields` on the same subject.
        names: of predictors; default all for which everything was collected.
        residual: what becomes of the part of a non-linear merge off the task vectors: ``default`` is each predictor's
            own choice; ``none`` drops it; ``base``, ``own``, ``average`` multiply it with the Jacobian there;
            ``function`` chooses each task's coefficients by logit change at the base; ``stretch`` drops it and
            lengthens the rest to ``|M - x_0|`` (known logits only).
        weights: p_j of the joint risk; default 1/N.
        loss: how logits are judged.
        interval: calibrated on other experts; fills ``interval_low`` and ``interval_high`` of its own predictor.
        flag: calibrated on other experts; without it a merge is flagged by the rule of ``flag`` below.
        seed: for methods that draw random numbers.

    Returns:
        Columns: ``merge``, ``method``, ``predictor``, ``risk`` (nats), ``standard_error``, ``low`` and ``high`` (95 %,
        from the calibration images alone), ``accuracy``, ``interval_low`` and ``interval_high`` (calibrated, else
        missing), ``bracket_low``, ``bracket_high``, ``gap`` (log ratio; missing without tangents at the base),
        ``flag`` (do not trust: the calibrated flag, or a gap of at least :data:`NARROW` with the upper end above
        the base's risk, or every end above it), ``certificate_output``, ``certificate_remainder`` (estimated upper
        bounds; remainders are distances to two of :data:`REFERENCES`), ``explained`` (share of the merge on the task
        vectors), ``clamped`` (share of BatchNorm's running variances that become negative: above 0 nothing is
        predicted, ``flag`` is raised and the numbers are missing), ``tier``, ``cost`` (forward passes of the
        collection), ``seconds`` (for this merge, after the collection), ``images``, ``seed``.

    Raises:
        MergeboundError: no merges, statistics of other experts, or what predictors and methods refuse.
    """
    import pandas as pd

    if not merges:
        raise MergeboundError("merges is empty: give coefficients or methods")
    if statistics.names != subject.names:
        raise MergeboundError("the statistics were collected for other experts: collect them for this subject")
    if residual not in TREATMENTS:
        raise MergeboundError(f"residual = {residual!r}: choose from {', '.join(TREATMENTS)}")
    started = time.perf_counter()
    formed = [form(subject, merge, statistics.groups, seed) for merge in merges]
    each = (time.perf_counter() - started) / len(merges)
    offsets = _Offsets(subject, statistics, formed)
    priced = [price(p, statistics, formed, offsets, residual) for p in predictors(names, statistics)]
    frame = pd.concat([_rows(one, formed, statistics, priced, loss, weights) for one in priced], ignore_index=True)
    frame["seconds"] += each
    p = np.full(statistics.size, 1.0 / statistics.size) if weights is None else np.asarray(weights, dtype=np.float64)
    frame["base_risk"] = float(statistics.base_risks() @ p)
    _bracket_columns(frame)
    if flag is not None:
        frame["flag"] = flag.raised(frame)
    frame["interval_low"] = frame["interval_high"] = np.nan
    if interval is not None:
        _interval_columns(frame, interval)
    broken = frame["clamped"] > 0.0
    frame.loc[broken, list(VOID)] = np.nan
    frame.loc[broken, "flag"] = True
    frame["images"], frame["seed"] = min(statistics.images), statistics.seed
    return frame


def price(
    predictor: Predictor,
    statistics: FieldStatistics,
    formed: Sequence[Formed],
    offsets: _Offsets,
    residual: Treatment = "default",
) -> Priced:
    """Predicted logits of all merges."""
    started = time.perf_counter()
    fields = predictor.fields(statistics)
    shares = statistics.shares()
    where = predictor.residual if residual == "default" else residual
    logits: list[Array] = []
    alphas = np.stack([merge.alpha(shares) for merge in formed])
    if where == "stretch":
        lengthen = np.array([1.0 / np.sqrt(max(m.explained, 1e-6)) for m in formed])
        alphas = alphas * lengthen[:, None]
    for j, whole in enumerate(fields):
        found = _field_logits(whole, statistics, j, formed, alphas, where)
        for a, merge in enumerate(formed):
            if merge.residual is None or where in ("none", "stretch"):
                continue
            if where == "function":
                change = np.tensordot(merge.alpha(shares), statistics.of("tangent_base", j), axes=1)
                target = change + offsets.of("base", a)[j]
                alpha, left = function_projection(statistics.of("tangent_base", j), target)
                found[a] = whole.at(alpha) + left
            else:
                found[a] += predictor.residual_weight * offsets.of(where, a)[j]
        logits.append(found)
    taken = time.perf_counter() - started
    return Priced(
        predictor.name, tuple(logits), predictor.tier, predictor.cost(statistics.size, statistics.depth), taken
    )


def _field_logits(
    whole: InterpolatedField,
    statistics: FieldStatistics,
    j: int,
    formed: Sequence[Formed],
    alphas: Array,
    where: str,
) -> Array:
    """Logits at the mean coefficients, with first order in how layers differ where products were collected."""
    found = whole.at(alphas)
    if statistics.depth == 1:
        return found
    anchor = where if f"tangent_{where}" in statistics.kinds else "base"
    if f"tangent_{anchor}" not in statistics.kinds:
        return found
    shares = statistics.shares()
    for a, merge in enumerate(formed):
        apart = merge.layers - merge.alpha(shares)[:, None]
        if np.abs(apart).max() > 0.0:
            found[a] += np.tensordot(apart.ravel(), statistics.layered(f"tangent_{anchor}", j), axes=1)
    return found


class _Offsets:
    """Jacobian products of residuals, each made once and only where it is asked for."""

    def __init__(self, subject: Subject, statistics: FieldStatistics, formed: Sequence[Formed]) -> None:
        self._subject, self._statistics, self._formed = subject, statistics, formed
        self._known: dict[tuple[str, int], list[Array]] = {}

    def of(self, anchor: str, merge: int) -> list[Array]:
        """J_j(anchor) r of a merge on every task."""
        if (anchor, merge) not in self._known:
            residual = self._formed[merge].residual
            assert residual is not None
            self._known[anchor, merge] = residual_products(self._subject, self._statistics, residual, anchor)
        return self._known[anchor, merge]


def _rows(
    one: Priced,
    formed: Sequence[Formed],
    statistics: FieldStatistics,
    priced: Sequence[Priced],
    loss: Loss,
    weights: npt.ArrayLike | None,
) -> pd.DataFrame:
    import pandas as pd

    started = time.perf_counter()
    found = estimate(statistics, one.logits, loss, weights)
    taken = (one.seconds + time.perf_counter() - started) / len(formed)
    plain = replace(loss, target="labels") == LABELS
    trusted = [p for p in priced if p.name in REFERENCES and p is not one]
    others = [other.logits for other in sorted(trusted, key=lambda p: REFERENCES.index(p.name))[:2]]
    table: dict[str, Any] = {
        "merge": [merge.label for merge in formed],
        "method": [merge.method for merge in formed],
        "predictor": one.name,
        "risk": found.risk,
        "standard_error": found.standard_error,
        "low": np.maximum(found.risk - Z * found.standard_error, 0.0),
        "high": found.risk + Z * found.standard_error,
        "accuracy": found.accuracy,
        "certificate_output": output_certificate(statistics, one.logits, weights=weights).upper if plain else np.nan,
        "certificate_remainder": (
            remainder_certificate(statistics, one.logits, others, weights=weights).upper if plain and others else np.nan
        ),
        "explained": [merge.explained for merge in formed],
        "clamped": [merge.clamped for merge in formed],
        "tier": one.tier,
        "cost": one.cost,
        "seconds": taken,
    }
    return pd.DataFrame(table)


def _bracket_columns(frame: pd.DataFrame) -> None:
    """``bracket_low``, ``bracket_high``, ``gap`` and ``flag`` of every merge, on all of its rows."""
    count = frame["predictor"].eq(frame["predictor"].iloc[0]).sum()
    risks = {str(name): rows["risk"].to_numpy() for name, rows in frame.groupby("predictor", sort=False)}
    if not {"secant", "tangent_base"} <= set(risks):
        frame["bracket_low"] = frame["bracket_high"] = frame["gap"] = np.nan
        frame["flag"] = frame["risk"] > frame["base_risk"]
        return
    found = bracket_of(risks)
    base = frame["base_risk"].to_numpy()[:count]
    flag = ((found.gap >= NARROW) & (found.high > base)) | (found.low > base)
    repeats = len(frame) // count
    columns = {"bracket_low": found.low, "bracket_high": found.high, "gap": found.gap, "flag": flag}
    for name, values in columns.items():
        frame[name] = np.tile(values, repeats)


def _interval_columns(frame: pd.DataFrame, interval: Interval) -> None:
    column = interval.prediction.removeprefix("pred_")
    chosen = frame["predictor"] == column
    if not chosen.any():
        raise MergeboundError(f"the interval belongs to the predictor {column!r}: predict with it, or leave it out")
    rows = frame[chosen].rename(columns={"risk": interval.prediction})
    if interval.gap != "gap":
        rows = rows.rename(columns={"gap": interval.gap})
    low, high = interval.ends(rows)
    frame.loc[chosen, "interval_low"], frame.loc[chosen, "interval_high"] = low, high
