"""What the theory says of each finding, beside what its own terms did: supported, contradicted, mixed, or silent.

The claims (:data:`SAYS`, :data:`CLAIMS`) follow from the theorems and are the same whatever comes out; everything else
is read off the table of the account.  A claim names terms and the way each must go for the theory to give the finding:
where they go the other way the theory, as it is claimed here, is no account of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from experiments.studies.scale.effects import slope_weights
from experiments.studies.scale.spec import FamilySpec, ScaleSpec

SAYS = {
    "1 stronger base": (
        "The master bound starts from the experts' own risk and adds dispersion in units of curvature; the prediction "
        "adds the gap of linearisation. A stronger base should act through smaller drift or smaller curved dispersion."
    ),
    "2 larger model": (
        "No statement holds the size itself: it enters through drift, curvature and the gap. The "
        "account is whichever of these falls with size."
    ),
    "3 more experts": (
        "Silent: every theorem and prediction is about tasks of the merged experts. Nothing is said of frozen features "
        "on held-out tasks. On held-in tasks dispersion grows as 1 - 1/N: their loss should grow with N."
    ),
    "4 beats multitask": (
        "Silent: the multitask model is trained on all tasks at once and no bound of this project covers it."
    ),
    "5 methods converge": (
        "Partly: methods differ by where M lies among the experts, and the loss sees that through curved dispersion. "
        "Where it vanishes all methods must agree; how fast it does is not predicted."
    ),
}
VERDICTS = ("supported", "contradicted", "mixed", "undecided", "silent", "not measured")
CHANCE = 0.05
"""Share of the terms whose 95 % interval leaves zero out where nothing moves."""


@dataclass(frozen=True)
class Claim:
    """What of a finding can be read off the account.

    Attributes:
        factor: of the account: base, size or number.
        terms: name and direction (+1 grows, -1 falls) of every term that the theory names.
        about: what it is about, where that is not the finding itself.
    """

    factor: str
    terms: Mapping[str, int] = field(default_factory=dict)
    about: str = ""


CLAIMS: dict[str, Claim | None] = {
    "1 stronger base": Claim("base", {"drift": -1, "curved": -1}),
    "2 larger model": Claim("size", {"drift": -1, "curvature": -1, "gap": -1}),
    "3 more experts": Claim("number", {"dispersion": 1, "average_risk": 1}, "held-in tasks"),
    "4 beats multitask": None,
    "5 methods converge": Claim("size", {"curved": -1}),
}
"""The second sentence of every entry of :data:`SAYS`, as terms; None where the theory says nothing at all."""


def says_table(account: pd.DataFrame, findings: pd.DataFrame, spec: ScaleSpec) -> pd.DataFrame:
    """What the theory says of each finding, and what its terms did, family by family.

    Args:
        account: as :func:`experiments.studies.scale.account.account_table` gives it.
        findings: as :func:`experiments.studies.scale.findings.findings_table` gives it; may be empty.
        spec: the study.

    Returns:
        ``finding``, ``scope``, ``theory``, ``verdict`` (of the theory's account: supported, contradicted, mixed,
        undecided where no named term moved beyond its interval, silent, not measured), ``measured`` (a sentence),
        ``as_it_says``, ``against_it``, ``not_moved`` (terms), ``terms`` and ``moving`` (of this comparison, named or
        not), ``by_chance`` (how many of them would move if none did), ``finding_here`` (its measured verdict),
        ``tier``, ``seed``.
    """
    rows: list[dict[str, Any]] = []
    for finding, claim in CLAIMS.items():
        about: dict[str, Any] = {"finding": finding, "theory": SAYS[finding]}
        if claim is None or claim.about:
            nothing = {"scope": "all", "verdict": "silent", "measured": "", "finding_here": ""}
            rows.append({**about, **nothing})
        for family in spec.families if claim is not None else ():
            assert claim is not None
            found = _judge(account, claim, family, spec)
            here = _measured(findings, finding, family.name) if not claim.about else ""
            rows.append({**about, **found, "finding_here": here})
    return pd.DataFrame(rows).assign(tier="estimated", seed=spec.seed)


def _judge(account: pd.DataFrame, claim: Claim, family: FamilySpec, spec: ScaleSpec) -> dict[str, Any]:
    bases = spec.bases_of(family)
    compared = f"{bases[-1]} against {bases[0]}" if claim.factor == "base" else f"{bases[-1]} base"
    scope = f"{family.name}: {compared}"
    named = f"{scope}, {claim.about}" if claim.about else scope
    if account.empty:
        return {"scope": named, "verdict": "not measured", "measured": ""}
    own = account[(account["factor"] == claim.factor) & (account["scope"] == scope)]
    known = own[np.isfinite(own["change_low"]) & np.isfinite(own["change_high"])]
    wanted = known[known["term"].isin(list(claim.terms))].to_dict("records")
    groups: dict[str, list[dict[str, Any]]] = {"as_it_says": [], "against_it": [], "not_moved": []}
    for row in wanted:
        moved = {"grows": 1, "falls": -1}.get(row["moves"], 0)
        key = "not_moved" if moved == 0 else "as_it_says" if moved == claim.terms[row["term"]] else "against_it"
        groups[key].append(dict(row))
    moving = int((known["moves"] != "undecided").sum())
    words = [
        f"{label}: {', '.join(map(_change, rows))}"
        for label, rows in zip(("as it says", "against it", "not beyond the interval"), groups.values(), strict=True)
        if rows
    ]
    if claim.factor == "number" and "dispersion" in claim.terms:
        words.append(f"1 - 1/N itself: {one_less_one_over(spec.experts):+.3g}")
    chance = CHANCE * len(known)
    counted = f"of all {len(known)} terms here {moving} move, {chance:.2g} would by chance"
    return {
        "scope": named,
        "verdict": account_verdict(len(groups["as_it_says"]), len(groups["against_it"]), len(wanted)),
        "measured": f"{'; '.join([*words, counted])}",
        **{key: " ".join(row["term"] for row in rows) for key, rows in groups.items()},
        "terms": len(known),
        "moving": moving,
        "by_chance": chance,
    }


def account_verdict(with_it: int, against: int, named: int) -> str:
    """One word for how many of the named terms moved as the theory says, and how many against it.

    >>> account_verdict(2, 0, 3), account_verdict(0, 1, 3), account_verdict(1, 1, 3), account_verdict(0, 0, 3)
    ('supported', 'contradicted', 'mixed', 'undecided')
    """
    if not named:
        return "not measured"
    if with_it and against:
        return "mixed"
    return "supported" if with_it else "contradicted" if against else "undecided"


def one_less_one_over(experts: tuple[int, ...]) -> float:
    """Slope of log10(1 - 1/N) against log2 N: how dispersion grows where task vectors are orthogonal and equally long.

    >>> round(one_less_one_over((2, 4)), 4) == round(float(np.log10(1.5)), 4)
    True
    """
    n = np.array(experts, dtype=float)
    return float(np.dot(slope_weights([float(v) for v in np.log2(n)]), np.log10(1.0 - 1.0 / n)))


def _change(row: Mapping[str, Any]) -> str:
    return f"{row['term']} {row['change']:+.3g} [{row['change_low']:+.3g}, {row['change_high']:+.3g}]"


def _measured(findings: pd.DataFrame, finding: str, family: str) -> str:
    if findings.empty:
        return ""
    own = findings[
        (findings["finding"] == finding)
        & findings["scope"].str.startswith(f"{family}:")
        & findings["papers_own"].isin(["yes", "other family"])
    ]
    return str(own["verdict"].iloc[0]) if len(own) else ""


def moving_words(account: pd.DataFrame, spec: ScaleSpec) -> str:
    """How many terms of the account move, and how many would where none does."""
    if account.empty:
        return ""
    known = account[np.isfinite(account["change_low"]) & np.isfinite(account["change_high"])]
    moving = int((known["moves"] != "undecided").sum())
    return (
        f"{moving} of {len(known)} changes leave zero out; {CHANCE * len(known):.1f} would by chance if nothing moved "
        f"(95 % intervals, not corrected for their number; they are not independent, and {len(spec.held_in)} tasks "
        "make rough intervals)."
    )


def theory_words(says: pd.DataFrame) -> str:
    """The verdicts of the account in one sentence."""
    parts = []
    for finding, part in says.groupby("finding", sort=False):
        each = [
            str(r["verdict"]) if r["scope"] == "all" else f"{r['verdict']} ({str(r['scope']).partition(':')[0]}"
            f"{', held in' if 'held-in' in str(r['scope']) else ''})"
            for r in part.to_dict("records")
        ]  # fmt: skip
        parts.append(f"{str(finding)[0]} {', '.join(each)}")
    return f"The theory's account by finding: {'; '.join(parts)}."


def theory_lines(says: pd.DataFrame) -> list[str]:
    """For each finding, what the theory says and what its terms did."""
    lines = []
    for finding, part in says.groupby("finding", sort=False):
        words = [f"{finding}: {part['theory'].iloc[0]}"]
        for row in part[part["scope"] != "all"].to_dict("records"):
            here = f" Verdict of the finding itself: {row['finding_here']}." if row["finding_here"] else ""
            about = f" ({row['measured']})" if row["measured"] else ""
            words.append(f"**{row['scope']}: {row['verdict']}**{about}.{here}")
        lines.append(" ".join(words))
    return lines
