"""A merge in chunks, and the same merge by the definition: what came out, or what was said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from merging.checkpoint import load_state_dict, open_checkpoint, save_state_dict
from merging.errors import CheckpointError, MethodError
from merging.merge import merge_state_dicts
from merging.method import Method
from merging.partition import partition
from merging.registry import get
from merging.settings import Rule, resolve
from merging.streaming.output import OutputFile
from merging.streaming.plan import Plan, Task, plan
from merging.streaming.run import run, stored_specs
from merging.tensorwise import Stream
from merging.types import StateDict
from merging.writer import outline_of

State = dict[str, Tensor]
Outcome = dict[str, Tensor] | tuple[type[Exception], str]


def stream_of(
    method: str | Method,
    base: StateDict | None,
    experts: Mapping[str, StateDict],
    *,
    coefficients: Any = None,
    rules: Sequence[Rule] = (),
    seed: int = 0,
    dtypes: dict[str, torch.dtype] | None = None,
    **settings: Any,
) -> Stream:
    chosen = get(method) if isinstance(method, str) else method
    reference = experts[min(experts)] if base is None else base
    parts = partition(reference)
    covered = parts.coordinates if chosen.linear or chosen.merges_buffers else parts.shared
    groups = resolve(chosen, covered, settings, coefficients, rules, tuple(experts))
    return Stream(chosen, base, reference, experts, parts, tuple(groups), seed, dtypes)


def in_chunks(
    method: str | Method,
    base: StateDict | None,
    experts: Mapping[str, StateDict],
    target: Path,
    *,
    chunk: int | None = None,
    threads: int = 1,
    mapped: bool = True,
    **arguments: Any,
) -> dict[str, Tensor]:
    """The merged coordinates, through a file."""
    stream = stream_of(method, base, experts, **arguments)
    stored = stored_specs(stream)
    made = plan(stream, stored, threads=threads)
    assert made is not None
    if chunk is not None:
        made = recut(made, chunk)
    run(stream, made, stored, {}, [OutputFile(target, outline_of(stored, {}))], mapped=mapped)
    return load_state_dict(target)


def recut(made: Plan, chunk: int) -> Plan:
    """The same plan with other chunks."""
    tasks: list[Task] = []
    for task in made.tasks:
        whole = task.batch is not None and made.batches[task.batch].program is None
        step = task.stop - task.start if whole else chunk
        tasks += [
            Task(task.name, start, min(task.stop, start + step), task.batch)
            for start in range(task.start, task.stop, max(1, step))
        ]
    return replace(made, tasks=tuple(dict.fromkeys(tasks)), chunk=chunk)


def told(work: Any) -> Outcome:
    """What a merge gives, or says."""
    try:
        found = work()
    except (CheckpointError, MethodError) as error:
        return type(error), str(error)
    return {name: tensor for name, tensor in found.items()}


def defined(
    method: str | Method, base: StateDict | None, experts: Mapping[str, StateDict], **arguments: Any
) -> Outcome:
    """What the definition gives, or says."""
    return told(lambda: merge_state_dicts(method, base, experts, **arguments))


def streamed(
    method: str | Method, base: StateDict | None, experts: Mapping[str, StateDict], target: Path, **arguments: Any
) -> Outcome:
    """What the merge in chunks gives, or says."""
    return told(lambda: in_chunks(method, base, experts, target, **arguments))


def assert_same(found: Outcome, expected: Outcome) -> None:
    """The same bits, or the same words."""
    if isinstance(expected, tuple) or isinstance(found, tuple):
        assert found == expected
        return
    for name, tensor in found.items():
        assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape), name
        if not np.array_equal(bits(tensor), bits(expected[name])):
            places = (bits(tensor) != bits(expected[name])).nonzero()[0] // tensor.element_size()
            place = int(places[0])
            one, other = (float(t.reshape(-1)[place]) for t in (tensor, expected[name]))
            raise AssertionError(f"{name}[{place}] is {one!r}, by the definition {other!r}")


def bits(tensor: Tensor) -> np.ndarray:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy() if tensor.numel() else np.zeros(0, np.uint8)


def saved(folder: Path, base: State | None, experts: Mapping[str, State]) -> tuple[StateDict, dict[str, StateDict]]:
    """Checkpoints on disk, written once."""
    for name, state in {"base": base, **experts}.items():
        if state is not None and not (folder / f"{name}.safetensors").exists():
            save_state_dict(folder / f"{name}.safetensors", state)
    first = folder / f"{min(experts) if base is None else 'base'}.safetensors"
    return open_checkpoint(first), {name: open_checkpoint(folder / f"{name}.safetensors") for name in experts}
