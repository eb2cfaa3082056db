"""Merge and write, the way that was chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from experiments.merge_job.job import Job, Stage, naming
from experiments.merge_job.resources import Resources
from experiments.merge_job.routes import Route, route
from experiments.merge_job.whole import merge
from experiments.merge_job.writing import write


def execute(
    job: Job,
    record: Mapping[str, Any],
    resources: Resources | None = None,
    tell: Stage = lambda stage: None,
    progress: Callable[[int, int], None] | None = None,
    chosen: Route | None = None,
) -> Path:
    """Merge and write: in chunks and bounded memory where the method allows it, in memory otherwise.

    Args:
        job: the merge, with a target.
        record: kept in the files.
        resources: what may be used.
        tell: called with the name of each stage.
        progress: called with the bytes of the result that are done, and how many there will be: at the start (where an
            interrupted merge had come) and whenever some are done; of merges in chunks only.
        chosen: what :func:`route` said; default: it is asked.

    Returns:
        What to open.

    Raises:
        CheckpointError: an input cannot be read or holds NaN, or the disk refuses.
        MethodError: the result overflows, or the merge does not fit into ``max_memory``.
    """
    given = Resources() if resources is None else resources
    taken = route(job, given) if chosen is None else chosen
    streamed = taken.streamed
    if streamed is None:
        return write(job, merge(job, tell, taken.device), record)
    tell(f"merging with {job.method.name}")
    with naming(job.paths):
        return streamed.write(job, record, given, progress)
