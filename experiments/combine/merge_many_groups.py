"""Merging and measuring many groups: jobs of a bounded size, and one job.

No merged checkpoint is written.  A job is some groups of one base and one method: their task vectors are put in one
matrix, merged in blocks (:func:`merging.many.merge_many`, with the bits of the definition), loaded into one network
and measured on test images that stay in memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.combine.bench import Bench
from experiments.combine.groups import Group, Member
from experiments.combine.recipe import Evaluate, MergeMethod
from experiments.combine.rows import Row, merge_row, reference_row
from experiments.combine.source import Source
from experiments.combine.vectors import TaskVectors
from experiments.evaluate.results import JointEvaluation
from merging.many import merge_many
from merging.variances import zero_shares
from theory.errors import MergeboundError

JOB = 32
"""Groups in a job: what is lost at most, for every worker, if a run is killed."""
BLOCK = 64 << 20
"""Bytes of merged vectors at a time."""


@dataclass(frozen=True)
class Job:
    """Groups of one base that are merged by one method; without a method, experts that are measured alone.

    Attributes:
        base: digest.
        groups: to be merged.
        method: by which.
        members: to be measured alone.
    """

    base: str
    groups: tuple[Group, ...] = ()
    method: MergeMethod | None = None
    members: tuple[Member, ...] = ()

    def __len__(self) -> int:
        return len(self.groups) or len(self.members)


def reference_jobs(members: Iterable[Member], base: str, size: int = JOB) -> Iterator[Job]:
    """Experts that are measured alone; those of one task come together, so that the base's features are shared."""
    ordered = sorted(members)
    for start in range(0, len(ordered), size):
        yield Job(base, members=tuple(ordered[start : start + size]))


def merge_jobs(
    groups: Iterable[Group], method: MergeMethod, base: str, *, size: int = JOB, experts: int = 1 << 30
) -> Iterator[Job]:
    """Groups in their order, cut where a job has ``size`` of them or more than ``experts`` different experts."""
    waiting: list[Group] = []
    names: set[str] = set()
    for group in groups:
        own = {member.name for member in group.members}
        if waiting and (len(waiting) >= size or len(names | own) > experts):
            yield Job(base, tuple(waiting), method)
            waiting, names = [], set()
        waiting.append(group)
        names |= own
    if waiting:
        yield Job(base, tuple(waiting), method)


def measure_references(job: Job, bench: Bench, source: Source, vectors: TaskVectors) -> list[Row]:
    """One row for each expert: its own accuracy, and that of the base through its head."""
    rows = []
    spec = bench.evaluate
    heads = vectors.heads(job.members)
    by_task: dict[tuple[str, int], list[Member]] = {}
    for member in job.members:
        by_task.setdefault((member.task, member.split_seed), []).append(member)
    for own in by_task.values():
        starts = bench.base_through(own, heads)
        for member in own:
            state = source.state(member.run, member.step)
            joint = bench.measure([bench.vector(state)], [Group((member,), job.base)], heads, reestimate=False)[0]
            rows.append(reference_row(member, job.base, spec, joint.tasks[0], starts[member.name]))
    return rows


def measure_groups(job: Job, bench: Bench, vectors: TaskVectors, references: Mapping[str, Row]) -> list[Row]:
    """One row for each group of a job.

    Args:
        references: rows of the experts, by their names.

    Raises:
        MergeboundError: checkpoints that cannot be merged, naming the group.
    """
    assert job.method is not None
    method = job.method
    spec: Evaluate = bench.evaluate
    members = {member.name: member for group in job.groups for member in group.members}
    names = sorted(members)
    chosen = [members[name] for name in names]
    rows, heads = vectors.rows(chosen), vectors.heads(chosen)
    place = {name: index for index, name in enumerate(names)}
    subsets = [[place[member.name] for member in group.members] for group in job.groups]
    out: list[Row] = []
    for some, block, seconds in _blocks(method, rows, bench, names, subsets, job.groups):
        clamped = zero_shares(bench.space, bench.origin, block, rows)
        started = time.perf_counter()
        joints = bench.measure(list(block.unbind(0)), some, heads)
        each = (seconds / len(some), (time.perf_counter() - started) / len(some))
        out += [
            _row(group, method, spec, joint, references, bench, each, share)
            for group, joint, share in zip(some, joints, clamped, strict=True)
        ]
    return out


def _blocks(
    method: MergeMethod,
    rows: Tensor,
    bench: Bench,
    names: Sequence[str],
    subsets: Sequence[Sequence[int]],
    groups: Sequence[Group],
) -> Iterator[tuple[Sequence[Group], Tensor, float]]:
    """Merged vectors, block by block, with the seconds that they took."""
    coefficients = None
    if method.coefficients is not None:
        table = torch.zeros(len(subsets), len(names), dtype=torch.float64)
        for index, subset in enumerate(subsets):
            table[index, list(subset)] = torch.tensor(method.for_size(len(subset)), dtype=torch.float64)
        coefficients = table
    started = time.perf_counter()
    try:
        many = merge_many(
            method.method,
            bench.origin,
            rows,
            bench.space,
            bench.partition,
            names=names,
            subsets=subsets,
            coefficients=coefficients,
            seed=method.seed,
            **dict(method.settings),
        )
        size = max(1, BLOCK // max(1, bench.space.size * bench.space.dtype.itemsize))
        out = torch.empty((min(size, len(many)), bench.space.size), dtype=bench.space.dtype)
        for start, block in many.blocks(out=out):
            yield groups[start : start + len(block)], block, time.perf_counter() - started
            started = time.perf_counter()
    except MergeboundError as error:
        tasks = ", ".join(groups[0].tasks)
        raise MergeboundError(f"merging by {method.label} (groups such as {tasks}): {error}") from error


def _row(
    group: Group,
    method: MergeMethod,
    spec: Evaluate,
    joint: JointEvaluation,
    references: Mapping[str, Row],
    bench: Bench,
    seconds: tuple[float, float],
    clamped: float,
) -> Row:
    return merge_row(group, method, spec, joint, references, bench.base.architecture, seconds, clamped)
