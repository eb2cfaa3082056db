"""``mergebound measure``: what the theory needs, measured on a base and its experts.

The group has one command per part, each in a module ``measure_<part>`` with ``register(group)``: :data:`PARTS`.  Every
command takes experts of a grid (``--store`` with ``--runs`` or ``--query``) or checkpoints (``--base``, ``--experts``,
``--data``), and writes tables, JSON (``--json``) or files (``--out``) through :func:`show`.  A part's command is
declared as::

    def register(group: typer.Typer) -> None:
        group.command("curvature", cls=SeveralValues)(curvature)

    def curvature(store: StoreFolder = None, runs: Runs = None, query: Query = None, base: Base = None,
                  experts: Experts = None, data: Data = None, model: Model = None, root: Root = None,
                  images: Images = 256, seed: Seed = 0, threads: Threads = None, as_json: AsJson = False,
                  out: Out = None) -> None: ...
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperCommand

from experiments.commands.predict import spread
from theory.errors import MergeboundError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from experiments.measure.subject import Subject

PARTS = ("function_space", "curvature", "noise", "twins", "landscape", "verdicts")
"""Commands of the group, in the order in which help shows them."""
SEVERAL = ("--experts", "--data", "--runs")
"""Options that take all values up to the next option."""
_WIDTH = 118

StoreFolder = Annotated[
    Path | None, typer.Option("--store", help="Folder of a grid that was run; with --runs or --query.")
]
Runs = Annotated[
    list[str] | None,
    typer.Option("--runs", help="Digests of runs (or their first 8 letters or more): `--runs D1 D2`, or `D1,D2`."),
]
Query = Annotated[
    str | None,
    typer.Option("--query", help="Runs for which this holds, as `learning_rate < 0.01`; see `mergebound grid query`."),
]
Base = Annotated[
    Path | None, typer.Option("--base", help="The checkpoint the experts were fine-tuned from, in place of --store.")
]
Experts = Annotated[list[Path] | None, typer.Option("--experts", help="Fine-tuned checkpoints: `--experts E1 E2 ...`.")]
Data = Annotated[
    list[Path] | None,
    typer.Option("--data", help="One data set per expert, in order: an `.npz`, or a folder with one folder per class."),
]
Model = Annotated[
    str | None, typer.Option("--model", help="A timm model name, or a digit network; default: as the checkpoints say.")
]
Root = Annotated[Path | None, typer.Option("--root", help="Folder of the data sets. Default: the grid's.")]
Images = Annotated[int, typer.Option("--images", min=1, help="Calibration images per task, drawn at random.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Names every random draw.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print everything as JSON, and nothing else.")]
Out = Annotated[Path | None, typer.Option("--out", help="Folder for tables (CSV) and figures (SVG and PNG).")]


class SeveralValues(TyperCommand):
    """A command whose options ``--experts``, ``--data`` and ``--runs`` take all values up to the next option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Write ``--runs A B`` as ``--runs A --runs B`` and parse as usual."""
        return super().parse_args(ctx, spread(args, SEVERAL))


def register(app: typer.Typer) -> None:
    """Add the group ``measure`` to the command line."""
    app.add_typer(build_group(), name="measure")


def build_group() -> typer.Typer:
    """The group with the commands of all parts that are there."""
    group = typer.Typer(
        no_args_is_help=True,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
        help="Measure what the theory needs on a base and its experts, each number with tier and interval.",
    )

    @group.callback()
    def common() -> None:
        """Measure what the theory needs on a base and its experts, each number with tier and interval."""

    for part in PARTS:
        name = f"experiments.commands.measure_{part}"
        if importlib.util.find_spec(name) is not None:
            importlib.import_module(name).register(group)
    return group


# --- opening ---------------------------------------------------------------------------------------------------------


def open_subject(
    *,
    store: Path | None = None,
    runs: Sequence[str] | None = None,
    query: str | None = None,
    base: Path | None = None,
    experts: Sequence[Path] | None = None,
    data: Sequence[Path] | None = None,
    model: str | None = None,
    root: Path | None = None,
    images: int = 256,
    seed: int = 0,
    threads: int | None = None,
    at_least: int = 1,
    double: bool = False,
    **options: Any,
) -> Subject:
    """The subject that the shared options name.

    Args:
        store, runs, query, root: experts of a grid.
        base, experts, data, model: checkpoints.
        images, seed: calibration images per task.
        threads: CPU threads of torch, if given.
        at_least: how many experts the command needs.
        double: coordinates and images in float64 (grids only).
        options: of :func:`experiments.measure.opening.from_store` or ``from_checkpoints``.

    Raises:
        MergeboundError: both ways or neither are given, an option of the other way, too few experts, or what opening
            raises.
    """
    files = {"--base": base, "--experts": experts, "--data": data, "--model": model}
    grid = {"--runs": runs, "--query": query, "--root": root}
    if (store is None) == (base is None):
        raise MergeboundError(
            "say what to measure: --store FOLDER with --runs or --query, or --base FILE with --experts and --data"
        )
    stray = [name for name, value in (files if store is not None else grid).items() if value]
    if stray:
        other = "--store" if store is not None else "--base"
        raise MergeboundError(f"{stray[0]} does not go with {other}; leave one of them out")
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    if store is not None:
        import torch

        from experiments.commands.grid_store import data_root
        from experiments.measure.opening import from_store
        from experiments.store import Store

        with Store.open(store, "r") as opened:
            chosen = choose_runs(opened, runs, query)
            _enough(len(chosen), at_least)
            if double:
                options["dtype"] = torch.float64
            return from_store(opened, chosen, images=images, seed=seed, root=data_root(opened, root), **options)
    from experiments.measure.opening import from_checkpoints

    if not experts or not data:
        raise MergeboundError("--base: give the experts and their data too, as --experts E1 E2 --data D1 D2")
    if double:
        raise MergeboundError("double precision is for experts of a grid; leave it out with --base")
    _enough(len(experts), at_least)
    assert base is not None
    return from_checkpoints(base, experts, data, model=model, images=images, seed=seed, **options)


def choose_runs(store: Any, runs: Sequence[str] | None, query: str | None) -> tuple[str, ...]:
    """Digests of the runs that ``--runs`` or ``--query`` names; all finished runs of the store without either.

    Raises:
        MergeboundError: both are given, or no finished run fits.
    """
    if runs and query:
        raise MergeboundError("--runs and --query both choose runs; give one of them")
    if runs:
        return tuple(part for text in runs for part in text.split(",") if part)
    frame = store.query(query or "", final=True)
    found = tuple(dict.fromkeys(frame.loc[frame["outcome"] == "finished", "digest"]))
    if not found:
        raise MergeboundError(f"--query {query!r}: no finished run fits; see `mergebound grid query {store.folder}`")
    return found


def _enough(count: int, at_least: int) -> None:
    if count < at_least:
        raise MergeboundError(f"{count} experts: this needs {at_least} or more")


@contextmanager
def telling() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on standard error for the length of a block: a function of (what is done, steps done, steps in all)."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=None)

        def tell(stage: str, done: int, total: int) -> None:
            bar.update(task, description=escape(stage), completed=done, total=total or None)

        yield tell


# --- showing ---------------------------------------------------------------------------------------------------------


def show(
    tables: Mapping[str, pd.DataFrame],
    *,
    headline: str = "",
    notes: Sequence[str] = (),
    figures: Mapping[str, Figure] | None = None,
    facts: Mapping[str, Any] | None = None,
    shown: Mapping[str, Sequence[str]] | None = None,
    as_json: bool = False,
    out: Path | None = None,
) -> None:
    """Print tables (or JSON) and write them to a folder.

    Args:
        tables: by name; each becomes ``NAME.csv``.
        headline: what was measured, in one line.
        notes: sentences under the tables.
        figures: by name; each becomes ``NAME.svg`` and ``NAME.png``.
        facts: single values for the JSON.
        shown: columns of a table that are printed (all are written); a table with an empty list is not printed.
        as_json: print JSON and nothing else.
        out: folder for files, made if it is not there.

    Raises:
        MergeboundError: the folder cannot be written.
    """
    written = [] if out is None else _write(out, tables, figures or {})
    if as_json:
        content: dict[str, Any] = {"headline": headline, **(facts or {})}
        content |= {name: records(frame) for name, frame in tables.items()}
        content["notes"] = list(notes)
        typer.echo(json.dumps(_clean(content), indent=2, allow_nan=False))
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDTH)
    if headline:
        console.print(escape(headline))
    for name, frame in tables.items():
        columns = list((shown or {}).get(name, frame.columns))
        if columns:
            console.print()
            console.print(_table(name, frame[columns]))
    for note in notes:
        console.print(f"note: {escape(note)}")
    for path in written:
        typer.echo(f"written: {path}")


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as JSON data; numbers that are not finite become null."""
    return [{str(key): _clean(value) for key, value in row.items()} for row in frame.to_dict("records")]


def _clean(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    if hasattr(value, "tolist"):
        return _clean(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int | bool) else str(value)


def _table(name: str, frame: pd.DataFrame) -> Table:
    table = Table(title=name.replace("_", " "), title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in frame.columns:
        table.add_column(str(column).replace("_", " "), overflow="fold")
    for row in _blank_ends(frame).itertuples(index=False):
        table.add_row(*(escape(_cell(value)) for value in row))
    return table


def _blank_ends(frame: pd.DataFrame) -> pd.DataFrame:
    """Limits that are infinite (nothing bounds the number on that side) as empty cells."""
    ends = [c for c in frame.columns if str(c).split("_")[-1] in ("low", "high") and frame[c].dtype.kind == "f"]
    return frame.assign(**{str(c): frame[c].astype(object).where(~frame[c].abs().eq(math.inf), None) for c in ends})


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.4g}"
    return str(value)


def _write(out: Path, tables: Mapping[str, pd.DataFrame], figures: Mapping[str, Figure]) -> list[Path]:
    written: list[Path] = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, frame in tables.items():
            _blank_ends(frame).to_csv(out / f"{name}.csv", index=False)
            written.append(out / f"{name}.csv")
        if figures:
            from experiments.plots import save_png, save_svg

            for name, figure in figures.items():
                written += [save_svg(figure, out / f"{name}.svg"), save_png(figure, out / f"{name}.png")]
    except OSError as error:
        raise MergeboundError(f"--out {out}: cannot be written ({error.strerror or error})") from error
    return written
