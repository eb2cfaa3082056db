"""How the multitask models were trained, for a reader: what ended each rate, and whether the choice lies at an edge."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from experiments.studies.scale.multitask import BUDGET, PATIENCE, rounds, why_stopped
from experiments.studies.scale.spec import ScaleSpec

_CELL = ["family", "architecture", "base"]


def with_stops(training: pd.DataFrame, spec: ScaleSpec) -> pd.DataFrame:
    """Every measurement with ``stopped``: what ended the training of its rate (patience, budget, diverged, fixed).

    It follows from the losses and the specification's patience, so that tables of older runs have it as well.
    """
    if training.empty or spec.multitask is None:
        return training
    stopped = pd.Series("fixed", index=training.index)
    mine = training[training["model"] == "optimised"]
    for _, part in mine.groupby([*_CELL, "rate"], sort=False):
        losses = part.sort_values("step")["validation_loss"].to_list()
        stopped[part.index] = why_stopped(losses, spec.multitask.patience)
    return training.assign(stopped=stopped)


def choices(training: pd.DataFrame, spec: ScaleSpec) -> pd.DataFrame:
    """The optimised model of every cell.

    Args:
        training: as :func:`with_stops` gives it.
        spec: the study.

    Returns:
        ``family``, ``architecture``, ``base``, ``chosen_rate``, ``rate_at`` (``top``, ``bottom`` or ``inside`` of the
        rates that were tried), ``chosen_step``, ``budget_steps``, ``stopped`` (of the chosen rate), ``validation_loss``
        (nats), ``steps_spent`` (over all rates), ``decided_by`` (``early stopping``: the chosen rate was stopped by
        patience; ``budget``), ``tier``.
    """
    rows: list[dict[str, Any]] = []
    if training.empty or spec.multitask is None:
        return pd.DataFrame()
    steps = {family.name: int(family.recipe["steps"]) for family in spec.families}
    for key, part in training[training["model"] == "optimised"].groupby(_CELL, sort=False):
        about = dict(zip(_CELL, key, strict=True))
        rate = float(part["chosen_rate"].iloc[0])
        tried = sorted(set(part["rate"]))
        chosen = part[np.isclose(part["rate"], rate) & (part["step"] == part["chosen_step"])].iloc[0]
        edge = "top" if np.isclose(rate, tried[-1]) else "bottom" if np.isclose(rate, tried[0]) else "inside"
        rows.append(
            {
                **about,
                "chosen_rate": rate,
                "rate_at": edge,
                "chosen_step": int(chosen["step"]),
                "budget_steps": rounds(spec.multitask, steps[str(about["family"])]) * len(spec.held_in),
                "stopped": chosen["stopped"],
                "validation_loss": float(chosen["validation_loss"]),
                "steps_spent": int(chosen["steps_spent"]),
                "decided_by": "early stopping" if chosen["stopped"] == PATIENCE else BUDGET,
                "tier": "measured",
            }
        )
    return pd.DataFrame(rows)


def say_choices(chosen: pd.DataFrame) -> str:
    """In a sentence: how far the optimised multitask model is optimised."""
    if chosen.empty:
        return ""
    early = int((chosen["stopped"] == PATIENCE).sum())
    last = int((chosen["chosen_step"] == chosen["budget_steps"]).sum())
    top, bottom = (int((chosen["rate_at"] == edge).sum()) for edge in ("top", "bottom"))
    words = (
        f"Optimised multitask: early stopping ended the chosen rate in {early} of {len(chosen)} networks; in {last} "
        f"the last step of the budget was chosen; the chosen rate is the highest that was tried in {top} and the "
        f"lowest in {bottom}."
    )
    if last or top or bottom:
        words += " Where a choice lies at such an edge, a longer budget or other rates might do better still."
    return words
