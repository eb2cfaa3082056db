"""``combine``: merge and measure the groups of a design, in the store of the grid; a second call goes on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd

from experiments.combine.bench import TEST_MEMORY
from experiments.combine.clamped import clamped_counts
from experiments.combine.groups import Group, Member
from experiments.combine.merge_many_groups import BLOCK, JOB, Job, merge_jobs, reference_jobs
from experiments.combine.recipe import Evaluate, MergeMethod, as_methods, merge_key, reference_key
from experiments.combine.rows import MERGE, REFERENCE, Row, drawn_row, table_of
from experiments.combine.source import Source
from experiments.combine.testing import Opener
from experiments.combine.vectors import MEMORY
from experiments.combine.work import JOB_LIMIT, Setup, Task, Worker, Workers, do_here
from experiments.tasks.dataset import ImageTask
from theory.errors import MergeboundError

_log = logging.getLogger(__name__)
_DRAWN_ROWS = 10_000


@dataclass(frozen=True)
class Progress:
    """How far it is.

    Attributes:
        phase: ``experts`` (each alone) or ``merges``.
        done: in this call.
        total: to be done in this call.
        kept: merges that were there before.
        seconds: since the phase began.
    """

    phase: str
    done: int
    total: int
    kept: int
    seconds: float

    @property
    def rate(self) -> float:
        """How many a second."""
        return self.done / self.seconds if self.seconds > 0 else 0.0


Watch = Callable[[Progress], None]


def combine(
    store: Source | str | Path,
    design: Iterable[Group],
    methods: Sequence[str | MergeMethod],
    *,
    evaluate: Evaluate | None = None,
    root: str | Path | None = None,
    open_task: Opener | None = None,
    workers: int = 1,
    watch: Watch | None = None,
    memory: int = MEMORY,
    test_memory: int = TEST_MEMORY,
    scratch: str | Path | None = None,
    job: int = JOB,
    job_limit: float = JOB_LIMIT,
    device: str = "cpu",
) -> pd.DataFrame:
    """Merge every group by every method and measure it on its tasks' test images.

    Rows go into the store job by job, each job all or none, so that a run may be killed at any moment; what is there
    is not measured again.  Before its first merge, every expert is measured alone, and the base through its head.

    Args:
        store: of a grid that was run, or its folder.
        design: :func:`~experiments.combine.designs.by_factor`, :func:`~experiments.combine.designs.random_groups`,
            :func:`~experiments.combine.designs.all_groups`, or groups of one's own.
        methods: names, or with settings.
        evaluate: what is measured.
        root: folder of the data sets.
        open_task: opens tasks instead of :func:`experiments.tasks.named.open_task`.
        workers: processes of one thread each; 1 works in this process.
        watch: is told the progress after every job.
        memory: bytes of task vectors that all workers keep together; what is beyond is mapped from ``scratch``.
        test_memory: bytes of test images, likewise; what is beyond is read again.
        scratch: folder for task vectors; default: the folder of the system for temporary files.
        job: groups at a time, for each worker.
        job_limit: seconds that a worker may take for them.
        device: where networks run; ``cuda`` with one worker only.

    Returns:
        One row for each group and method, in their order: what the group was drawn for, metrics, those of its experts
        and of the base, normalised performance, and ``clamped``, the share of BatchNorm's running variances that the
        merge made negative (they were set to 0; one warning for each method that did so).

    Raises:
        MergeboundError: a method, design, store or data that do not fit; refused before anything runs where that can
            be seen.
    """
    spec = Evaluate() if evaluate is None else evaluate
    spec.check()
    chosen = as_methods(methods)
    if workers < 1 or job < 1:
        raise MergeboundError(f"workers = {workers}, job = {job}: give 1 or more of each")
    groups = list(design)
    if not groups:
        raise MergeboundError("the design has no groups; see its count")
    for method in chosen:
        method.check(sorted({len(group.members) for group in groups}))
    with ExitStack() as stack:
        source = _opened(store, stack)
        folder = getattr(source, "folder", None)
        if workers > 1 and folder is None:
            raise MergeboundError(f"workers = {workers}: needs a store on the disk; use one worker")
        before = source.merges()
        known = set(before["key"]) if len(before) else set()
        references = _references(before)
        keys = [(group, method, merge_key(group, method, spec)) for method in chosen for group in groups]
        pending: dict[str, tuple[Group, MergeMethod]] = {
            key: (group, method) for group, method, key in keys if key not in known
        }
        kept = len({key for _, _, key in keys} & known)
        drawn = {group.key: drawn_row(group, spec) for group in groups if group.key not in known}
        _add(source, list(drawn.values()))
        if pending:
            setup = Setup(
                partial(_reopen, Path(folder)) if workers > 1 and folder is not None else lambda: source,
                open_task if open_task is not None else partial(_open_named, root),
                spec,
                _members(group for group, _ in pending.values()),
                _double(source),
                memory // workers,
                test_memory // workers,
                None if scratch is None else Path(scratch),
                device,
            )
            _run(setup, source, list(pending.values()), references, workers, job, job_limit, kept, watch)
        table = table_of(groups, chosen, spec, source.merges())
    if spec.batchnorm == "merged":
        for found in clamped_counts(table):
            if found.merges:
                _log.warning("%s", found.words)
    return table


def _run(
    setup: Setup,
    source: Source,
    pending: Sequence[tuple[Group, MergeMethod]],
    references: dict[str, Row],
    workers: int,
    size: int,
    job_limit: float,
    kept: int,
    watch: Watch | None,
) -> None:
    lacking = {
        base: [m for m in members if reference_key(m, base, setup.evaluate) not in references]
        for base, members in setup.members.items()
    }
    alone = [one for base, members in lacking.items() for one in reference_jobs(members, base, size)]
    merging = list(_merge_jobs(setup, source, pending, size))
    with ExitStack() as stack:
        pool = stack.enter_context(Workers(setup, workers, job_limit=job_limit)) if workers > 1 else None
        worker = Worker(setup) if pool is None else None

        def work(phase: str, jobs: Sequence[Job], tasks: Iterator[Task]) -> None:
            started, done, total = time.monotonic(), 0, sum(len(one) for one in jobs)
            if pool is not None:
                results = pool.do(tasks)
            else:
                assert worker is not None
                results = do_here(tasks, worker)
            for one, rows in results:
                source.add_merges(rows)
                references.update({row["key"]: row for row in rows if row["kind"] == REFERENCE})
                done += len(one)
                if watch is not None:
                    watch(Progress(phase, done, total, kept, time.monotonic() - started))

        work("experts", alone, ((one, {}) for one in alone))
        work("merges", merging, ((one, _of(one, references, setup.evaluate)) for one in merging))


def _merge_jobs(setup: Setup, source: Source, pending: Sequence[tuple[Group, MergeMethod]], size: int) -> Iterator[Job]:
    """Jobs of one base and method whose task vectors take at most half of the memory."""
    for base in setup.members:
        state = source.base(base).state
        width = sum(tensor.numel() * max(4, tensor.element_size()) for tensor in state.values())
        experts = max(1, (setup.memory - min(BLOCK, setup.memory // 4)) // 2 // max(1, width))
        methods: list[MergeMethod] = []
        for group, method in pending:
            if group.base == base and method not in methods:
                methods.append(method)
        for method in methods:
            own = (group for group, by in pending if group.base == base and by == method)
            yield from merge_jobs(own, method, base, size=size, experts=experts)


def _of(job: Job, references: Mapping[str, Row], spec: Evaluate) -> dict[str, Row]:
    """References of a job's experts, by their names."""
    members = {member for group in job.groups for member in group.members}
    return {member.name: references[reference_key(member, job.base, spec)] for member in members}


def _members(groups: Iterable[Group]) -> dict[str, tuple[Member, ...]]:
    found: dict[str, dict[Member, None]] = {}
    for group in groups:
        found.setdefault(group.base, {}).update(dict.fromkeys(group.members))
    return {base: tuple(sorted(members)) for base, members in sorted(found.items())}


def _references(merges: pd.DataFrame) -> dict[str, Row]:
    if not len(merges):
        return {}
    rows = merges[merges["kind"] == REFERENCE].dropna(axis=1, how="all").to_dict("records")
    return {str(row["key"]): {str(name): value for name, value in row.items()} for row in rows}


def _double(source: Source) -> frozenset[str]:
    """Bases with experts of float64 weights."""
    frame = source.frame()
    if "precision" not in frame.columns:
        return frozenset()
    return frozenset(frame.loc[frame["precision"] == "float64", "base_digest"].astype(str))


def _add(source: Source, rows: Sequence[Row]) -> None:
    for start in range(0, len(rows), _DRAWN_ROWS):
        source.add_merges(rows[start : start + _DRAWN_ROWS])


def _opened(store: Source | str | Path, stack: ExitStack) -> Source:
    if not isinstance(store, str | Path):
        return store
    from experiments.store import Store

    return stack.enter_context(Store.open(store, "w"))


def _reopen(folder: Path) -> Source:
    """The store for reading, in a worker."""
    from experiments.store import Store

    return Store.open(folder, "r")


def _open_named(root: str | Path | None, name: str, seed: int) -> ImageTask:
    from experiments.tasks.named import open_task

    return open_task(name, root, seed=seed)


def merged_count(merges: pd.DataFrame) -> int:
    """How many merges a store holds."""
    return int((merges["kind"] == MERGE).sum()) if len(merges) and "kind" in merges.columns else 0
