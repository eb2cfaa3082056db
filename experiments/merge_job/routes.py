"""Which way a merge is made, in chunks or by definition, and what that will take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any

from experiments.merge_job.chunks import StreamedMerge, streamed_merge
from experiments.merge_job.job import Job
from experiments.merge_job.resources import Resources
from experiments.merge_job.whole import is_tensorwise
from merging.errors import MethodError
from merging.lazy import specs
from merging.remote_path import url_of

if TYPE_CHECKING:
    from merging.streaming.build import Batch

STREAMED_FROM = 1 << 28
"""Bytes of all inputs together from which merging in chunks by compiled loops pays."""


@dataclass(frozen=True)
class Route:
    """How a merge will be made.

    Attributes:
        streamed: in chunks; ``None``: by the method's definition, see ``how``.
        how: in words.
        device: where tensors are merged that are merged as a whole.
    """

    streamed: StreamedMerge | None
    how: str
    device: str = "cpu"


def route(job: Job, resources: Resources | None = None, *, timed: bool = False) -> Route:
    """Choose between chunks and the method's definition.

    Args:
        job: the merge.
        resources: what may be used.
        timed: measure the programs, for the plan's estimate of time.

    Raises:
        MethodError: the merge does not fit into ``max_memory``, or would leave a device other than the processor idle.
    """
    given = Resources() if resources is None else resources
    large = sum(specs(state)[n].nbytes for state in job.inputs for n in job.states.parts.coordinates) >= STREAMED_FROM
    paths = [path for path in (job.spec.out, job.spec.base, *job.spec.experts) if path is not None]
    large = large or any(url_of(path) is not None for path in paths)  # read ahead; uploads that can go on
    wanted = given.streamed or (given.streamed is None and (large or given.max_memory is not None))
    if wanted:
        streamed = None if job.spec.for_expert is not None else streamed_merge(job, given, timed=timed)
        if streamed is not None:
            if all(batch.program is not None for batch in streamed.plan.batches if batch.names):
                _refuse_idle(job, given, "in chunks")
            return Route(streamed, "in chunks", given.device)
        if given.max_memory is not None:
            raise MethodError(
                f"--max-memory: method '{job.method.name}' needs all tensors at once with these settings: leave "
                "--max-memory out, or choose a method or scope that merges tensor by tensor"
            )
    if is_tensorwise(job):
        return Route(None, "tensor by tensor", given.device)
    _refuse_idle(job, given, "with all tensors in memory")
    return Route(None, "all tensors at once")


def _refuse_idle(job: Job, resources: Resources, how: str) -> None:
    if resources.device != "cpu":
        raise MethodError(
            f"--device {resources.device}: method '{job.method.name}' merges these checkpoints {how}, on the "
            "processor: leave --device out, or choose a method or scope that merges tensor by tensor"
        )


def outline(job: Job, chosen: Route) -> dict[str, Any]:
    """What a merge will do, as plain data: programs, passes, bytes, memory and time.

    ``memory`` is in bytes, buffers only: of a merge in chunks an upper bound; else the inputs and the result of what is
    merged at the same time as float32, to which methods add copies of their own.  ``seconds`` is ``None`` where
    nothing was measured.
    """
    if chosen.streamed is None:
        described = [specs(state) for state in job.inputs]
        sizes = [job.specs[name].numel for name in job.parts.coordinates]
        entries = max(sizes, default=0) if chosen.how == "tensor by tensor" else sum(sizes)
        return {
            "how": chosen.how,
            "programs": [{"program": "definition", "tensors": len(sizes), "entries": sum(sizes), "passes": 1}],
            "passes": 1,
            "read": sum(found[n].nbytes for found in described for n in job.parts.coordinates if n in found),
            "written": sum(spec.nbytes for spec in job.specs.values()),
            "memory": 4 * entries * (len(job.inputs) + 1),
            "seconds": None,
            "device": chosen.device,
        }
    plan = chosen.streamed.plan
    programs = [
        {
            "program": "definition, tensor by tensor" if b.program is None else _PROGRAMS.get(_kind(b), _kind(b)),
            "tensors": len(b.names),
            "entries": sum(job.specs[name].numel for name in b.names),
            "passes": 1 if b.program is None else b.program.passes,
        }
        for b in plan.batches
        if b.names
    ]
    if chosen.streamed.copied:
        entries = sum(job.specs[name].numel for name in chosen.streamed.copied)
        programs.append({"program": "copy", "tensors": len(chosen.streamed.copied), "entries": entries, "passes": 1})
    return {
        "how": chosen.how,
        "programs": programs,
        "passes": plan.passes,
        "read": plan.read,
        "written": plan.written,
        "memory": plan.memory,
        "seconds": plan.seconds if isfinite(plan.seconds) else None,
        "threads": plan.threads,
        "chunk": plan.chunk,
        "device": chosen.device,
    }


_PROGRAMS: Mapping[str, str] = {
    "Linear": "linear combination",
    "Elected": "trim, elect, aggregate",
    "Dropped": "random masks, linear combination",
    "Largest": "largest magnitude",
    "Span": "inner products, linear combination",
    "ByDefinition": "definition, chunk by chunk",
}


def _kind(batch: Batch) -> str:
    return type(batch.program).__name__
