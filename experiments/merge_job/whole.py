"""The merged checkpoint by the method's definition: tensor by tensor, or all tensors at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from experiments.merge_job.job import Job, Stage, naming
from merging.errors import MethodError
from merging.lazy import LazyState, specs
from merging.merge import localize_state_dict, merge_state_dicts
from merging.tensorwise import Stream, can_stream, merge_stream
from merging.types import StateDict


def merge(job: Job, tell: Stage = lambda stage: None, device: str = "cpu") -> StateDict:
    """The merged checkpoint, in the base's tensor order.

    Where every tensor can be merged on its own, the result is a lazy mapping that merges a tensor when it is asked for
    (and raises then); otherwise it is in memory.

    Args:
        job: the merge.
        tell: called with the name of each stage.
        device: where tensors are merged that are merged on their own.

    Raises:
        CheckpointError: a checkpoint holds NaN or infinite weights, or cannot be read.
        MethodError: the result overflows the type that it is stored in.
    """
    spec, states = job.spec, job.states
    base = None if spec.base is None else states.base
    donor = spec.for_expert or spec.private_from
    if is_tensorwise(job):
        tell(f"merging with {job.method.name}")
        stored = job.specs
        dtypes = {name: stored[name].dtype for name in states.parts.coordinates}
        merged: StateDict = merge_stream(
            Stream(job.method, base, states.base, states.experts, states.parts, job.groups, spec.seed, dtypes, device)
        )
    else:
        tell(f"merging with {job.method.name}, which needs all tensors at once")
        merged = _in_memory(job, base)
    return _assembled(job, merged, states.base if donor is None else states.experts[donor])


def is_tensorwise(job: Job) -> bool:
    everything = (job.states.base, *job.states.experts.values())
    return job.spec.for_expert is None and can_stream(job.method, job.groups, everything, job.parts)


def _in_memory(job: Job, base: StateDict | None) -> dict[str, Tensor]:
    """The merged coordinates, in at least float32 where another storage type is asked for."""
    spec, states = job.spec, job.states
    arguments: dict[str, Any] = {"partition": states.parts, "coefficients": job.coefficients, "seed": spec.seed}
    wide = {name: _widened(state, spec.dtype) for name, state in states.experts.items()}
    with naming(job.paths):
        if spec.for_expert is not None:
            assert base is not None
            return localize_state_dict(
                job.method, _widened(base, spec.dtype), wide, spec.for_expert, **arguments, **job.settings
            )
        origin = None if base is None else _widened(base, spec.dtype)
        return merge_state_dicts(job.method, origin, wide, rules=job.rules, **arguments, **job.settings)


def _assembled(job: Job, merged: StateDict, donor: StateDict) -> StateDict:
    """Merged tensors, aliases of merged ones, private tensors of ``donor``, constants of the base, what was added."""
    states, stored = job.states, job.specs
    coordinates = set(states.parts.coordinates)

    def read(name: str) -> Tensor:
        canonical = job.aliases.get(name, name)
        with naming(job.paths):
            if canonical in coordinates:
                tensor = merged[canonical]
            elif name in states.carried:
                tensor = states.carried[name]
            elif states.parts.is_private(name):
                tensor = donor[name]
            else:
                tensor = states.base[name]
        return _rounded(name, tensor, stored[name].dtype)

    order = [name for name in states.order if name in stored]
    names = (*order, *(name for name in stored if name not in states.order))
    return LazyState({name: stored[name] for name in names}, read)


def _widened(state: StateDict, dtype: str | None) -> StateDict:
    """The same values in at least float32, so that the only rounding is to the type asked for."""
    if dtype is None:
        return state
    wide = {
        name: replace(spec, dtype=torch.float64 if spec.dtype == torch.float64 else torch.float32)
        if spec.floating
        else spec
        for name, spec in specs(state).items()
    }
    tied = state.tied if isinstance(state, LazyState) else ()
    return LazyState(wide, lambda name: state[name].to(wide[name].dtype), tied=tied)


def _rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.dtype == dtype:
        return tensor
    stored = tensor.to(dtype)
    if bool(torch.isfinite(tensor).all()) and not bool(torch.isfinite(stored).all()):
        raise MethodError(f"tensor '{name}' overflows {dtype}: store the merge in another --dtype")
    return stored
