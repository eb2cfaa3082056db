"""Grids of the study: one factor at a time around a centre, and recipes of their own; run by the engines of grids."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from experiments.atomic import write_atomically
from experiments.grid.expand import expand
from experiments.grid.run_spec import RunSpec
from experiments.grid.spec import GridSpec
from experiments.grid.yaml_source import read_grid
from experiments.studies.engine import Engine, run_store
from experiments.studies.hyperparameters.spec import HYPERPARAMETERS, StudySpec
from theory.errors import MergeboundError

Role = Literal["factors", "joint", "both"]
Say = Callable[[str], None]


@dataclass(frozen=True)
class StudyGrid:
    """A grid and what its experts are for: one factor at a time, recipes of their own, or both."""

    name: str
    spec: GridSpec
    role: Role
    parts: tuple[GridSpec, ...] = ()

    def runs(self) -> tuple[RunSpec, ...]:
        """The runs of ``spec``; those of its ``parts``, each once, where it has some (which is much faster)."""
        found: dict[str, RunSpec] = {}
        for part in self.parts or (self.spec,):
            found |= {run.model_dump_json(): run for run in expand(part)}
        return tuple(found.values())


def study_grids(spec: StudySpec) -> tuple[StudyGrid, ...]:
    """The grids of a study, in order: those that it names, or one around the centre and one of joint recipes.

    Raises:
        MergeboundError: as grids raise; a grid with too few tasks for the groups.
    """
    if spec.grids:
        role: Role = "both" if spec.heterogeneous is not None else "factors"
        found = [StudyGrid(name, read_grid(name).spec, role) for name in spec.grids]
        for grid in found:
            spec.enough_tasks(grid.spec.tasks)
        return tuple(found)
    found = [StudyGrid("factors", factor_grid(spec), "factors", factor_parts(spec))]
    if spec.heterogeneous is not None:
        found.append(StudyGrid("joint", joint_grid(spec), "joint"))
    return tuple(found)


def factor_grid(spec: StudySpec) -> GridSpec:
    """One factor at a time: the product of all levels without recipes that leave the centre in two factors."""
    content: dict[str, Any] = {"name": f"{spec.name}-factors", **_common(spec), "steps": spec.centre.steps}
    away: dict[str, list[Any]] = {}
    for name in HYPERPARAMETERS:
        centre, levels = getattr(spec.centre, name), list(spec.levels.of(name))
        content[name] = levels or centre
        if levels:
            away[name] = [level for level in levels if level != centre]
    content["exclude"] = [
        {one: away[one], other: away[other]} for k, one in enumerate(away) for other in list(away)[k + 1 :]
    ]
    return GridSpec.model_validate(content)


def factor_parts(spec: StudySpec) -> tuple[GridSpec, ...]:
    """The same runs, one grid for each factor."""
    centre = {name: getattr(spec.centre, name) for name in HYPERPARAMETERS} | {"steps": spec.centre.steps}
    common = {"name": f"{spec.name}-factors", **_common(spec), **centre}
    one_each = [common | {name: list(spec.levels.of(name))} for name in HYPERPARAMETERS if spec.levels.of(name)]
    return tuple(GridSpec.model_validate(content) for content in one_each or [common])


def joint_grid(spec: StudySpec) -> GridSpec:
    """Recipes that vary in everything at once: points of a scrambled Sobol sequence; what it leaves open is at the
    centre."""
    assert spec.heterogeneous is not None
    axes = dict(spec.heterogeneous.axes)
    held = {name: getattr(spec.centre, name) for name in (*HYPERPARAMETERS, "steps") if name not in axes}
    joint = {"count": spec.heterogeneous.count, "axes": axes}
    content = {"name": f"{spec.name}-joint", **_common(spec), **held, "sobol": [joint], "draw_seed": spec.seed}
    return GridSpec.model_validate(content)


def _common(spec: StudySpec) -> dict[str, Any]:
    every = spec.checkpoint_every
    return {"tasks": list(spec.tasks), "base": spec.base} | ({} if every is None else {"checkpoints": {"every": every}})


def write_grids(grids: tuple[StudyGrid, ...], folder: Path) -> tuple[Path, ...]:
    """Every grid as a page of YAML below ``folder``, for `mergebound grid plan` and the other commands of grids."""
    paths = []
    for grid in grids:
        text = yaml.safe_dump(json.loads(json.dumps(grid.spec.content())), sort_keys=False)
        paths.append(write_atomically(folder / f"{grid.name}.yaml", text.encode()))
    return tuple(paths)


def run_grids(
    grids: tuple[StudyGrid, ...],
    stores: Path,
    *,
    root: str | Path | None = None,
    engine: Engine = Engine(),
    say: Say | None = None,
    watch: Callable[[Any], None] | None = None,
) -> None:
    """Do what is missing of every grid, each in its own store below ``stores``.

    Raises:
        MergeboundError: what preparing and engines raise, or cohorts that were given up (the others are stored).
    """
    from experiments.engines.prepare import prepare, tidy
    from experiments.finetune.cohort.planner import machine
    from experiments.store import Store

    tell = say or (lambda line: None)
    for grid in grids:
        folder = stores / grid.name
        if complete(grid, folder):
            continue
        runs = grid.runs()
        meta: dict[str, Any] = {
            "grid": grid.spec.content(),
            "digest": grid.spec.digest(),
            "source": f"{grid.name}.yaml",
        }
        meta |= {"limit_runs": None, "device": engine.device}
        prepare(folder, runs, meta, root=root, device=engine.device, download=engine.download, report=tell)
        with Store.open(folder, "r") as kept:
            plan = kept.plan()
        if engine.name == "local" and plan is not None and plan.machine not in ("", machine(engine.device)):
            tell(f"{grid.name}: its plan was made on another machine; the last bits of runs may differ")
        tell(f"{grid.name}: {len(runs)} runs")
        outcome = run_store(folder, root, engine, watch)
        if not outcome.complete:
            first = next(iter(outcome.failed.items()), ("", "stopped"))
            raise MergeboundError(
                f"{folder}: {outcome.total - outcome.done} of {outcome.total} runs are missing (cohort {first[0]}: "
                f"{first[1]}); run the same command again"
            )
        tidy(folder)


def merges_of(spec: StudySpec, grid: StudyGrid) -> int:
    """Merges of a grid for each of its bases."""
    merges = 0
    if grid.role in ("factors", "both"):
        merges += spec.groups * sum(len(spec.levels.of(factor)) for factor in spec.levels.factors)
    if grid.role in ("joint", "both") and spec.heterogeneous is not None:
        merges += spec.heterogeneous.groups
    return merges


@dataclass(frozen=True)
class BaseShare:
    """How far a grid is for one base.

    Attributes:
        grid: name.
        architecture: of the base.
        runs: how many the grid has for it.
        finished: digests of those that are done.
    """

    grid: str
    architecture: str
    runs: int
    finished: frozenset[str]

    @property
    def complete(self) -> bool:
        """Whether every run is done."""
        return len(self.finished) >= self.runs


def shares(grid: StudyGrid, folder: Path) -> tuple[BaseShare, ...]:
    """What of a grid is done in its store, one entry for each base in the order of the grid."""
    from experiments.store import Store
    from experiments.store.database import DATABASE

    wanted: dict[str, list[RunSpec]] = {}
    for run in grid.runs():
        wanted.setdefault(run.base.model_dump_json(), []).append(run)
    found: dict[str, set[str]] = {base: set() for base in wanted}
    if (folder / DATABASE).exists():
        with Store.open(folder, "r") as kept:
            if kept.meta.get("digest") == grid.spec.digest():
                done = set(kept.runs()) - set(kept.missing())
                for digest, (run, _, _) in kept.known(done).items():
                    found.setdefault(run.base.model_dump_json(), set()).add(digest)
    return tuple(
        BaseShare(grid.name, runs[0].base.architecture, len(runs), frozenset(found[base]))
        for base, runs in wanted.items()
    )


def complete(grid: StudyGrid, folder: Path) -> bool:
    """Whether the store holds this very grid with every run done."""
    return all(share.complete for share in shares(grid, folder))
