"""One table of everything: each measured merge beside its predictions, its bounds, and what they are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from experiments.measure.predictors.calibration import fit_combination
from experiments.studies.hyperparameters.bounds import TERMS
from experiments.studies.hyperparameters.pricing import key_of
from experiments.studies.hyperparameters.spec import StudySpec
from experiments.studies.hyperparameters.work import Row
from theory.errors import MergeboundError

MEASURED = ("loss", "accuracy", "error", "expert_loss", "expert_accuracy", "merging_cost", "normalised")
KEPT = (
    *("grid", "architecture", "base_digest", "factor", "level", "seed", "size", "tasks", "experts", "group", "label"),
    *("alpha", "n", "half"),
)


def joined(merges: pd.DataFrame, prices: Sequence[Row], bounds: Sequence[Row], spec: StudySpec) -> pd.DataFrame:
    """One row per merge and factor.

    Columns: what was drawn (``grid`` to ``alpha``; ``half`` by the parity of the group's seed), measurements
    (``loss`` in nats, ``accuracy``, ``error`` = 1 - accuracy and at least half an image, ...), predictions
    ``pred_<name>`` (and ``pred_accuracy_<name>``), ``pred_calibrated`` (fitted on groups of the other half), measured
    ``V`` and ``drift``, ``bound_recipe`` and ``bound_measured_drift`` with ``_low`` and ``_high``, and from the recipe
    the square roots of the terms and what Theorems 2 to 4 give (``epsilon``, ``drift_bound``, ``V_bound``).
    """
    if not len(merges):
        return merges
    table = merges.copy()
    table["half"] = np.where(table["seed"].astype(int) % 2 == 0, "A", "B")
    table["error"] = np.maximum(1.0 - table["accuracy"], 0.5 / table["n"])
    table["key"] = [key_of(g, a) for g, a in zip(table["group"], table["alpha"], strict=True)]
    priced = {str(row["key"]): _price_columns(row) for row in prices}
    bounded: dict[str, dict[str, object]] = {}
    for row in bounds:
        bounded.setdefault(str(row["key"]), {}).update(_bound_columns(row))
    more = pd.DataFrame([{**priced.get(k, {}), **bounded.get(k, {})} for k in table["key"]], index=table.index)
    first = [name for name in (*KEPT, *MEASURED, "key") if name in table.columns]
    table = pd.concat([table[first], more], axis=1)
    table["pred_calibrated"] = calibrated(table, spec)
    return table.reset_index(drop=True)


def _price_columns(row: Row) -> dict[str, object]:
    found: dict[str, object] = {"V": row["V"], "drift": row["drift"]}
    for name, numbers in row["predictions"].items():
        found |= {f"pred_{name}": numbers["risk"], f"pred_accuracy_{name}": numbers["accuracy"]}
        found |= {f"pred_{name}_low": numbers["low"], f"pred_{name}_high": numbers["high"]}
    return found


def _bound_columns(row: Row) -> dict[str, object]:
    source = str(row["source"])
    found: dict[str, object] = {f"why_{source}": row.get("why", "")}
    names = {"bound": f"bound_{source}", "bound_low": f"bound_{source}_low", "bound_high": f"bound_{source}_high"}
    found |= {new: row[old] for old, new in names.items() if old in row}
    if source == "recipe" and "bound" in row:
        found |= {name: row.get(name) for name in (*TERMS, "epsilon", "epsilon_form", "V_bound")}
        found |= {"drift_bound": row.get("drift"), "drift_form": row.get("drift_form")}
    return found


def calibrated(table: pd.DataFrame, spec: StudySpec) -> pd.Series:
    """A place between two predictions with a constant factor, fitted by network on groups of one half, for the other.

    Halves are of the *groups* (by the parity of their seeds).  A merge that both halves drew is never fitted on: no
    row is judged by a fit that saw its merge.  Groups of both halves share experts, since every task has one expert per
    recipe: what is judged is transfer to other groups, not to other experts.
    """
    found = pd.Series(np.nan, index=table.index)
    columns = [f"pred_{name}" for name in spec.calibrated]
    if not set(columns) <= set(table.columns):
        return found
    usable = np.asarray(np.isfinite(table[[*columns, "loss"]].to_numpy(dtype=float)).all(axis=1))
    for _, part in table.loc[usable].groupby("base_digest", sort=True):
        for half in ("A", "B"):
            judged = part.loc[part["half"] == half]
            fitting = part.loc[(part["half"] != half) & ~part["key"].isin(judged["key"])].drop_duplicates("key")
            if not len(judged):
                continue
            try:
                fit = fit_combination(fitting, columns, "loss", constant=True)
            except MergeboundError:
                continue
            found.loc[judged.index] = fit.predict(judged)
    return found


def shared_between_halves(table: pd.DataFrame) -> pd.DataFrame:
    """What both halves of the groups have in common, one row per network: ``experts`` in both of ``experts_all``, and
    ``merges`` in both of ``merges_all``."""
    rows = []
    for architecture, part in table.groupby("architecture", sort=True):
        about: dict[str, object] = {"architecture": architecture}
        for name, own in (("experts", part["experts"].astype(str).str.split(";")), ("merges", part["key"])):
            sets = [set(own[part["half"] == half].explode()) for half in ("A", "B")]
            about |= {name: len(sets[0] & sets[1]), f"{name}_all": len(sets[0] | sets[1])}
        rows.append(about)
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Curve:
    """A quantity over the levels of a factor.

    Attributes:
        levels: in order, L of them.
        values: of matched draws, (G, L); NaN where one was not measured.
        tasks: of every draw at every level, (G, L) lists; as long as its group is large.
        groups: names of the merges, (G, L): draws that drew the same merge have the same name.
    """

    levels: tuple[object, ...]
    values: np.ndarray
    tasks: tuple[tuple[tuple[str, ...], ...], ...]
    groups: np.ndarray

    @property
    def distinct(self) -> tuple[int, ...]:
        """Different merges at every level, (L,)."""
        columns = zip(self.groups.T, np.isfinite(self.values).T, strict=True)
        return tuple(len(set(names[there])) for names, there in columns)


def curves(table: pd.DataFrame, factor: str, quantity: str, levels: Sequence[object]) -> Mapping[str, Curve]:
    """The curve of a quantity over a factor, by the digest of the base.

    Levels that were not measured are left out; a draw that lacks one has NaN there.
    """
    found = {}
    rows = table[table["factor"] == factor]
    for base, part in rows.groupby("base_digest", sort=True):
        there = [level for level in levels if (part["level"] == level).any()]

        def wide(column: str, own: pd.DataFrame = part, at: list[object] = there) -> pd.DataFrame:
            made: pd.DataFrame = own.pivot_table(
                index="seed", columns="level", values=column, aggfunc="first", dropna=False
            )
            return made.reindex(columns=at)

        tasks = tuple(
            tuple(tuple(str(text).split(";")) if isinstance(text, str) else () for text in row)
            for row in wide("tasks").to_numpy(dtype=object)
        )
        names = np.asarray(wide("key").fillna("").to_numpy(dtype=object), dtype=str)
        found[str(base)] = Curve(tuple(there), wide(quantity).to_numpy(dtype=float), tasks, names)
    return found
