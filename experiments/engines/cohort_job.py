"""One cohort's work: train it piece by piece, measure every checkpoint, commit every run.

A cohort is cut into pieces of ``chunk`` runs, which are trained together.  A piece that was interrupted is trained
again as a whole, with the runs of it that are done already, because the last bits of a run may depend on what it is
stacked with; only what is missing is committed.  So an interrupted grid ends with the bits of one that was not.

Results of one moment are committed together, those of several short pieces too: a commit waits for the disk, and to
wait once for fifty short runs costs each of them next to nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
TOGETHER = 2.0
"""Seconds for which results wait for others, to be committed with them; a killed process loses them."""
_MOST = 256 << 20


def pieces(cohort: Cohort) -> list[Cohort]:
    """The parts of a cohort that are trained together, in order; each keeps the way and the options."""
    size = max(1, cohort.chunk)
    return [replace(cohort, runs=cohort.runs[k : k + size]) for k in range(0, len(cohort.runs), size)]


def known_runs(store: Store, digests: Sequence[str]) -> dict[str, Known]:
    """What the store knows of some runs."""
    return {digest: Known(*found) for digest, found in store.known(digests).items()}


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
        stop: asked after every run, which is then committed by itself; true ends the work.

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
    wait = TOGETHER if stop is None else 0.0
    for done in committed(store_folder, cohort, place, owner=owner, resamples=resamples, wait=wait):
        new += 1
        if watch is not None:
            watch(done)
        if stop is not None and stop():
            break
    return new


def committed(
    store: Store,
    cohort: Cohort,
    workplace: Workplace,
    *,
    owner: str = "",
    resamples: int = RESAMPLES,
    wait: float = TOGETHER,
) -> Iterator[Done]:
    """Do what is missing of a cohort; a run that comes out is stored."""
    waiting = Together(store, owner, wait)
    try:
        for piece in pieces(cohort):
            missing = store.missing(piece)
            if not missing:
                continue
            began = time.monotonic()
            known = known_runs(store, piece.runs)
            for digest, result in results_of(piece, known, missing, workplace, resamples=resamples):
                waiting.add(digest, result)
                if waiting.due():
                    yield from waiting.commit()
            if time.monotonic() - began >= wait:  # the next piece will take as long
                yield from waiting.commit()
    except Exception:
        waiting.commit()  # what came out before is not lost
        raise
    yield from waiting.commit()


class Together:
    """Results that wait for others, so that they share a transaction and a file.

    Args:
        store: open for writing.
        owner: who did them.
        wait: seconds from the first that waits until all are due.
    """

    def __init__(self, store: Store, owner: str, wait: float = TOGETHER) -> None:
        self._store, self._owner, self._wait = store, owner, wait
        self._results: dict[str, RunResult] = {}
        self._since, self._bytes = 0.0, 0

    def add(self, digest: str, result: RunResult) -> None:
        """One more result."""
        if not self._results:
            self._since, self._bytes = time.monotonic(), 0
        self._results[digest] = result
        self._bytes += sum(tensor.nbytes for state in result.states.values() for tensor in state.values())

    def due(self) -> bool:
        """Whether the first has waited for long enough, or they take much memory."""
        return bool(self._results) and (time.monotonic() - self._since >= self._wait or self._bytes >= _MOST)

    def commit(self) -> list[Done]:
        """Commit what waits; what another runner has stored with other bits stays, with a warning."""
        results, self._results = self._results, {}
        if not results:
            return []
        try:
            self._store.commit_many(results, owner=self._owner)
        except StoreConflict as error:
            _log.warning("%s", error)
        return [done_of(digest, result) for digest, result in results.items()]


def done_of(digest: str, result: RunResult) -> Done:
    """What to tell about a result."""
    return Done(digest, result.outcome, int(result.log.batch_size.sum()), float(result.seconds))
