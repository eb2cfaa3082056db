"""``mergebound grid verify``: whether a store still holds what was put into it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from experiments.commands.grid_store import AsJson, Folder, data_root

if TYPE_CHECKING:
    from experiments.grid.result import RunResult
    from experiments.grid.run_spec import RunSpec
    from experiments.store import Store, Verification

DAMAGED = 1
"""Exit code of ``grid verify`` where something is wrong."""
_SHORT = 12


def register(group: typer.Typer) -> None:
    """Add the command to the group ``grid``."""
    group.command("verify")(verify)


def verify(
    folder: Folder,
    sample: Annotated[int, typer.Option("--sample", min=0, help="Runs that are done again and compared.")] = 0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Names the sample.")] = 0,
    deep: Annotated[bool, typer.Option("--deep", help="Unpack every checkpoint too.")] = False,
    root: Annotated[
        Path | None,
        typer.Option("--root", help="Folder of the data sets (default: the grid's).", show_default=False),
    ] = None,
    repair: Annotated[
        bool,
        typer.Option(
            "--forget-damaged", help="Make runs and merges that are damaged or altered absent, so that they are redone."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Hash every file and row of numbers again; run a random sample of the runs again, comparing bits and metrics.

    Exit code 1 where something is damaged or altered.
    """
    from experiments.store import Store

    with Store.open(folder, "w" if repair else "r") as store:
        found = store.verify(_rerun(store, root) if sample else None, sample=sample, seed=seed, deep=deep)
        forgotten = store.forget(found.damaged) if repair else 0
        merges = store.forget_merges(found.merges) if repair else 0
        if repair and found.lost:
            store.accept_losses()
    if as_json:
        content = asdict(found) | {"forgotten": forgotten, "merges_forgotten": merges}
        typer.echo(json.dumps(content, indent=2))
    else:
        _report(found, forgotten, merges, repair)
    if not found.good:
        raise typer.Exit(DAMAGED)


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _rerun(store: Store, root: Path | None) -> Callable[[str, RunSpec], RunResult]:
    """Does a run of the store again, stacked with the runs that it was stacked with."""
    from experiments.engines.cohort_job import known_runs, pieces, results_of
    from experiments.engines.workplace import Workplace
    from experiments.grid.result import Cohort

    plan = store.plan()
    place = Workplace(store.base, data_root(store, root), device="cpu" if plan is None else plan.device)
    cohorts = () if plan is None else plan.cohorts
    where = {digest: piece for cohort in cohorts for piece in pieces(cohort) for digest in piece.runs}

    def again(digest: str, run: RunSpec) -> RunResult:
        piece = where.get(digest) or Cohort(f"again {run.seed}", (digest,))
        return dict(results_of(piece, known_runs(store, piece.runs), [digest], place))[digest]

    return again


def _report(found: Verification, forgotten: int, merges: int, repair: bool) -> None:
    for problem in found.problems:
        typer.echo(problem)
    for digest, what in found.unequal:
        typer.echo(f"run {digest[:_SHORT]}: done again, it differs in {what}")
    typer.echo(f"{found.blobs:,} files hashed, {len(found.problems):,} problems")
    old = [
        f"{count:,} {name}"
        for name, count in (("runs", found.unsealed_runs), ("merges", found.unsealed_merges))
        if count
    ]
    if old:
        typer.echo(
            f"hashes of the numbers of {' and '.join(old)} were not recorded (written by an older version): whether "
            "they were altered cannot be said"
        )
    if found.counted_since is not None or not found.counted:
        when = f"before {_day(found.counted_since)} " if found.counted_since is not None else ""
        typer.echo(
            "rows were not counted by the older version that wrote this store: whether rows were lost "
            f"{when}cannot be said"
        )
    if found.rerun:
        measured = f", metrics of {found.remeasured:,} measured again" if found.remeasured else ""
        typer.echo(f"{len(found.rerun):,} runs done again{measured}, {len(found.unequal):,} differ")
    if forgotten or merges:
        typer.echo(
            f"{forgotten:,} runs and {merges:,} merges are absent now; `mergebound grid resume` and `grid merge` do "
            "them again"
        )
    if found.lost and repair:
        typer.echo(
            f"the rows of {', '.join(found.lost)} were counted anew; what is lost is absent, and is done again by the "
            "command that made it"
        )
    if (found.damaged or found.merges or found.lost) and not repair:
        typer.echo(
            "`mergebound grid verify --forget-damaged` makes what is damaged or lost absent, so that it is done again"
        )
