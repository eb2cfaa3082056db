"""Carry out a plan: threads that merge chunks, in order, and one that writes behind them."""

from __future__ import annotations

import json
import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from merging.compatible import check_finite, check_result
from merging.errors import MethodError
from merging.kernels.linear import beyond
from merging.lazy import LazyState, Spec, specs
from merging.partition import Partition, is_variance
from merging.streaming.build import ordered_experts
from merging.streaming.output import Output, OutputFile
from merging.streaming.plan import Plan, Sources, Task
from merging.streaming.programs import Span
from merging.streaming.source import Buffers, Inputs
from merging.tensorwise import Stream, merge_stream
from merging.types import StateDict
from merging.variances import CLAMPED, negative_count

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with the bytes of the result that are merged, and how many there will be."""

_AHEAD = 3  # tasks for every thread that are submitted before the first of them is handed over
_WAITING = 4  # pieces for every thread that may wait to be written
_LARGEST = np.float32(np.finfo(np.float32).max)


def key_of(stream: Stream, stored: Mapping[str, Spec], chunk: int, salt: str = "") -> str:
    """A hash of everything that the bytes of a merge depend on: inputs (by file, size and time), settings, versions."""
    states = {"": stream.base, **stream.experts}
    groups = [(group.names, sorted(group.settings.items(), key=str), group.coefficients) for group in stream.groups]
    described = {
        "method": stream.method.name,
        "groups": repr(groups),
        "seed": stream.seed,
        "device": str(stream.device),
        "experts": list(stream.experts),
        "inputs": {name: None if state is None else _identity(state) for name, state in states.items()},
        "stored": {name: (spec.shape, str(spec.dtype)) for name, spec in stored.items()},
        "chunk": chunk,
        "torch": torch.__version__,
        "salt": salt,
    }
    return sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()


def run(
    stream: Stream,
    plan: Plan,
    stored: Mapping[str, Spec],
    copied: Sources,
    files: Sequence[OutputFile],
    *,
    also: Mapping[str, Sequence[str]] | None = None,
    journal: Path | None = None,
    key: str = "",
    every: int = 1 << 28,
    mapped: bool = True,
    progress: Progress | None = None,
) -> None:
    """Fill ``files`` with a merge.

    Args:
        stream: what is merged.
        plan: made from it.
        stored: shape and type of every tensor of the result.
        copied: where the others come from.
        also: further names of merged tensors (tied weights), by the name that is merged.
        files: temporary files with their outlines; they are complete and flushed when this returns.
        journal: records what is done; if it is there and has the same ``key``, the merge goes on from there.
        key: see :func:`key_of`.
        every: bytes between two entries of the journal.
        mapped: use input files where they are.
        progress: told how far the merge is: at the start (where an interrupted one had come), and after every task.

    Raises:
        CheckpointError: an input cannot be read, changed, or holds NaN or infinite weights (the error names the first
            tensor in the order of the tasks where something is wrong).
        MethodError: the result overflows its storage type.
        OSError: the disk refuses.
    """
    experts = ordered_experts(stream)
    total = sum(spec.nbytes for spec in stored.values())
    last = {task.name: number for number, task in enumerate(plan.tasks)}
    local = threading.local()
    clamped: list[int] = []
    with (
        Inputs(stream.base, list(experts.values()), mapped=mapped) as inputs,
        ThreadPoolExecutor(plan.threads, thread_name_prefix="mergebound") as pool,
        Output(files, journal, key, every=every, depth=_WAITING * plan.threads) as output,
    ):
        todo = [(number, task) for number, task in enumerate(plan.tasks) if number >= output.resumed]
        if output.resumed:
            logger.info("going on with task %d of %d", output.resumed + 1, len(plan.tasks))
        # pieces that are submitted, waiting to be written, being written: a buffer comes back after all of these
        ring = _Ring((_AHEAD + _WAITING) * plan.threads + 3)
        job = _Job(stream, plan, stored, copied, inputs, merge_stream(stream), local, ring, clamped)
        done = total - sum((task.stop - task.start) * stored[task.name].dtype.itemsize for _, task in todo)
        if progress is not None:
            progress(done, total)
        waiting: deque[tuple[int, Task, Future[Tensor]]] = deque()
        prepared: dict[str, Future[object]] = {}
        try:
            for index, batch in enumerate(plan.batches):
                if batch.program is not None and any(task.batch == index for _, task in todo):
                    batch.program.prepare(inputs, plan.chunk, pool, plan.threads)
            upcoming = iter(todo)
            exhausted = False
            while waiting or not exhausted:
                while not exhausted and len(waiting) < _AHEAD * plan.threads:
                    entry = next(upcoming, None)
                    if entry is None:
                        exhausted = True
                        break
                    number, task = entry
                    if task.batch is not None and task.name not in prepared:
                        prepared[task.name] = pool.submit(job.prepare, task)
                    known = prepared.get(task.name)
                    waiting.append((number, task, pool.submit(job.merge, number, task, known)))
                if not waiting:
                    break
                number, task, future = waiting.popleft()
                data = future.result()
                width = stored[task.name].dtype.itemsize
                for other in () if also is None else also.get(task.name, ()):
                    output.write(other, task.start * width, _bytes(data), number - 1)
                output.write(task.name, task.start * width, _bytes(data), number)
                done += (task.stop - task.start) * width
                if last[task.name] == number:
                    prepared.pop(task.name, None)
                    if task.batch is not None:
                        inputs.release(task.name)
                if progress is not None:
                    progress(done, total)
            inputs.confirm()
            if clamped:
                logger.warning(CLAMPED, sum(clamped))
        except BaseException:
            inputs.stop()
            for _, _, future in waiting:
                future.cancel()
            for ready in prepared.values():
                ready.cancel()
            raise


class _Ring:
    """Buffers that tasks use in turn."""

    def __init__(self, count: int) -> None:
        self._buffers = [np.empty(0, dtype=np.float32)] * count

    def floats(self, number: int, size: int) -> NDArray[np.float32]:
        place = number % len(self._buffers)
        if self._buffers[place].size < size:
            self._buffers[place] = np.empty(size, dtype=np.float32)
        return self._buffers[place][:size]


@dataclass(frozen=True)
class _Job:
    stream: Stream
    plan: Plan
    stored: Mapping[str, Spec]
    copied: Sources
    inputs: Inputs
    whole: LazyState
    local: Any
    ring: _Ring
    clamped: list[int]

    def prepare(self, task: Task) -> object:
        assert task.batch is not None
        program = self.plan.batches[task.batch].program
        if program is None:
            return None
        return program.prepare_tensor(self.inputs, task.name, self.stored[task.name].numel, self.plan.chunk)

    def merge(self, number: int, task: Task, known: Future[object] | None) -> Tensor:
        """The entries of a task, in the type that they are stored in; flat."""
        spec = self.stored[task.name]
        if task.batch is None:
            return self._copy(task, spec)
        ready = None if known is None else known.result()
        program = self.plan.batches[task.batch].program
        if program is None:
            tensor = self.whole[task.name]
            return (tensor if tensor.dtype == spec.dtype else tensor.to(spec.dtype)).reshape(-1)
        size = task.stop - task.start
        buffers = self._buffers()
        plain = spec.dtype == torch.float32
        out = self.ring.floats(number, size) if plain else buffers.floats("out", size)
        bad = program.merge(self.inputs, task.name, task.start, task.stop, ready, buffers, out)
        merged = torch.from_numpy(out)
        if is_variance(task.name) and task.name in self.stream.parts.buffers:
            bad += beyond(out, _LARGEST)  # which clamping may hide
            negative = negative_count(merged)
            if negative:
                self.clamped.append(negative)
            merged.clamp_(min=0.0)
        limit = np.float32(min(torch.finfo(spec.dtype).max, torch.finfo(torch.float32).max))
        stored = merged if plain else merged.to(spec.dtype)
        if bad or beyond(out, limit):
            self._explain(task, merged, stored)
        return stored

    def _buffers(self) -> Buffers:
        found = getattr(self.local, "buffers", None)
        if found is None:
            self.local.buffers = found = Buffers()
        return found

    def _copy(self, task: Task, spec: Spec) -> Tensor:
        state, name = self.copied[task.name]
        region = state.region(name) if isinstance(state, LazyState) else None
        own = specs(state)[name].dtype
        if region is None:
            flat = state[name].detach().cpu().contiguous().reshape(-1)[task.start : task.stop]
        else:
            raw = np.empty((task.stop - task.start) * own.itemsize, dtype=np.uint8)
            self.inputs.file(region).read_into(raw, region.begin + task.start * own.itemsize)
            flat = torch.from_numpy(raw).view(own) if raw.size else torch.empty(0, dtype=own)
        stored = flat if own == spec.dtype else flat.to(spec.dtype)
        if own != spec.dtype and not bool(torch.isfinite(stored).all()) and bool(torch.isfinite(state[name]).all()):
            raise MethodError(f"tensor '{task.name}' overflows {spec.dtype}: store the merge in another --dtype")
        return stored

    def _explain(self, task: Task, merged: Tensor, stored: Tensor) -> None:
        """Name the checkpoint that is to blame, or the tensor that overflowed; nothing if all is well."""
        name = task.name
        origin = self.stream.reference if self.stream.base is None else self.stream.base
        program = None if task.batch is None else self.plan.batches[task.batch].program
        for suspect in (name, *(program.suspects if isinstance(program, Span) else ())):
            experts = {label: {suspect: state[suspect]} for label, state in self.stream.experts.items()}
            check_finite({suspect: origin[suspect]}, experts, Partition(shared=(suspect,)))
        check_result({name: stored}, merged, self.stream.method.name)


def stored_specs(stream: Stream) -> dict[str, Spec]:
    """Shapes and storage types of the merged coordinates."""
    described, changed = specs(stream.reference), stream.dtypes or {}
    return {
        name: replace(described[name], dtype=changed.get(name, described[name].dtype))
        for name in stream.parts.coordinates
    }


def _bytes(data: Tensor) -> memoryview:
    flat = data.resolve_neg().contiguous()
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _identity(state: StateDict) -> object:
    files: set[tuple[Path | str, tuple[int, ...]]] = set()
    digest = sha256()
    for name, spec in specs(state).items():
        region = state.region(name) if isinstance(state, LazyState) else None
        if region is not None:
            files.add((region.path if region.remote is None else region.remote.shown, region.identity))
        else:
            with suppress(KeyError):
                flat = state[name].detach().cpu().contiguous().reshape(-1)
                digest.update(repr((name, spec)).encode())
                if flat.numel():
                    digest.update(flat.view(torch.uint8).numpy().data)
    found = [(str(where.resolve()) if isinstance(where, Path) else where, identity) for where, identity in files]
    return sorted(found), digest.hexdigest()
