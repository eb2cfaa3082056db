"""Commands about experts: the options that name them, and how they are opened.

Every such command takes experts of a grid (``--store`` with ``--runs`` or ``--query``) or checkpoints (``--base``,
``--experts``, ``--data``).  Its function takes a :class:`Chosen` in their place and is made a command by
:func:`about_experts`::

    @about_experts(images=128)
    def noise(about: Chosen, pairs: Annotated[int, ...] = 64, as_json: AsJson = False, out: Out = None) -> None:
        subject = about.open(at_least=2)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from rich.console import Console
from rich.markup import escape

from experiments.commands.options import (
    Base,
    Data,
    Experts,
    GridRoot,
    Images,
    Model,
    Query,
    Runs,
    Seed,
    StoreFolder,
    Threads,
    several_values,
)
from theory.errors import MergeboundError

if TYPE_CHECKING:
    from experiments.measure.noise.objective import Point
    from experiments.measure.subject import Subject

ExpertsCommand = several_values("--experts", "--data", "--runs")
"""The class of a command about experts: these options take all values up to the next option."""
_LAST = ("seed", "threads")


@dataclass(frozen=True)
class Chosen:
    """Which experts, images and draws a command is about: its shared options, in the order in which help has them."""

    store: StoreFolder = None
    runs: Runs = None
    query: Query = None
    base: Base = None
    experts: Experts = None
    data: Data = None
    model: Model = None
    root: GridRoot = None
    images: Images = 256
    seed: Seed = 0
    threads: Threads = None

    def open(self, *, at_least: int = 1) -> Subject:
        """The subject; see :func:`open_subject`."""
        return open_subject(**{each.name: getattr(self, each.name) for each in fields(self)}, at_least=at_least)

    def digests(self, opened: Any) -> list[str]:
        """Whole digests of the chosen runs of an open store."""
        names = choose_runs(opened, self.runs, self.query)
        return [next(digest for digest in opened.runs() if digest.startswith(name)) for name in names]

    def checkpoints(self, subject: Subject, most: int) -> list[tuple[Point, ...]]:
        """Visited points between base and expert, from the store; none without a store."""
        if self.store is None or most == 0:
            return []
        from experiments.measure.noise.objective import checkpoint_points
        from experiments.store import Store

        with Store.open(self.store, "r") as opened:
            return checkpoint_points(opened, self.digests(opened), subject, most)


def about_experts(
    *, images: int = 256, seed_first: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a function of a :class:`Chosen` and options of its own the options of :class:`Chosen` too.

    Args:
        images: default of ``--images``.
        seed_first: where help has ``--seed`` and ``--threads``: before the command's own options, or before ``--json``.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        hints = get_type_hints(Chosen, include_extras=True)
        shared = [
            inspect.Parameter(
                each.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=images if each.name == "images" else each.default,
                annotation=hints[each.name],
            )
            for each in fields(Chosen)
        ]
        late = [] if seed_first else [one for one in shared if one.name in _LAST]
        at = next((i for i, one in enumerate(own) if one.name == "as_json"), len(own))
        early = [one for one in shared if one not in late]
        options = [*early, *own[:at], *late, *own[at:]]

        def call(**given: Any) -> None:
            chosen = Chosen(**{one.name: given.pop(one.name) for one in shared})
            command(chosen, **given)

        call.__doc__, call.__name__, call.__module__ = command.__doc__, command.__name__, command.__module__
        call.__annotations__ = {one.name: one.annotation for one in options}
        signature = inspect.Signature([one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in options])
        call.__signature__ = signature  # type: ignore[attr-defined]
        return call

    return decorate


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
