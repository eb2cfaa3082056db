"""The theory's account: which term moves with size, base and N, and whether it goes along with the loss.

What the theory says of each finding, and whether these movements bear it out, is in ``theory_says.py``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from experiments import statistics as st
from experiments.studies.scale.comparisons import scalar_slopes
from experiments.studies.scale.effects import Effects, Table, contrast, estimate, joined, slope_weights
from experiments.studies.scale.spec import ScaleSpec

OF_MERGES = ("dispersion", "curved", "secant_risk", "tangent_risk", "average_risk", "gap")
OF_EXPERTS = ("drift", "relative_drift", "cosine", "expert_risk", "noise", "signal", "curvature", "cross_to_own")
SIGNED = frozenset({"cosine"})
"""Terms that may be negative: their plain value moves, not its logarithm."""


def _moves(name: str, effects: Effects, factor: str, scope: str, unit: str, seed: int) -> dict[str, Any]:
    found = estimate(effects, seed=seed)
    known = np.isfinite(found.low) and np.isfinite(found.high)
    clear = known and (found.low > 0 or found.high < 0)
    return {
        "factor": factor,
        "scope": scope,
        "term": name,
        "change": found.value,
        "change_low": found.low,
        "change_high": found.high,
        "unit": unit,
        "moves": ("grows" if found.value > 0 else "falls") if clear else "undecided",
        "comparisons": int(np.isfinite(effects.value).sum()),
    }


def account_table(terms: pd.DataFrame, spec: ScaleSpec) -> pd.DataFrame:
    """How every term changes with size, base and N: ``change`` is of log10 of the term (of the cosine itself).

    Returns:
        ``factor``, ``scope``, ``term``, ``change`` with ``_low`` and ``_high`` (95 %, over tasks), ``unit``,
        ``moves`` (grows, falls, undecided), ``comparisons``, ``tier``, ``seed``.
    """
    rows: list[dict[str, Any]] = []
    if terms.empty:
        return pd.DataFrame()
    tiers = dict(zip(terms["term"], terms["tier"], strict=True))
    for family in spec.families:
        mine = terms[terms["family"] == family.name]
        for name in (*OF_EXPERTS, *OF_MERGES):
            part = mine[mine["term"] == name]
            logs = name not in SIGNED
            for base in spec.bases_of(family)[::-1]:
                own = part[part["base"] == base]
                effects = scalar_slopes(own, ("experts", "chain", "members"), logarithm=logs)
                if len(effects):
                    scope = f"{family.name}: {base} base"
                    rows.append(_moves(name, effects, "size", scope, "per tenfold size", spec.seed))
            bases = spec.bases_of(family)
            if len(bases) > 1:
                both = _as_table(part, logs)
                match = ("architecture", "experts", "chain", "members")
                effects = contrast(both, "base", (bases[0], bases[-1]), (-1.0, 1.0), match)
                if len(effects):
                    scope = f"{family.name}: {bases[-1]} against {bases[0]}"
                    rows.append(_moves(name, effects, "base", scope, "difference", spec.seed))
            if name in OF_MERGES:
                for base in bases[::-1]:
                    effects = number_slopes(part[part["base"] == base], spec, logs)
                    if len(effects):
                        scope = f"{family.name}: {base} base"
                        rows.append(_moves(name, effects, "number", scope, "per doubling of N", spec.seed))
    frame = pd.DataFrame(rows)
    if frame.empty:
        return frame
    return frame.assign(tier=[tiers[name] for name in frame["term"]], seed=spec.seed)


def _as_table(frame: pd.DataFrame, logs: bool) -> Table:
    values = frame["value"].to_numpy(dtype=float)
    if logs:
        values = np.where(values > 0, np.log10(np.where(values > 0, values, 1.0)), np.nan)
    rows = frame.assign(value=values).reset_index(drop=True)
    return Table(rows, np.full((len(rows), 300), np.nan))


def number_slopes(frame: pd.DataFrame, spec: ScaleSpec, logs: bool) -> Effects:
    """Slopes against log2 N along chains; the group of all experts belongs to every chain."""
    table = _as_table(frame, logs)
    full = len(spec.held_in)
    chains = sorted({int(c) for c, n in zip(frame["chain"], frame["experts"], strict=True) if n != full})
    parts = []
    for chain in chains:
        keep = ((table.rows["chain"] == chain) | (table.rows["experts"] == full)).to_numpy()
        own = table.take(np.flatnonzero(keep))
        weights = slope_weights([float(np.log2(n)) for n in spec.experts])
        parts.append(contrast(own, "experts", spec.experts, weights, ("architecture", "base")))
    return joined(*parts) if parts else Effects(np.empty(0), np.empty((0, 300)), ())


def along_table(terms: pd.DataFrame, table: Table, spec: ScaleSpec) -> pd.DataFrame:
    """Rank correlation of every term of averages with their measured test loss on their own tasks, over all cells.

    Returns:
        ``family``, ``term``, ``against`` (loss; ``cost``: minus the mean loss of the experts), ``spearman`` with
        ``_low`` and ``_high`` (95 %, over experts), ``merges``, ``tier``, ``seed``.
    """
    if terms.empty:
        return pd.DataFrame()
    rows = table.rows
    merged = rows[
        (rows["kind"] == "merge") & (rows["method"] == spec.laws.method) & (rows["measure"] == "held_in_loss")
    ]
    alone = rows[(rows["kind"] == "expert") & (rows["measure"] == "held_in_loss")]
    own = {(r["architecture"], r["base"], r["seed"], r["members"]): r["value"] for r in alone.to_dict("records")}
    measured: dict[tuple[str, str, str], tuple[float, float]] = {}
    for r in merged.to_dict("records"):
        tasks = str(r["members"]).split(";")
        costs = [own[r["architecture"], r["base"], r["seed"], t] for t in tasks]
        key = (r["architecture"], r["base"], r["members"])
        measured.setdefault(key, (r["value"], r["value"] - float(np.mean(costs))))
    out = []
    for family in spec.families:
        for name in OF_MERGES:
            part = terms[(terms["family"] == family.name) & (terms["term"] == name)]
            keyed = [
                (r, (r["architecture"], r["base"], r["members"]))
                for r in part.to_dict("records")
                if (r["architecture"], r["base"], r["members"]) in measured
            ]
            if len(keyed) < 3:
                continue
            x = np.array([float(r["value"]) for r, _ in keyed])
            groups = [[f"{r['architecture']} {r['base']} {t}" for t in str(r["members"]).split(";")] for r, _ in keyed]
            members = st.membership(groups)
            for place, against in enumerate(("loss", "cost")):
                y = np.array([measured[key][place] for _, key in keyed])
                good = np.isfinite(x) & np.isfinite(y)
                kept = st.Membership(members.experts, members.matrix[good])
                weights = st.expert_weights(kept, 500, spec.seed)
                found = st.interval(lambda w, a=x[good], b=y[good]: st.spearman(a, b, w), weights, domain=(-1.0, 1.0))  # type: ignore[misc]
                out.append(
                    {
                        "family": family.name,
                        "term": name,
                        "against": against,
                        "spearman": found.value,
                        "spearman_low": found.low,
                        "spearman_high": found.high,
                        "merges": int(good.sum()),
                        "tier": part["tier"].iloc[0],
                        "seed": spec.seed,
                    }
                )
    return pd.DataFrame(out)
