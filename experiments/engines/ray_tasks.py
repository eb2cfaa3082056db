"""What a Ray worker does with a cohort: train it, and send its results or commit them.

The first thing that it sends is the machine that it is on.  Generators, without ``yield from``: Ray sends values into
them, which that would pass on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from experiments.engines.ray_cluster import START_LIMIT
from experiments.grid.result import Cohort, RunResult
from experiments.store import Store

if TYPE_CHECKING:
    from experiments.bases.base import Base
    from experiments.engines.cohort_job import Done, Known


def collected(
    cohort: Cohort,
    known: Mapping[str, Known],
    wanted: tuple[str, ...],
    bases: Mapping[str, Any],
    root: str | None,
    device: str,
    resamples: int,
) -> Iterator[tuple[str, RunResult] | str]:
    """Train a cohort and send its results, one by one."""
    import ray

    from experiments.engines.cohort_job import pieces, results_of
    from experiments.engines.workplace import Workplace
    from experiments.finetune.cohort.planner import machine

    yield machine(device)

    def base_of(digest: str) -> Base:
        found: Base = ray.get(bases[digest], timeout=START_LIMIT)
        return found

    place = Workplace(base_of, root, device=device)
    for piece in pieces(cohort):
        missing = [digest for digest in piece.runs if digest in wanted]
        if missing:
            for found in results_of(piece, known, missing, place, resamples=resamples):  # noqa: UP028
                yield found


def stored(
    folder: str, cohort: Cohort, root: str | None, owner: str, device: str, resamples: int
) -> Iterator[Done | str]:
    """Train a cohort and commit its results into a store on a shared disk."""
    from experiments.engines.cohort_job import committed
    from experiments.engines.workplace import Workplace
    from experiments.finetune.cohort.planner import machine

    yield machine(device)
    with Store.open(folder) as store:
        place = Workplace(store.base, root, device=device)
        for done in committed(store, cohort, place, owner=owner, resamples=resamples):  # noqa: UP028
            yield done
