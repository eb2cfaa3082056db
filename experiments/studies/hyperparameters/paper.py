"""What the paper's theory says that every factor does to the merged loss, beside what was measured.

The directions are those of the statements of arXiv 2601.21690 (its abstract and Theorem 2; this project's
``theory`` package restates them): they were written down from the statements, not from its plots, of which no numbers
were at hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

from experiments.studies.hyperparameters.trends import Kind

Row = dict[str, Any]


@dataclass(frozen=True)
class Claim:
    """A direction of the merged loss along a factor that grows, and where it is said."""

    direction: Kind
    why: str


CLAIMS: dict[str, Claim] = {
    "learning_rate": Claim(
        "minimum", "a trade-off: the training error falls, drift and instability grow with the learning rate"
    ),
    "step": Claim("minimum", "the same trade-off; experts trained for too long make merges collapse"),
    "batch_size": Claim("falls", "less gradient noise: Gamma and the noise in drift fall like 1/b"),
    "data_share": Claim("falls", "stability: one sample of more matters less, 1/n"),
    "experts": Claim("rises", "heterogeneity: the dispersion of the task vectors grows like 1 - 1/N"),
    "coefficient": Claim("minimum", "task arithmetic as a weighted sum: too little of every expert against too much"),
}
"""Momentum, weight decay and sampling are no factors of the paper's theorems."""


def against_paper(verdicts: pd.DataFrame) -> pd.DataFrame:
    """One row per network and factor: the paper's direction, ours with its exponent, and a verdict.

    ``agrees``, ``disagrees``, ``undecided`` as everywhere; ``one side``: the claim is a minimum, and the levels of this
    study lie on one side of it (the loss falls or rises throughout), which neither shows nor refutes it; ``no claim``.
    """
    rows: list[Row] = []
    for row in verdicts.drop_duplicates(["architecture", "factor"]).to_dict("records"):
        claim = CLAIMS.get(str(row["factor"]))
        rows.append(
            {
                "architecture": row["architecture"],
                "factor": row["factor"],
                "paper": "" if claim is None else claim.direction,
                "why": "" if claim is None else claim.why,
                "measured": row["measured"],
                "measured_exponent": row["measured_exponent"],
                "measured_exponent_low": row["measured_exponent_low"],
                "measured_exponent_high": row["measured_exponent_high"],
                "verdict": "no claim" if claim is None else compare(claim.direction, row["measured"]),
                "tier": "measured",
                "groups": row["groups"],
                "seed": row["seed"],
            }
        )
    return pd.DataFrame(rows)


def compare(claimed: Kind, measured: Kind) -> str:
    """The verdict of :func:`against_paper` on a claim."""
    if measured == "undecided":
        return "undecided"
    if claimed == measured:
        return "agrees"
    return "one side" if claimed == "minimum" and measured in ("falls", "rises") else "disagrees"
