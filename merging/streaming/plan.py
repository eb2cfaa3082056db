"""What a streamed merge will do, before it does it: passes, bytes, memory, time."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from merging.errors import MethodError
from merging.lazy import LazyState, Spec, remote_memory, specs
from merging.streaming.build import Batch, build, ordered_experts
from merging.streaming.output import HELD
from merging.streaming.programs import Elected, Linear, Program, Span
from merging.streaming.selection import COLLECTED, SMALL, SPARE
from merging.streaming.source import Buffers, Inputs
from merging.tensorwise import Stream
from merging.types import StateDict

CHUNK = 1 << 18
"""Entries of a chunk, unless memory is short."""

_BETWEEN = 0.05  # share of the entries that a selection may have to look at closely
_LEAST_CHUNK = 1 << 14
_QUEUE = 4  # finished chunks for every thread that may wait to be written
_AHEAD = 3  # and that may be submitted before (see merging.streaming.run)
_FACTORS = 12.0  # float32 copies of a tensor of every expert that a thread may need for a method on whole tensors


Sources = Mapping[str, tuple[StateDict, str]]
"""Where tensors come from that are not merged: name in the result to state dict and name there."""


@dataclass(frozen=True)
class Task:
    """Entries ``start`` to ``stop`` of a tensor of the result.

    Attributes:
        batch: which program (index), or ``None``: a tensor that is copied.
    """

    name: str
    start: int
    stop: int
    batch: int | None


@dataclass(frozen=True)
class Plan:
    """A merge, cut into tasks.

    Attributes:
        batches: the programs and their tensors.
        tasks: in the order in which they are done.
        chunk: entries of a chunk.
        threads: how many compute at the same time.
        passes: how often the experts' merged tensors are read, at most (selections may need more where many entries
            are equal, or a sample misled).
        read: bytes read from the checkpoints, counting every pass.
        written: bytes of the result.
        memory: bytes of buffers that are held at the same time, at most.
        seconds: rough time on this machine, if reading keeps up.
    """

    batches: tuple[Batch, ...]
    tasks: tuple[Task, ...]
    chunk: int
    threads: int
    passes: int
    read: int
    written: int
    memory: int
    seconds: float


def plan(
    stream: Stream,
    stored: Mapping[str, Spec],
    copied: Sources | None = None,
    *,
    threads: int = 1,
    max_memory: int | None = None,
    timed: bool = False,
) -> Plan | None:
    """Plan a merge; ``None`` where it needs all tensors in memory at once.

    Args:
        stream: what is merged.
        stored: name to shape and type, of everything in the result.
        copied: where the other tensors of the result come from.
        threads: how many compute at the same time.
        max_memory: bytes of buffers at most; chunks are made smaller to fit.
        timed: measure the program for the estimate of time (a tenth of a second).

    Raises:
        MethodError: the merge cannot be done in ``max_memory``, or settings do not fit.
    """
    batches = build(stream)
    if batches is None:
        return None
    order = {name: index for index, batch in enumerate(batches) for name in batch.names}
    parts = stream.parts
    names = [*sorted(parts.shared), *sorted(parts.buffers)]
    chunk = CHUNK
    memory = _memory(stream, stored, batches, chunk, threads)
    while max_memory is not None and memory > max_memory and chunk > _LEAST_CHUNK:
        chunk //= 2
        memory = _memory(stream, stored, batches, chunk, threads)
    if max_memory is not None and memory > max_memory:
        raise MethodError(
            f"method '{stream.method.name}' needs {_size(memory)} with these checkpoints and settings, and "
            f"{_size(max_memory)} are allowed: allow more memory, use fewer threads, or a method on single entries"
        )
    tasks: list[Task] = []
    for name in names:
        batch = batches[order[name]]
        size = stored[name].numel
        step = size if batch.program is None else chunk
        tasks += [Task(name, start, min(size, start + step), order[name]) for start in range(0, size, max(1, step))]
    for name, (state, there) in (copied or {}).items():
        size = stored[name].numel
        in_file = isinstance(state, LazyState) and state.region(there) is not None
        step = chunk if in_file else max(1, size)
        tasks += [Task(name, start, min(size, start + step), None) for start in range(0, size, step)]
    states = [*([] if stream.base is None else [stream.base]), *stream.experts.values()]
    read = sum(
        specs(state)[name].nbytes * (1 if program is None else program.passes)
        for batch in batches
        for program in [batch.program]
        for name in batch.names
        for state in states
    )
    return Plan(
        tuple(batches),
        tuple(tasks),
        chunk,
        threads,
        max((1 if batch.program is None else batch.program.passes for batch in batches), default=1),
        read + sum(stored[name].nbytes for name in copied or ()),
        sum(spec.nbytes for spec in stored.values()),
        memory,
        _seconds(stream, batches, threads) if timed else float("nan"),
    )


def _memory(stream: Stream, stored: Mapping[str, Spec], batches: Sequence[Batch], chunk: int, threads: int) -> int:
    """Bytes of buffers at most, from the sizes of what :mod:`merging.streaming.run` allocates."""
    experts = len(stream.experts)
    states: list[StateDict] = [*([] if stream.base is None else [stream.base]), *stream.experts.values()]
    largest = max((stored[name].numel for batch in batches for name in batch.names), default=0)
    step = min(chunk, largest)
    converted = sum(
        any(
            not isinstance(state, LazyState) or state.region(name) is None or spec.dtype.itemsize != 4
            for name, spec in specs(state).items()
            if spec.floating
        )
        for state in states
    )
    per_thread = 4 * step * (2 + 2 * converted)
    fixed = 0
    for batch in batches:
        program = batch.program
        if program is None:
            widest = max((stored[name].numel for name in batch.names), default=0)
            queued = min(threads * _QUEUE, max(1, HELD // max(1, 4 * widest)))
            ready = min(len(batch.names), threads * _AHEAD + queued + 3)  # results that wait to be written
            fixed = max(fixed, int(widest * 4 * (threads * _FACTORS * experts + ready)))
        elif isinstance(program, Elected):
            extra = 4 * 2048 * experts + (4 * step * experts if program.mask is not None else 0)
            per_thread = max(per_thread, 4 * step * (2 + 2 * converted) + extra)
            if program.density < 1.0:
                ranked = largest if program.domain is None else sum(size for _, size in program.domain)
                room = experts * (SPARE + int(_BETWEEN * ranked))
                groups = threads if program.domain is None else 1
                collected = groups * min(COLLECTED, 4 * room)
                fixed = max(fixed, collected, 4 * max(1 << 22, SMALL) + (4 << 20))
        elif isinstance(program, Span):
            fixed = max(fixed, threads * 8 * 1024 * experts)
        else:
            per_thread = max(per_thread, 4 * step * (2 + 2 * converted + experts))
    fetched = max(
        (
            specs(state)[name].nbytes
            for state in states
            for batch in batches
            for name in batch.names
            if isinstance(state, LazyState) and state.region(name) is None
        ),
        default=0,
    )
    tasks = sum(-(-stored[name].numel // max(1, step)) for batch in batches if batch.program for name in batch.names)
    pieces = min(tasks, threads * (_AHEAD + _QUEUE) + 3)  # the buffers that merging.streaming.run uses in turn
    waiting = pieces * 4 * step + 2 * len(states) * fetched + remote_memory(states)
    return threads * per_thread + fixed + waiting


def _seconds(stream: Stream, batches: Sequence[Batch], threads: int) -> float:
    """Time of computing, from a run of every program on a small chunk of made-up entries."""
    size = 1 << 16
    experts = list(ordered_experts(stream))
    rng = np.random.default_rng(0)

    def made_up() -> StateDict:
        return {"x": torch.from_numpy(rng.standard_normal(size, dtype=np.float32))}

    inputs = Inputs(None if stream.base is None else made_up(), [made_up() for _ in experts])
    described = specs(stream.reference)
    total = 0.0
    out = np.empty(size, dtype=np.float32)
    for batch in batches:
        count = sum(described[name].numel for name in batch.names)
        if batch.program is None or not batch.names:
            total += count * len(experts) * 20e-9
            continue
        try:
            program = _on(batch.program, "x", size)
            program.prepare(inputs, size, None, 1)
            program.merge(inputs, "x", 0, size, program.prepare_tensor(inputs, "x", size, size), Buffers(), out)
            begin = time.perf_counter()
            program.prepare(inputs, size, None, 1)
            known = program.prepare_tensor(inputs, "x", size, size)
            program.merge(inputs, "x", 0, size, known, Buffers(), out)
            total += (time.perf_counter() - begin) / size * count
        except MethodError:
            total += count * len(experts) * 20e-9
    return total / threads


def _on(program: Program, name: str, size: int) -> Program:
    """The same program on one made-up tensor."""
    if isinstance(program, Linear):
        return Linear({name: next(iter(program.forms.values()))})
    if isinstance(program, Elected | Span) and program.domain is not None:
        return replace(program, domain=[(name, size)])
    return program


def _size(count: int) -> str:
    """Rounded up, so that what an error asks for is enough."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if count >= factor:
            return f"{-(-count * 100 // factor) / 100:.2f} {unit}"
    return f"{count} B"
