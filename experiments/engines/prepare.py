"""Before the first run of a grid: runs are named, bases are made, the plan is measured and frozen; all in the store.

Every step looks at what is there already, so a preparation that was interrupted goes on, and a grid that was begun with
fewer runs grows.  One runner prepares at a time; others wait for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from experiments.bases.spec import BaseSpec
from experiments.engines.errors import EngineError
from experiments.engines.growing import check_grown, outside
from experiments.engines.workplace import Workplace
from experiments.grid.bases import open_base
from experiments.grid.result import Plan
from experiments.grid.run_spec import RunSpec
from experiments.spec import NUMERICS_VERSION
from experiments.store import Store
from experiments.store.columns import OTHER, base_text
from experiments.tasks.named import anchored, open_task

_log = logging.getLogger(__name__)
LOCK, BASES = "prepare.lock", "bases"
PATIENCE = 3600.0
"""Seconds to wait for another runner that prepares the same store."""

Report = Callable[[str], None]
"""Is told what is being done, one line."""
Planner = Callable[..., Plan]


@dataclass(frozen=True)
class Prepared:
    """What a preparation found: runs of the grid, those that it added to the store, and the frozen plan."""

    runs: int
    added: int
    plan: Plan


def prepare(
    folder: str | Path,
    runs: Sequence[RunSpec],
    meta: Mapping[str, Any],
    *,
    root: str | Path | None = None,
    device: str = "cpu",
    download: bool = False,
    task_vectors: str | None = None,
    durable: bool = True,
    extend: bool = False,
    planner: Planner | None = None,
    patience: float = PATIENCE,
    report: Report | None = None,
) -> Prepared:
    """Make a store ready for the engines.

    Args:
        folder: of the store; made where there is none.
        runs: of the grid.
        meta: ``grid`` (content of the specification, JSON data), ``digest`` (of it), ``folder`` (that relative paths of
            the grid start from; default: the current one), and anything else to be kept.
        root: of the data sets.
        device: where the grid will run.
        download: allow the network, for bases.
        task_vectors: of a new store (:meth:`experiments.store.store.Store.create`); default: lossless, or what a store
            that is there has.
        durable: of a new store.
        extend: take a store of another grid whose runs are all among these: it becomes this grid's, and what it holds
            is not done again.
        planner: stands in for :func:`experiments.finetune.cohort.planner.make_plan`.
        patience: see :data:`PATIENCE`.
        report: see :data:`Report`.

    Raises:
        EngineError: the store belongs to another grid (with ``extend``: holds runs that are not of this one), keeps its
            task vectors in another way, or another runner prepares it for too long.
        MergeboundError: a base or task that cannot be opened.
    """
    tell = report or _log.info
    place = Path(folder)
    with _alone(place, patience, tell):
        begun_in = str(meta.get("folder") or Path.cwd())
        about = {**meta, "root": None if root is None else str(Path(root).resolve()), "numerics": NUMERICS_VERSION}
        about["folder"] = begun_in
        options: dict[str, Any] = {"task_vectors": task_vectors or "lossless", "durable": durable}
        with Store.create(place, about, exist_ok=True, **options) as store:
            if task_vectors not in (None, store.task_vectors):
                raise EngineError(
                    f"{place}: keeps task vectors in the way {store.task_vectors}, not {task_vectors}; leave "
                    "--task-vectors out, or choose an empty folder with --store"
                )
            grown = extend and store.meta.get("digest") != meta.get("digest")
            check_same_grid(store, {**meta, "digest": store.meta.get("digest")} if grown else meta)
            added = _add_runs(store, anchored_runs(runs, begun_in), root, device, download, tell, whole=grown)
            if grown:
                before = [*store.meta.get("extended", []), store.meta.get("digest")]
                store.set_meta({**about, "extended": before})
                tell(f"the grid has grown: {added} runs are new")
            plan = _plan(store, root, device, planner, tell)
    return Prepared(len(runs), added, plan)


def check_same_grid(store: Store, meta: Mapping[str, Any]) -> None:
    """Refuse a store of another grid or of another numerics version.

    Raises:
        EngineError: it is.
    """
    kept = store.meta
    if kept.get("digest") != meta.get("digest"):
        name = (kept.get("grid") or {}).get("name", "another grid")
        raise EngineError(
            f"{store.folder}: holds the grid {name!r} with another specification; resume that one (`mergebound "
            "grid resume`), let it grow to this one (`grid run --extend`), or choose an empty folder with --store"
        )
    if kept.get("numerics") != NUMERICS_VERSION:
        raise EngineError(
            f"{store.folder}: was begun with numerics version {kept.get('numerics')}, this is {NUMERICS_VERSION}; go "
            "on with the version that it was begun with, or choose an empty folder"
        )


def spread(runs: Sequence[RunSpec], most: int | None) -> tuple[RunSpec, ...]:
    """At most so many runs, evenly spread over the grid, first and last included."""
    if most is None or most >= len(runs):
        return tuple(runs)
    if most < 1:
        raise EngineError(f"--limit-runs {most}: give 1 or more")
    rows = np.unique(np.linspace(0, len(runs) - 1, most).round().astype(int))
    return tuple(runs[int(row)] for row in rows)


def anchored_runs(runs: Sequence[RunSpec], folder: str | Path | None = None) -> tuple[RunSpec, ...]:
    """Runs whose tasks' and weights' paths are absolute, so that workers and resumes in any folder find them.

    A run's digest does not depend on either.  Relative weights that are not below ``folder`` stay as they are: they are
    looked up below the folder of the data sets.

    Args:
        runs: of a grid.
        folder: that relative paths start from; default: the current one.
    """
    start = Path.cwd() if folder is None else Path(folder)
    tasks = {name: anchored(name, start) for name in {run.task for run in runs}}
    bases: dict[str, BaseSpec] = {}
    for run in runs:
        weights = run.base.weights
        if weights is not None and _key(run.base) not in bases:
            given = start / weights.expanduser()
            bases[_key(run.base)] = run.base.model_copy(update={"weights": given if given.exists() else weights})
    if not bases and all(name == absolute for name, absolute in tasks.items()):
        return tuple(runs)
    return tuple(
        run.model_copy(update={"task": tasks[run.task]} | ({"base": bases[_key(run.base)]} if run.base.weights else {}))
        for run in runs
    )


def _add_runs(
    store: Store,
    runs: Sequence[RunSpec],
    root: str | Path | None,
    device: str,
    download: bool,
    tell: Report,
    *,
    whole: bool = False,
) -> int:
    """Add the runs that the store does not know; ``whole`` refuses a store with runs that are not among them."""
    if whole:  # before a base is made
        check_grown(store, outside(store, runs))
    old_splits, old_bases = store.sources()
    splits: dict[tuple[str, int], str] = {}
    for task, seed in dict.fromkeys((run.task, run.split_seed) for run in runs):
        splits[task, seed] = open_task(task, root, seed=seed).digest
        if old_splits.get((task, seed), splits[task, seed]) != splits[task, seed]:
            raise EngineError(
                f"task {task}: its images or their split are not those that the grid began with; give the --root that "
                "it began with, or start in an empty store"
            )
    bases = _bases(store, runs, root, device, download, tell)
    for run in {_key(run.base): run for run in runs}.values():
        if old_bases.get(base_text(run), bases[_key(run.base)]) != bases[_key(run.base)]:
            raise EngineError(
                f"the base {run.architecture} ({run.base.kind}) is not the one that the grid began with: its tensors "
                "have changed; give the weights that it began with, or start in an empty store"
            )
    named: dict[str, RunSpec] = {}
    of_base: dict[str, str] = {}
    of_split: dict[str, str] = {}
    for run in runs:
        base, split = bases[_key(run.base)], splits[run.task, run.split_seed]
        digest = run.digest(base=base.partition(OTHER)[0], split=split)
        if digest in named:
            raise EngineError(
                f"tasks {named[digest].task} and {run.task} hold the same images, so that their runs would be the "
                "same; name the data set once"
            )
        named[digest], of_base[digest], of_split[digest] = run, base, split
    if whole:
        check_grown(store, [digest for digest in store.runs() if digest not in named])
    return store.add_runs(named, of_base, of_split)


def _bases(
    store: Store, runs: Sequence[RunSpec], root: str | Path | None, device: str, download: bool, tell: Report
) -> dict[str, str]:
    """What every base is called in the store; those that it does not have are made and added."""
    found: dict[str, str] = {}
    for spec in {_key(run.base): run.base for run in runs}.values():
        words = "pretraining" if spec.kind == "pretrain" else "opening"
        tell(f"{words} the base {spec.architecture} ({spec.kind}, seed {spec.seed})")
        base = open_base(spec, root, cache=store.folder / BASES, download=download, device=device)
        found[_key(spec)] = store.add_base(base)
    return found


def _plan(store: Store, root: str | Path | None, device: str, planner: Planner | None, tell: Report) -> Plan:
    """The frozen plan, with cohorts for runs that have none yet."""
    frozen = store.plan()
    if frozen is not None and frozen.device.partition(":")[0] != device.partition(":")[0]:
        raise EngineError(
            f"{store.folder}: its plan was made for {frozen.device}, not for {device}; go on with --device "
            f"{frozen.device}, or choose an empty folder"
        )
    loose = store.unplanned()
    if not loose:
        if frozen is None:
            raise EngineError(f"{store.folder}: has no runs; run the grid again")
        return frozen
    if planner is None:
        from experiments.finetune.cohort.planner import make_plan

        planner = make_plan
    place = Workplace(store.base, root, device=device)
    tell(f"measuring how {len(loose)} runs are trained fastest")
    runs = {digest: store.spec(digest) for digest in loose}
    digests = {id(run): store.digests(digest) for digest, run in runs.items()}

    def open_network(run: RunSpec) -> Any:
        job = place.job(run, *digests[id(run)])
        return job.network, job.start, job.train

    made = planner(runs, open_network=open_network, device=device)
    if frozen is not None:  # names are counted on, so that cohorts of two plans differ
        made = replace(made, cohorts=tuple(replace(c, name=f"{c.name}-{len(frozen.cohorts)}") for c in made.cohorts))
    store.freeze(made)
    plan = store.plan()
    assert plan is not None  # just frozen
    return plan


def _key(spec: BaseSpec) -> str:
    return spec.model_dump_json()


@contextmanager
def _alone(folder: Path, patience: float, tell: Report) -> Iterator[None]:
    """One process at a time; the lock ends with its process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(timeout=0.1)
        except Timeout:
            tell("waiting for another runner that prepares this store")
            lock.acquire(timeout=patience)
    except Timeout as error:
        raise EngineError(
            f"{folder}: another runner has prepared it for more than {patience:.0f} s; end that one, then run again"
        ) from error
    except OSError as error:
        raise EngineError(
            f"{folder}: cannot be written ({error.strerror}); choose another folder with --store, or change its rights"
        ) from error
    try:
        yield
    finally:
        lock.release()


def tidy(folder: str | Path) -> int:
    """Delete what killed runners left behind in a store that is complete and that nobody works on; counts the files."""
    place = Path(folder)
    try:
        with FileLock(place / LOCK).acquire(timeout=1.0), Store.open(place) as store:
            if store.missing() or store.status().leases:
                return 0
            return len(store.gc(older_than=0.0).files)
    except Timeout:  # another runner prepares more runs
        return 0
