"""What a bound needs, each item with a verdict that is printed in every report."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["holds", "violated", "unknown"]
Tier = Literal["certified", "estimated", "calibrated"]


@dataclass(frozen=True)
class Assumption:
    """One assumption of a bound and what is known about it.

    ``name`` is the label of theory section 1 (``A1`` ... ``A4``) or of the theorem that asks for it; ``statement`` says
    what must be true; ``why`` says where the verdict comes from.  ``covered``: it is violated, and the bound was
    widened so that it holds all the same.
    """

    name: str
    statement: str
    verdict: Verdict
    why: str
    covered: bool = False


def judge(name: str, statement: str, claim: bool | None, *, holds: str, violated: str, unknown: str) -> Assumption:
    """Turn a claim (true, false, not stated) into an :class:`Assumption` with the matching reason."""
    if claim is None:
        return Assumption(name, statement, "unknown", unknown)
    return Assumption(name, statement, "holds" if claim else "violated", holds if claim else violated)


def tier_of(assumptions: Iterable[Assumption], measured: Iterable[str]) -> Tier:
    """``certified`` only when no measured constant was used and every assumption holds (theory section 8, tiers)."""
    clean = all(item.verdict == "holds" or item.covered for item in assumptions)
    return "certified" if clean and not tuple(measured) else "estimated"


def run_as_stated(measured: Iterable[str]) -> list[Assumption]:
    """What was run (``"expert: field"``) and is only measured or guessed, as assumptions that nobody checked.

    >>> run_as_stated(["a: batch_size", "a: steps"])[0].statement
    'batch_size, steps of a are what was run'
    """
    by_owner: dict[str, list[str]] = {}
    for entry in measured:
        owner, _, name = entry.rpartition(": ")
        by_owner.setdefault(owner, []).append(name)
    return [
        Assumption(
            "run",
            f"{', '.join(names)} of {owner} are what was run",
            "unknown",
            "measured or guessed, not recorded (listed in measured); a batch size from files of a run is a guess where "
            "they do not have the number of devices or of accumulated batches",
        )
        for owner, names in by_owner.items()
    ]
