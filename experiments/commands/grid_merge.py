"""``mergebound grid merge``: merges of a finished grid's experts, measured and kept in its store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from theory.errors import MergeboundError

if TYPE_CHECKING:
    import pandas as pd

    from experiments.combine.api import Progress
    from experiments.combine.designs import Design
    from experiments.combine.recipe import MergeMethod


def register(group: typer.Typer) -> None:
    """Add the command to the group ``grid``."""
    group.command("merge")(merge_groups)


def merge_groups(
    store: Annotated[Path, typer.Argument(help="Folder of a grid that was run.")],
    method: Annotated[
        list[str] | None, typer.Option("--method", help="See `mergebound methods`; repeatable. Default: average.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="A parameter of the methods that have it, as `density=0.2`, or of one, as `ties:density=0.2`. "
            "Repeatable.",
        ),
    ] = None,
    coefficient: Annotated[
        str | None,
        typer.Option("--alpha", help="One coefficient for every expert, or one each in the order of tasks: `0.5,0.3`."),
    ] = None,
    merge_seed: Annotated[int, typer.Option("--merge-seed", help="For methods with random masks.")] = 0,
    groups: Annotated[
        str,
        typer.Option("--groups", help="`random:N` groups (with --factor: per level), `N` for short, or `all`."),
    ] = "random:10",
    size: Annotated[str, typer.Option("--size", help="Experts per group, as `2,4,8`.")] = "6",
    factor: Annotated[
        str | None,
        typer.Option("--factor", help="Vary this hyperparameter (or `step`: the checkpoint), hold the others."),
    ] = None,
    fix: Annotated[
        list[str] | None,
        typer.Option(
            "--fix", help="Hold a hyperparameter, as `batch_size=64`; several values as `64,128`. Repeatable."
        ),
    ] = None,
    others: Annotated[
        str,
        typer.Option("--others", help="Hyperparameters that --fix leaves open: `middle` value, `all`, or `free`."),
    ] = "middle",
    matched: Annotated[
        bool, typer.Option("--matched/--unmatched", help="The same tasks (and seeds) at every level, or its own.")
    ] = True,
    bins: Annotated[
        int | None, typer.Option("--bins", help="Cut the factor into so many intervals; experts are drawn in them.")
    ] = None,
    steps: Annotated[str, typer.Option("--steps", help="`last` checkpoints, or `any` (not with --factor).")] = "last",
    leave_out: Annotated[
        bool, typer.Option("--leave-out-missing", help="Leave out tasks that some level lacks, at every level.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the first group; the others count on.")] = 0,
    images: Annotated[
        int | None, typer.Option("--images", help="Test images per task, drawn by the split's seed. Default: all.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Test images in a forward pass.")] = 256,
    batchnorm: Annotated[
        str, typer.Option("--batchnorm", help="Running statistics: `merged`, or `reestimated` on validation images.")
    ] = "merged",
    calibration: Annotated[int, typer.Option("--calibration", help="Images per task for `reestimated`.")] = 256,
    fast: Annotated[bool, typer.Option("--fast", help="Evaluate by the fastest path that is close enough.")] = False,
    root: Annotated[Path | None, typer.Option("--root", help="Folder of the data sets. Default: the grid's.")] = None,
    workers: Annotated[int, typer.Option("--workers", help="Processes of one thread each.")] = 1,
    memory: Annotated[float, typer.Option("--memory", help="GiB of task vectors in memory; the rest is mapped.")] = 2.0,
    test_memory: Annotated[float, typer.Option("--test-memory", help="GiB of test images in memory.")] = 2.0,
    scratch: Annotated[
        Path | None, typer.Option("--scratch", help="Folder for task vectors that do not fit in memory.")
    ] = None,
    job: Annotated[int, typer.Option("--job", help="Merges that are stored together.")] = 32,
    device: Annotated[str, typer.Option("--device", help="Where networks run; `cuda` with one worker.")] = "cpu",
    metric: Annotated[
        str, typer.Option("--metric", help="accuracy, loss, normalised, gain, merging_cost, ...: what is shown.")
    ] = "accuracy",
    out: Annotated[Path | None, typer.Option("--out", help="CSV file with one row per group and method.")] = None,
    unfinished: Annotated[
        bool, typer.Option("--unfinished", help="Merge what there is of a grid with runs that are not done yet.")
    ] = False,
    count: Annotated[bool, typer.Option("--count", help="Count the merges and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Merge groups of experts of a finished grid and measure every merge on its tasks' test images.

    No merged checkpoint is written. Results are kept in the store: what is there is not measured again, and a command
    that was stopped goes on where it was. Intervals resample experts.
    """
    import experiments.combine.api as api
    from experiments.combine.finished import how_finished
    from experiments.combine.recipe import Evaluate
    from experiments.commands.grid_merge_table import show
    from experiments.commands.grid_store import data_root
    from experiments.store import Store

    evaluate = Evaluate(
        batch_size=batch_size,
        images=images,
        batchnorm=batchnorm,  # type: ignore[arg-type]
        calibration=calibration,
        fast=fast,
    )
    evaluate.check()
    if out is not None and out.suffix != ".csv":
        raise MergeboundError(f"{out}: give a file that ends in .csv")
    methods = _methods(method or ["average"], settings or [], coefficient, merge_seed)
    with Store.open(store, "w") as opened:
        state = opened.status()
        if state.missing and not unfinished:
            raise MergeboundError(
                f"{store}: {state.missing:,} of {state.runs:,} runs are not done yet, and groups are drawn from all "
                f"experts; finish the grid (`mergebound grid resume {store}`), or merge what there is with --unfinished"
            )
        frame = opened.frame()
        held = _fixed(fix or [], frame)
        design = _design(
            frame,
            factor=factor,
            groups=groups,
            sizes=_numbers(size, "--size"),
            seed=seed,
            fixed=held,
            others=others,
            matched=matched,
            bins=bins,
            steps=steps,
            leave_out=leave_out,
        )
        for one in methods:
            one.check(design.sizes)
        for note in _own_tasks(frame, held):
            typer.echo(f"note: {note}", err=True)
        finished = how_finished(
            frame, runs=state.runs, missing=state.missing, factor=design.factor, levels=design.levels, fixed=held
        )
        if count:
            typer.echo(f"{len(design)} groups x {len(methods)} methods = {len(design) * len(methods)} merges")
            typer.echo(finished.words)
            return
        with Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        ) as bar:
            table = api.combine(
                opened,
                design,
                methods,
                evaluate=evaluate,
                root=data_root(opened, root),
                workers=workers,
                watch=_Watch(bar),
                memory=round(memory * 2**30),
                test_memory=round(test_memory * 2**30),
                scratch=scratch,
                job=job,
                device=device,
            )
    if out is not None:
        from experiments.atomic import write_atomically

        write_atomically(out, table.to_csv(index=False).encode())
    show(table, metric, design, as_json, finished)


class _Watch:
    """Moves a bar for each phase, and shows the rate."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._tasks: dict[str, Any] = {}

    def __call__(self, progress: Progress) -> None:
        """Show how far it is."""
        if progress.phase not in self._tasks:
            self._tasks[progress.phase] = self._bar.add_task(progress.phase, total=progress.total, rate="")
        rate = f"{progress.rate:.1f}/s" + (f", {progress.kept} kept from before" if progress.kept else "")
        self._bar.update(self._tasks[progress.phase], completed=progress.done, rate=rate)


def _methods(names: Sequence[str], settings: Sequence[str], alpha: str | None, seed: int) -> tuple[MergeMethod, ...]:
    from experiments.combine.recipe import MergeMethod, as_methods
    from merging.registry import get

    weights: tuple[float, ...] | float | None = None
    if alpha is not None:
        given = tuple(_number(part, "--alpha") for part in alpha.split(","))
        weights = given[0] if len(given) == 1 else given
    chosen: dict[str, dict[str, Any]] = {name: {} for name in names}
    for text in settings:
        place, equals, value = text.partition("=")
        only, colon, key = place.rpartition(":")
        if not equals or (colon and only not in chosen):
            raise MergeboundError(f"--set {text}: give NAME=VALUE, or METHOD:NAME=VALUE with one of the methods")
        known = False
        for name in [only] if colon else chosen:
            parameter = next((one for one in get(name).parameters if one.name == key), None)
            if parameter is not None:
                chosen[name][key], known = parameter.parse(value), True
        if not known:
            takes = sorted({one.name for name in chosen for one in get(name).parameters})
            raise MergeboundError(f"--set {text}: no method has a parameter {key!r}; choose from {', '.join(takes)}")
    return as_methods(
        [
            MergeMethod(name, own, weights if get(name).coefficients != "none" else None, seed)
            for name, own in chosen.items()
        ]
    )


def _design(
    frame: pd.DataFrame,
    *,
    factor: str | None,
    groups: str,
    sizes: tuple[int, ...],
    seed: int,
    fixed: dict[str, Any],
    others: str,
    matched: bool,
    bins: int | None,
    steps: str,
    leave_out: bool,
) -> Design:
    from experiments.combine.designs import all_groups, by_factor, random_groups

    kind, _, text = groups.partition(":") if not groups.isdigit() else ("random", ":", groups)
    if kind == "all" and not text and factor is None:
        return all_groups(frame, sizes=sizes, fixed=fixed, steps=steps)  # type: ignore[arg-type]
    if kind != "random" or not text.isdigit():
        raise MergeboundError(f"--groups {groups}: give random:N, or all (without --factor)")
    if factor is None:
        return random_groups(
            frame, sizes=sizes, groups=int(text), seed=seed, fixed=fixed, steps=steps  # type: ignore[arg-type]
        )  # fmt: skip
    return by_factor(
        frame,
        factor,
        sizes=sizes,
        groups=int(text),
        seed=seed,
        fixed=fixed,
        others=others,  # type: ignore[arg-type]
        matched=matched,
        bins=bins,
        on_missing="leave_out" if leave_out else "error",
    )


def _fixed(texts: Sequence[str], frame: pd.DataFrame) -> dict[str, Any]:
    """``name=value`` with values in the type of the grid's column."""
    import pandas as pd

    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not value:
            raise MergeboundError(f"--fix {text}: give NAME=VALUE")
        parts: list[Any] = value.split(",")
        if name in frame.columns and pd.api.types.is_bool_dtype(frame[name]):
            parts = [part.lower() == "true" for part in parts]
        elif name in frame.columns and pd.api.types.is_numeric_dtype(frame[name]):
            parts = [part if part == "none" else _number(part, f"--fix {name}") for part in parts]
        found[name] = parts if len(parts) > 1 else parts[0]
    return found


def _own_tasks(frame: pd.DataFrame, held: dict[str, Any]) -> list[str]:
    """Which experts' tasks their base was trained on, one line each."""
    from experiments.bases.spec import BaseSpec
    from experiments.combine.cells import restricted
    from experiments.combine.groups import grid_table
    from experiments.grid.remarks import own_tasks

    table = restricted(grid_table(frame), held, keep_steps=True)
    if "base" not in table.columns:
        return []
    return own_tasks(
        (BaseSpec.model_validate_json(str(text)), set(rows["task"])) for text, rows in table.groupby("base", sort=True)
    )


def _numbers(text: str, option: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise MergeboundError(f"{option} {text}: give whole numbers, as 2,4,8")
    return tuple(int(part) for part in parts)


def _number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise MergeboundError(f"{option} {text}: give a number") from None
