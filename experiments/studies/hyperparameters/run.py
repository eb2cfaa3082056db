"""The study, stage by stage; every stage goes on where it was stopped."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.combine.groups import Group, Member
from experiments.studies.engine import Engine
from experiments.studies.hyperparameters.designs import Drawn, draw, merge_all, merges_frame
from experiments.studies.hyperparameters.grids import (
    BaseShare,
    StudyGrid,
    merges_of,
    run_grids,
    shares,
    study_grids,
    write_grids,
)
from experiments.studies.hyperparameters.pricing import key_of, price, step_of, units_of
from experiments.studies.hyperparameters.spec import StudySpec
from experiments.studies.hyperparameters.work import Row, Watch, add_rows, read_rows, run_units
from theory.errors import MergeboundError

STAGES = ("grids", "merges", "constants", "predictions", "report")
BATCH = 8
"""Experts whose constants one unit measures."""


@dataclass(frozen=True)
class Place:
    """Where a study keeps what is finished.

    Attributes:
        out: folder of the report and its tables.
        work: folder of stores and rows; rows lie under the digest of the specification.
        root: of the data sets; default: what ``MERGEBOUND_DATA`` names.
    """

    out: Path
    work: Path
    root: str | Path | None = None

    @property
    def stores(self) -> Path:
        """Folder of the grids' stores."""
        return self.work / "stores"

    def rows(self, spec: StudySpec, name: str) -> Path:
        """A file of JSON lines."""
        return self.work / spec.digest() / f"{name}.jsonl"


@dataclass(frozen=True)
class Hooks:
    """Who is told what: a line of words, progress of grids and merges, units done of a stage."""

    say: Callable[[str], None] = lambda line: None
    grid: Callable[[Any], None] | None = None
    merges: Callable[[Any], None] | None = None
    units: Callable[[str], Watch | None] = lambda stage: None


def run_study(
    spec: StudySpec,
    place: Place,
    *,
    stages: Sequence[str] = STAGES,
    engine: Engine = Engine(),
    workers: int | None = None,
    hooks: Hooks = Hooks(),
    command: str = "",
) -> None:
    """Do what is missing of some stages, in order.

    Args:
        spec: the study.
        place: where it is kept.
        stages: of :data:`STAGES`; later ones need earlier ones.
        engine: where grids run.
        workers: processes at a time for merges, constants and predictions; default one per core.
        hooks: who is told.
        command: for the report.

    Raises:
        MergeboundError: an unknown stage, a stage whose predecessors are not finished, and what stages raise.
    """
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown:
        raise MergeboundError(f"--only {unknown[0]}: is no stage; choose from {', '.join(STAGES)}")
    count = max(1, workers or os.cpu_count() or 1)
    grids = study_grids(spec)
    write_grids(grids, place.work / "grids")
    if "grids" in stages:
        run_grids(grids, place.stores, root=place.root, engine=engine, say=hooks.say, watch=hooks.grid)
    if not set(stages) - {"grids"}:
        return
    drawn, recipes, last, parts = drawn_groups(spec, grids, place.stores)
    for part in parts:
        if not part.complete:
            hooks.say(f"{part.grid}: left out {part.architecture}, {len(part.finished)} of {part.runs} runs are done")
    if "merges" in stages:
        hooks.say(f"merging: {sum(len(one.groups) * len(one.methods) for one in drawn)} merges")
        merge_all(
            spec, drawn, place.stores, root=place.root, workers=count, device=engine.device, watch=hooks.merges
        )  # fmt: skip
    if "constants" in stages and spec.constants is not None:
        measure_all(spec, drawn, last, place, count, hooks)
    if "predictions" in stages:
        predict_all(spec, drawn, last, place, count, hooks)
    if "report" in stages:
        from experiments.studies.hyperparameters.report import write_report

        write_report(spec, place, grids, drawn, recipes, parts, command=command)


def drawn_groups(
    spec: StudySpec, grids: Sequence[StudyGrid], stores: Path
) -> tuple[tuple[Drawn, ...], pd.DataFrame, dict[str, int], tuple[BaseShare, ...]]:
    """All groups of the bases whose runs a grid has, one row of hyperparameters for each checkpoint, every run's last
    checkpoint, and how far every grid is for every base.

    Raises:
        MergeboundError: no grid has all the runs of a base.
    """
    from experiments.combine.groups import grid_table
    from experiments.store import Store

    drawn: list[Drawn] = []
    tables = []
    parts: list[BaseShare] = []
    for grid in grids:
        own = shares(grid, stores / grid.name)
        parts += own
        finished: set[str] = set().union(*(share.finished for share in own if share.complete))
        if not finished:
            continue
        with Store.open(stores / grid.name, "r") as store:
            frame = store.frame()
        frame = frame[frame["digest"].isin(finished)].reset_index(drop=True)
        drawn += draw(spec, grid, frame)
        table = grid_table(frame)
        table = table.assign(expert=[f"{d}@{s}" for d, s in zip(table["digest"], table["step"], strict=True)])
        table.attrs = {}
        tables.append(table)
    if not drawn:
        raise MergeboundError(f"{stores}: no grid is finished for any base; run the stage `grids` first")
    recipes = pd.concat(tables, ignore_index=True)
    last = {str(d): int(s) for d, s in recipes.groupby("digest")["step"].max().items()}
    return tuple(drawn), recipes, last, tuple(parts)


def alphas_of(one: Drawn, group: Group) -> tuple[float, ...]:
    """Common coefficients by which a group is merged."""
    size = len(group.members)
    return tuple(
        1.0 / size if method.name == "average" else float(method.settings["coefficient"]) for method in one.methods
    )


def measure_all(
    spec: StudySpec, drawn: Sequence[Drawn], last: dict[str, int], place: Place, workers: int, hooks: Hooks
) -> None:
    """Constants of every expert that is in a group."""
    from experiments.studies.hyperparameters.constants import ConstantsUnit, measure_constants

    assert spec.constants is not None
    path = place.rows(spec, "constants")
    there = {str(row["expert"]) for row in read_rows(path)}
    wanted: dict[tuple[str, str, int | None], dict[Member, None]] = {}
    for one in drawn:
        for group in one.groups:
            for member in group.members:
                if member.name not in there:
                    step = step_of([member], last)
                    wanted.setdefault((one.grid, group.base, step), {})[member] = None
    units = []
    for (grid, _, step), members in wanted.items():
        runs = sorted(members)
        for start in range(0, len(runs), BATCH):
            part = tuple(member.run for member in runs[start : start + BATCH])
            store, root = str(place.stores / grid), _text(place.root)
            units.append(ConstantsUnit(store, part, step, spec.calibration_images, spec.seed, spec.constants, root))
    hooks.say(f"constants: {sum(len(u.runs) for u in units)} experts")
    run_units(units, measure_constants, path, workers=workers, watch=hooks.units("constants"))


def predict_all(
    spec: StudySpec, drawn: Sequence[Drawn], last: dict[str, int], place: Place, workers: int, hooks: Hooks
) -> None:
    """Predictions in function space, then bounds, of every merge."""
    path = place.rows(spec, "predictions")
    there = {str(row["key"]) for row in read_rows(path)}
    units = []
    for grid in dict.fromkeys(one.grid for one in drawn):
        missing: dict[str, tuple[Group, tuple[float, ...]]] = {}
        for one in (o for o in drawn if o.grid == grid):
            for group in one.groups:
                known = missing.get(group.digest, (group, ()))
                new = [a for a in alphas_of(one, group) if key_of(group.digest, a) not in there]
                alphas = tuple(dict.fromkeys((*known[1], *new)))
                if alphas:
                    missing[group.digest] = (known[0], alphas)
        units += units_of(
            list(missing.values()), store=str(place.stores / grid), images=spec.calibration_images, seed=spec.seed,
            predictors=spec.predictors, last=last, root=_text(place.root),
        )  # fmt: skip
    hooks.say(f"predictions: {sum(len(w.alphas) for u in units for w in u.groups)} merges")
    run_units(units, price, path, workers=workers, watch=hooks.units("predictions"))
    if spec.constants is not None:
        bound_all(spec, drawn, place, hooks)


def bound_all(spec: StudySpec, drawn: Sequence[Drawn], place: Place, hooks: Hooks) -> None:
    """Bounds of every merge whose experts' constants are known."""
    from experiments.studies.hyperparameters.bounds import bound_rows
    from experiments.studies.hyperparameters.constants import named

    path = place.rows(spec, "bounds")
    there = {str(row["key"]) for row in read_rows(path)}
    experts = named(read_rows(place.rows(spec, "constants")))
    V = {str(row["key"]): float(row["V"]) for row in read_rows(place.rows(spec, "predictions"))}
    wanted: dict[str, tuple[Group, float]] = {}
    for one in drawn:
        for group in one.groups:
            for alpha in alphas_of(one, group):
                key = key_of(group.digest, alpha)
                if key not in there and key in V and all(m.name in experts for m in group.members):
                    wanted[key] = (group, alpha)
    watch = hooks.units("bounds") or (lambda done, total: None)
    rows: list[Row] = []
    for done, (key, (group, alpha)) in enumerate(wanted.items()):
        members = [member.name for member in group.members]
        rows += bound_rows(key, members, alpha, experts, V[key], spec.shared_samples, spec.seed)
        if len(rows) >= 64 or done + 1 == len(wanted):
            add_rows(path, rows)
            rows = []
        watch(done + 1, len(wanted))


def _text(root: str | Path | None) -> str | None:
    return None if root is None else str(root)


def count_study(spec: StudySpec) -> list[Row]:
    """What a study does, before anything runs: one row per grid."""
    rows: list[Row] = []
    for grid in study_grids(spec):
        runs = grid.runs()
        bases = len({run.base.model_dump_json() for run in runs})
        checkpoints = sum(len(run.checkpoints) for run in runs)
        merges = bases * merges_of(spec, grid)
        rows.append({"grid": grid.name, "runs": len(runs), "checkpoints": checkpoints, "merges": merges})
    return rows


__all__ = [
    "STAGES",
    "Hooks",
    "Place",
    "bound_all",
    "count_study",
    "drawn_groups",
    "merges_frame",
    "merges_of",
    "run_study",
]
