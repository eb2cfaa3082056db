"""Merges in chunks and bounded memory, written while they are made."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from experiments.merge_job.job import Job
from experiments.merge_job.resources import Resources
from experiments.merge_job.writing import save_merge
from merging.lazy import LazyState
from merging.tensorwise import Stream
from merging.types import StateDict
from merging.writer import Outline

if TYPE_CHECKING:
    from merging.streaming.plan import Plan, Sources


@dataclass(frozen=True)
class StreamedMerge:
    """A merge in chunks: what is merged, how, and where the rest comes from."""

    stream: Stream
    plan: Plan
    copied: Sources
    also: Mapping[str, tuple[str, ...]]

    def write(
        self,
        job: Job,
        record: Mapping[str, Any],
        resources: Resources,
        progress: Callable[[int, int], None] | None,
    ) -> Path:
        """Write the merge (see :func:`execute`)."""
        from merging.streaming.output import OutputFile
        from merging.streaming.run import key_of, run

        stored = job.specs
        key = key_of(self.stream, stored, self.plan.chunk, json.dumps(dict(record), sort_keys=True, default=str))

        def fill(files: Sequence[tuple[Path, Outline]], journal: Path | None) -> None:
            targets = [OutputFile(path, outline) for path, outline in files]
            run(
                self.stream,
                self.plan,
                stored,
                self.copied,
                targets,
                also=self.also,
                journal=journal,
                key=key,
                every=resources.journal_every,
                mapped=resources.mapped,
                progress=progress,
            )

        return save_merge(job, LazyState(stored, _never), record, fill=fill, resume=key if resources.resume else None)


def streamed_merge(job: Job, resources: Resources, *, timed: bool = False) -> StreamedMerge | None:
    """The merge in chunks, or ``None`` where it needs all tensors in memory at once.

    Raises:
        MethodError: it does not fit into ``max_memory``.
    """
    from merging.streaming.plan import plan

    states, stored = job.states, job.specs
    base = None if job.spec.base is None else states.base
    coordinates = set(states.parts.coordinates)
    stream = Stream(
        job.method,
        base,
        states.base,
        states.experts,
        states.parts,
        job.groups,
        job.spec.seed,
        {name: stored[name].dtype for name in states.parts.coordinates},
        resources.device,
    )
    donor = states.base if job.spec.private_from is None else states.experts[job.spec.private_from]
    copied: dict[str, tuple[StateDict, str]] = {}
    also: dict[str, tuple[str, ...]] = {}
    for name in stored:
        canonical = job.aliases.get(name, name)
        if canonical in coordinates:
            if name != canonical:
                if stored[name].dtype != stored[canonical].dtype:
                    return None
                also[canonical] = (*also.get(canonical, ()), name)
        elif name in states.carried:
            copied[name] = (states.carried, name)
        elif states.parts.is_private(name):
            copied[name] = (donor, name)
        else:
            copied[name] = (states.base, name)
    made = plan(stream, stored, copied, threads=resources.threads, max_memory=resources.max_memory, timed=timed)
    return None if made is None else StreamedMerge(stream, made, copied, also)


def _never(name: str) -> Tensor:
    raise AssertionError(f"'{name}' is written in chunks")
