"""About how much memory a cohort needs, for placing it on a machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from experiments.grid.result import Cohort
from experiments.store import Store

if TYPE_CHECKING:
    from experiments.engines.cohort_job import Known

PROCESS = 800 << 20
"""Bytes of a process that has loaded torch."""
COPIES = 6
"""Of an expert's weights while it is trained: weights, gradient, two moments, a copy for the last finite step, x_0."""


def memory_needed(cohort: Cohort, known: Mapping[str, Known], store: Store) -> int:
    """Bytes for the process, the experts of one piece with their checkpoints, and as much again for a batch.

    Images come on top where they are large; a claim with :class:`experiments.engines.ray.Share` says so.  Where the
    plan has measured the need (option ``memory`` of the cohort), that counts.
    """
    planned = cohort.options.get("memory")
    if isinstance(planned, int | float) and planned > 0:
        return int(planned) + PROCESS
    largest = 0
    for digest in dict.fromkeys(each.base for each in known.values()):
        state = store.base(digest).state
        largest = max(largest, sum(tensor.numel() * tensor.element_size() for tensor in state.values()))
    kept = max(len(each.run.checkpoints) for each in known.values())
    return PROCESS + 2 * max(1, cohort.chunk) * largest * (COPIES + kept)
