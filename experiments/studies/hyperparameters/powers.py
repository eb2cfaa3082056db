"""Whether a fitted exponent is the law's, and whether a formula is a power of its factor at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from experiments import statistics as st
from experiments.plots import pretty
from experiments.studies.hyperparameters.figures import label
from experiments.studies.hyperparameters.law import Law

WIDEST = 1.0
"""An interval that meets the law decides nothing where it is wider than this."""
STEEPEST, BENT = 5.0, 2.0
"""A formula is no power of its factor where its exponent is larger than the first, or where it grows by more than the
second from the first pair of levels to the last (and the interval of that growth leaves out 0)."""
EXPONENTIAL = "exponential, no power law"
LAW, CENTRE, EACH, MEASURED = (
    *("law", "formula, constants of the centre", "formula, constants of each level", "measured"),
)
NOTE = (
    "Verdicts on exponents: *agrees* where the interval meets the law's, *disagrees* where it does not, *undecided* "
    f"where it meets it and is wider than {WIDEST:g}, or is missing. A formula whose exponent is above {STEEPEST:g}, "
    f"or grows by more than {BENT:g} from the first two levels to the last two, is *{EXPONENTIAL}*: its number is a "
    "slope over these levels and nothing more. Added after results of size tiny had been looked at."
)


def power_verdict(found: st.Estimate, bend: st.Estimate, law: Law | None, formula: bool) -> str:
    """The verdict on an exponent: ``agrees``, ``disagrees``, ``undecided``, :data:`EXPONENTIAL`, or nothing where
    there is no law.

    Args:
        found: exponent with its interval.
        bend: how much the exponent grows from the first two levels to the last two.
        law: of the theory.
        formula: whether it is a formula's; what was measured is never called exponential.
    """
    if formula and (found.value > STEEPEST or (bend.low > 0 and bend.value > BENT)):
        return EXPONENTIAL
    if law is None:
        return ""
    if not np.isfinite([found.low, found.high]).all():
        return "undecided"
    slack = 1e-9  # a formula that follows the law exactly has an interval of no width
    if found.low > law.high + slack or found.high < law.low - slack:
        return "disagrees"
    return "undecided" if found.high - found.low > WIDEST else "agrees"


def exponent_lines(exponents: pd.DataFrame) -> list[str]:
    """A sentence for each network: which measured quantities follow the law over which factors, and which formulas."""
    if exponents.empty:
        return []
    found = []
    for network, part in exponents.groupby("architecture", sort=True):
        laws = {(row["factor"], row["quantity"]): row for row in part[part["source"] == LAW].to_dict("records")}
        said = [f"measured: {_by_verdict(part, MEASURED, laws, True)}"]
        each = part[(part["source"] == EACH) & (part["verdict"] != "")]
        if len(each):
            said.append(f"formulas with constants of each level: {_by_verdict(part, EACH, laws, False)}")
        blown = list(dict.fromkeys(part[part["verdict"] == EXPONENTIAL]["factor"]))
        if blown:
            factors = ", ".join(label(factor) for factor in blown)
            said.append(f"formulas with the centre's constants grow exponentially over {factors} (no power law)")
        found.append(f"Exponents against the law, {pretty(str(network))}; {'; '.join(said)}.")
    return found


def _by_verdict(part: pd.DataFrame, source: str, laws: Mapping[Any, Mapping[Any, Any]], numbers: bool) -> str:
    own = part[(part["source"] == source) & (part["verdict"] != "")]
    told = []
    for word in ("agrees", "disagrees", "undecided"):
        rows = own[own["verdict"] == word]
        parts = []
        for quantity, some in rows.groupby("quantity", sort=False):
            names = [_named(row, laws, numbers and word == "disagrees") for row in some.to_dict("records")]
            parts.append(f"{quantity} over {', '.join(names)}")
        told.append(f"{len(rows)} {word if len(rows) == 1 else word.removesuffix('s')}")
        if parts:
            told[-1] += f" ({'; '.join(parts)})"
    return ", ".join(told)


def _named(row: Mapping[Any, Any], laws: Mapping[Any, Mapping[Any, Any]], numbers: bool) -> str:
    if not numbers:
        return label(row["factor"])
    return f"{label(row['factor'])} {_range(row)} for {_law(laws[row['factor'], row['quantity']])}"


def _range(row: Mapping[Any, Any]) -> str:
    return f"{row['exponent']:.2f} [{row['exponent_low']:.2f}, {row['exponent_high']:.2f}]"


def _law(row: Mapping[Any, Any]) -> str:
    low, high = row["exponent_low"], row["exponent_high"]
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"


def exponent_table(exponents: pd.DataFrame, quantities: Sequence[str] = ("drift", "V")) -> pd.DataFrame:
    """Exponents that have a law, as a page shows them: one row per network, factor and quantity that is measured."""
    rows = []
    if exponents.empty:
        return pd.DataFrame()
    for (network, factor, quantity), part in exponents.groupby(["architecture", "factor", "quantity"], sort=False):
        by = {row["source"]: row for row in part.to_dict("records")}
        if quantity not in quantities or not {LAW, MEASURED} <= set(by):
            continue
        row = {"Network": pretty(str(network)), "Factor": label(str(factor)), "Quantity": quantity}
        row |= {"Law": _law(by[LAW]), "Measured": _range(by[MEASURED]), "Verdict": by[MEASURED]["verdict"]}
        for source, name in ((EACH, "Formula, each level"), (CENTRE, "Formula, centre")):
            own = by.get(source)
            row[name] = "–" if own is None else f"{_range(own)}: {own['verdict']}"
            if own is not None and own["verdict"] == EXPONENTIAL:
                row[name] = EXPONENTIAL
        rows.append(row | {"Seed": part["seed"].iloc[0]})
    return pd.DataFrame(rows)
