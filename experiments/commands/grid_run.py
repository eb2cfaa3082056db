"""``mergebound grid run`` and ``grid resume``: do what a grid says, here or on a cluster, and go on after a stop."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from experiments.commands.grid_work import work
from theory.errors import MergeboundError

ENGINES = ("local", "ray")

Store = Annotated[
    Path | None,
    typer.Option("--store", help="Folder of the results (default: what the file says).", show_default=False),
]
Root = Annotated[
    Path | None,
    typer.Option("--root", help="Folder of the data sets (default: MERGEBOUND_DATA).", show_default=False),
]
Engine = Annotated[str, typer.Option("--engine", help="local (processes on this machine) or ray (a cluster).")]
Address = Annotated[
    str | None,
    typer.Option("--address", help="Of the Ray cluster: auto, host:6379, ray://host:10001.", show_default=False),
]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers", min=1, help="Cohorts at a time (default: one per core; one per GPU).", show_default=False
    ),
]
Cpus = Annotated[float, typer.Option("--cpus", min=0.0, help="CPUs of each Ray task.")]
Gpus = Annotated[
    float | None,
    typer.Option("--gpus", min=0.0, help="GPUs of each Ray task; 0.25 lets four share one.", show_default=False),
]
Memory = Annotated[
    float | None,
    typer.Option("--memory", min=0.0, help="GiB of each Ray task (default: estimated).", show_default=False),
]
Collect = Annotated[
    bool,
    typer.Option(
        "--collect/--no-collect",
        help="Ray: this process stores results; without it workers do, and all must see the store's folder.",
    ),
]
Attempts = Annotated[int, typer.Option("--attempts", min=1, help="Tries of a cohort before it is given up.")]
Resamples = Annotated[int, typer.Option("--resamples", min=0, help="Bootstrap samples behind the intervals.")]
Mirror = Annotated[
    str | None,
    typer.Option(
        "--mirror",
        help="Keep a copy of the store there (s3://..., gs://..., a folder), also when it is stopped.",
        show_default=False,
    ),
]
MirrorEvery = Annotated[
    float, typer.Option("--mirror-every", min=0.0, help="Minutes between two copies; 0: only at start and end.")
]

MirrorReplace = Annotated[
    bool,
    typer.Option(
        "--mirror-replace",
        help="Let the copy replace what is there: another grid's, or one with results that this store lacks.",
    ),
]


def register(group: typer.Typer) -> None:
    """Add the commands to the group ``grid``."""
    group.command("run")(run)
    group.command("resume")(resume)


def run(
    source: Annotated[str, typer.Argument(help="A preset of `mergebound grid presets`, or a .yaml or .json file.")],
    store: Store = None,
    root: Root = None,
    engine: Engine = "local",
    address: Address = None,
    workers: Workers = None,
    device: Annotated[
        str | None,
        typer.Option("--device", help="cpu or cuda (default: what the file says, or cpu).", show_default=False),
    ] = None,
    limit_runs: Annotated[
        int | None,
        typer.Option("--limit-runs", min=1, help="Only so many, spread over the grid; more later.", show_default=False),
    ] = None,
    extend: Annotated[
        bool,
        typer.Option(
            "--extend", help="Let the grid of this store grow: its runs must all be in the page; new ones are added."
        ),
    ] = False,
    download: Annotated[bool, typer.Option("--download", help="Published weights may be downloaded.")] = False,
    task_vectors: Annotated[
        str | None,
        typer.Option(
            "--task-vectors",
            help="Of a new store: lossless (default), or bfloat16 (half the disk; backbones are rounded).",
            show_default=False,
        ),
    ] = None,
    cpus: Cpus = 1.0,
    gpus: Gpus = None,
    memory: Memory = None,
    collect: Collect = True,
    attempts: Attempts = 3,
    resamples: Resamples = 200,
    mirror: Mirror = None,
    mirror_every: MirrorEvery = 5.0,
    mirror_replace: MirrorReplace = False,
) -> None:
    """Run a grid: check it, make its bases, measure and freeze the plan, train, evaluate and store every run.

    Stop it at any moment: the same command, or `grid resume`, goes on, and the results have the bits of a grid that was
    never stopped. Several runners may work on one store. Exit code 0: everything is stored; 1: some cohorts were given
    up; 2: refused.
    """
    from experiments.engines.prepare import prepare, spread
    from experiments.engines.room import check_room
    from experiments.grid.preflight import check_grid
    from experiments.grid.yaml_source import read_grid, read_runs

    _check_engine(engine, address)
    if extend and limit_runs is not None:
        raise MergeboundError("--extend: takes the whole grid; leave --limit-runs out")
    file = read_grid(source)
    device = device or file.spec.device or "cpu"
    if store is None:
        if file.spec.store is None:
            raise MergeboundError(f"{file.source}: says no store; give --store FOLDER, or write store: FOLDER into it")
        store = Path(file.spec.store)
    expansion = read_runs(file)
    runs = spread(expansion.runs, limit_runs)
    console = Console(stderr=True)
    for note in expansion.notes:
        console.print(f"note: {escape(note)}", highlight=False, soft_wrap=True)
    _refuse(check_grid(file, root, store, device, download=download, runs=runs), console)
    _refuse(check_room(file, runs, store, root, task_vectors), console)
    _check_mirror(store, mirror, mirror_replace, file.spec.digest())
    meta: dict[str, Any] = {"grid": file.spec.content(), "digest": file.spec.digest(), "source": Path(source).name}
    meta |= {"limit_runs": limit_runs, "device": device}
    found = prepare(
        store, runs, meta, root=root, device=device, download=download, task_vectors=task_vectors, extend=extend,
        report=lambda line: console.print(line, highlight=False),
    )  # fmt: skip
    console.print(f"{found.runs} runs in {len(found.plan.cohorts)} cohorts; the plan is in {store}", highlight=False)
    options = _options(engine, address, workers, cpus, gpus, memory, collect, attempts, resamples)
    work(store, root, device, engine, options, console, mirror, mirror_every, mirror_replace)


def resume(
    store: Annotated[Path, typer.Argument(help="Folder of a grid that was begun.")],
    root: Root = None,
    engine: Engine = "local",
    address: Address = None,
    workers: Workers = None,
    download: Annotated[bool, typer.Option("--download", help="Published weights may be downloaded.")] = False,
    cpus: Cpus = 1.0,
    gpus: Gpus = None,
    memory: Memory = None,
    collect: Collect = True,
    attempts: Attempts = 3,
    resamples: Resamples = 200,
    mirror: Mirror = None,
    mirror_every: MirrorEvery = 5.0,
    mirror_replace: MirrorReplace = False,
) -> None:
    """Go on with a grid from its store alone, with the plan that was frozen when it began."""
    from experiments.engines.prepare import anchored_runs, check_same_grid, prepare, spread
    from experiments.engines.room import check_room
    from experiments.grid.expand import expand
    from experiments.grid.spec import GridSpec
    from experiments.store import Store as Kept

    _check_engine(engine, address)
    console = Console(stderr=True)
    _check_mirror(store, mirror, mirror_replace)
    with Kept.open(store) as kept:
        meta, plan = kept.meta, kept.plan()
        if "grid" not in meta:
            raise MergeboundError(f"{store}: was not made by `mergebound grid run`; give the folder of a grid")
        check_same_grid(kept, meta)
        begun, ready = bool(kept.runs()), plan is not None and not kept.unplanned()
        left = [run for run, *_ in kept.known(kept.missing()).values()]
    device = str(meta.get("device", "cpu") if plan is None else plan.device)
    where = root if root is not None else meta.get("root")
    runs = () if begun else spread(expand(GridSpec.model_validate(meta["grid"])), meta.get("limit_runs"))
    _refuse(check_room(None, left or anchored_runs(runs, meta.get("folder")), store, where), console)
    if not ready:
        prepare(
            store, runs, meta, root=where, device=device, download=download,
            report=lambda line: console.print(line, highlight=False),
        )  # fmt: skip
    options = _options(engine, address, workers, cpus, gpus, memory, collect, attempts, resamples)
    work(store, where, device, engine, options, console, mirror, mirror_every, mirror_replace)


def _check_engine(engine: str, address: str | None) -> None:
    if engine not in ENGINES:
        raise MergeboundError(f"--engine {engine}: is unknown; choose local or ray")
    if address is not None and engine != "ray":
        raise MergeboundError("--address: is of a Ray cluster; add --engine ray")
    if engine == "ray":
        from experiments.engines.ray import imported

        imported()


def _check_mirror(store: Path, mirror: str | None, replaced: bool, digest: str | None = None) -> None:
    """Refuse a place for copies before anything is trained."""
    if mirror is None:
        if replaced:
            raise MergeboundError("--mirror-replace: is about a copy; give --mirror PLACE too")
        return
    if not replaced:
        from experiments.engines.mirror import check_mirror

        check_mirror(store, mirror, digest)


def _refuse(problems: list[Any], console: Console) -> None:
    """Show every problem; nothing was run."""
    if not problems:
        return
    for problem in problems[:-1]:
        console.print(f"[bold red]error:[/] {escape(str(problem))}", highlight=False, soft_wrap=True)
    raise problems[-1]


def _options(
    engine: str,
    address: str | None,
    workers: int | None,
    cpus: float,
    gpus: float | None,
    memory: float | None,
    collect: bool,
    attempts: int,
    resamples: int,
) -> dict[str, Any]:
    """What the engine is called with."""
    common: dict[str, Any] = {"workers": workers, "attempts": attempts, "resamples": resamples}
    if engine == "local":
        return common
    return common | {"address": address, "collect": collect, "share": (cpus, gpus, memory)}
