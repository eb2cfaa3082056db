"""One cohort's work: train it piece by piece, measure every checkpoint, commit every run.

A cohort is cut into pieces of ``chunk`` runs, which are trained together.  A piece that was interrupted is trained
again as a whole, with the runs of it that are done already, because the last bits of a run may depend on what it is
stacked with; only what is missing is committed.  So an interrupted grid ends with the bits of one that was not.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from experiments.engines.measured import RESAMPLES, measure
from experiments.engines.workplace import Job, Workplace
from experiments.finetune.cohort.train import train_cohort
from experiments.grid.result import Cohort, RunResult
from experiments.grid.run_spec import RunSpec
from experiments.store import Store
from experiments.store.errors import StoreConflict

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Known:
    """What the store knows of a run: its specification and the digests of base and split."""

    run: RunSpec
    base: str
    split: str


@dataclass(frozen=True)
class Done:
    """A run that is stored: how it ended, the samples that it saw, and seconds of training."""

    digest: str
    outcome: str
    samples: int
    seconds: float


Watch = Callable[[Done], None]
TOGETHER = 0.5
"""Seconds within which results are committed together."""


def pieces(cohort: Cohort) -> list[Cohort]:
    """The parts of a cohort that are trained together, in order; each keeps the way and the options."""
    size = max(1, cohort.chunk)
    return [replace(cohort, runs=cohort.runs[k : k + size]) for k in range(0, len(cohort.runs), size)]


def known_runs(store: Store, digests: Sequence[str]) -> dict[str, Known]:
    """What the store knows of some runs."""
    return {digest: Known(store.spec(digest), *store.digests(digest)) for digest in digests}


def results_of(
    piece: Cohort,
    known: Mapping[str, Known],
    wanted: Sequence[str],
    workplace: Workplace,
    *,
    resamples: int = RESAMPLES,
) -> Iterator[tuple[str, RunResult]]:
    """Train one piece and measure it.

    Args:
        piece: from :func:`pieces`.
        known: its runs.
        wanted: digests of the results that are asked for; the others are trained along, and dropped.
        workplace: opens bases, tasks and images.
        resamples: of the bootstrap over test images.

    Raises:
        MergeboundError: data that are missing or changed, or runs that cannot be trained.
    """
    torch.set_num_threads(int(piece.options.get("threads", 1)))
    jobs = [workplace.job(known[d].run, known[d].base, known[d].split) for d in piece.runs]
    results = train_cohort(
        [job.run for job in jobs], jobs[0].network, [job.start for job in jobs], [job.train for job in jobs], piece
    )
    for digest, job, result in zip(piece.runs, jobs, results, strict=True):
        if digest in wanted:
            yield digest, measured(job, result, resamples)


def measured(job: Job, result: RunResult, resamples: int = RESAMPLES) -> RunResult:
    """A result with the numbers of its checkpoints."""
    return replace(result, metrics=(*result.metrics, *measure(job, result.states, resamples=resamples)))


def run_cohort(
    store_folder: str | Path | Store,
    cohort: Cohort,
    root: str | Path | None = None,
    *,
    owner: str = "",
    device: str = "cpu",
    workplace: Workplace | None = None,
    resamples: int = RESAMPLES,
    watch: Watch | None = None,
    stop: Callable[[], bool] | None = None,
) -> int:
    """Do what is missing of a cohort, and commit it run by run; returns how many runs were done.

    Args:
        store_folder: a store that is open for writing, or its folder.
        cohort: of the frozen plan.
        root: folder of the data sets.
        owner: who does it, for the store's record.
        device: where it is trained.
        workplace: of this process, where it has one already.
        resamples: of the bootstrap over test images.
        watch: is told of every committed run.
        stop: asked between runs; true ends the work.

    Raises:
        MergeboundError: see :func:`results_of`; the store's errors.
    """
    if not isinstance(store_folder, Store):
        with Store.open(store_folder) as store:
            return run_cohort(
                store, cohort, root, owner=owner, device=device, workplace=workplace, resamples=resamples, watch=watch,
                stop=stop,
            )  # fmt: skip
    place = workplace or Workplace(store_folder.base, root, device=device)
    new = 0
    for done in committed(store_folder, cohort, place, owner=owner, resamples=resamples):
        new += 1
        if watch is not None:
            watch(done)
        if stop is not None and stop():
            break
    return new


def committed(
    store: Store, cohort: Cohort, workplace: Workplace, *, owner: str = "", resamples: int = RESAMPLES
) -> Iterator[Done]:
    """Do what is missing of a cohort; a run that comes out is stored."""
    for piece in pieces(cohort):
        missing = store.missing(piece)
        if missing:
            known = known_runs(store, piece.runs)
            yield from stored(store, results_of(piece, known, missing, workplace, resamples=resamples), owner)


def stored(
    store: Store, results: Iterable[tuple[str, RunResult]], owner: str, *, every: float = TOGETHER
) -> Iterator[Done]:
    """Commit results as they come; those of one moment together, so that short runs share a transaction and a file.

    Args:
        store: open for writing.
        results: by digest.
        owner: who did them.
        every: seconds for which results wait for others.
    """
    waiting: dict[str, RunResult] = {}
    began = time.monotonic()
    for digest, result in results:
        waiting[digest] = result
        if time.monotonic() - began >= every:
            yield from commit_all(store, waiting, owner)
            waiting, began = {}, time.monotonic()
    if waiting:
        yield from commit_all(store, waiting, owner)


def commit_all(store: Store, results: Mapping[str, RunResult], owner: str) -> list[Done]:
    """Commit runs in one transaction; what another runner has stored with other bits stays, with a warning."""
    try:
        store.commit_many(results, owner=owner)
    except StoreConflict as error:
        _log.warning("%s", error)
    return [done_of(digest, result) for digest, result in results.items()]


def done_of(digest: str, result: RunResult) -> Done:
    """What to tell about a result."""
    return Done(digest, result.outcome, int(result.log.batch_size.sum()), float(result.seconds))
