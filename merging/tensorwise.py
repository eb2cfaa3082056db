"""Merge tensor by tensor: memory for one tensor of each checkpoint, whatever the size of the model.

This is for methods whose merged tensors each depend on that tensor of the experts alone; the others (ranking entries
over the whole model, say) need :func:`merging.merge.merge_state_dicts`.  On the processor the
bits are those of that function.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from merging.compatible import check_finite, check_result
from merging.errors import MethodError
from merging.flat import FlatSpace, compute_dtype
from merging.layers import layers_of
from merging.lazy import LazyState, Spec, specs
from merging.merge import merge_flat
from merging.method import Method
from merging.methods.average import METHOD as AVERAGE
from merging.partition import Partition
from merging.settings import Resolved
from merging.types import StateDict
from merging.variances import CLAMPED, zero_count

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stream:
    """A merge to be computed tensor by tensor.

    Attributes:
        method: the method.
        base: the base, or ``None`` for methods that do without (then ``reference`` only tells shapes and types).
        reference: shapes and storage types of the result.
        experts: name to checkpoint, harmonised with ``reference``.
        parts: what is merged.
        groups: settings of the tensors that the method acts on (:func:`merging.settings.resolve`), coefficients in the
            order of ``experts``.
        seed: for methods that draw random numbers.
        dtypes: storage types other than the reference's.
        device: where each tensor is merged; results are in the processor's memory.
    """

    method: Method
    base: StateDict | None
    reference: StateDict
    experts: Mapping[str, StateDict]
    parts: Partition
    groups: Sequence[Resolved]
    seed: int = 0
    dtypes: Mapping[str, torch.dtype] | None = None
    device: str = "cpu"


def can_stream(method: Method, groups: Sequence[Resolved], states: Sequence[StateDict], parts: Partition) -> bool:
    """Whether a merge can be computed tensor by tensor with the same bits.

    Not so for methods or settings that look at the whole model, for statistics of data (which are held whole anyway),
    nor for checkpoints of which only some tensors are float64 (accumulation is float64 throughout then).
    """
    if method.needs_data or not all(method.is_tensorwise(group.settings) for group in groups):
        return False
    kinds = {specs(state)[name].dtype == torch.float64 for state in states for name in parts.coordinates}
    return len(kinds) < 2


def merge_stream(stream: Stream) -> LazyState:
    """The merged coordinates (shared tensors and buffers) as a lazy mapping; each is merged when it is asked for.

    Asking raises what :func:`merging.merge.merge_state_dicts` raises: CheckpointError for NaN or infinite weights,
    MethodError where the result overflows its storage type, or the device's memory is too small.
    """
    described = specs(stream.reference)
    changed = stream.dtypes or {}
    wanted = {
        name: replace(described[name], dtype=changed.get(name, described[name].dtype))
        for name in stream.parts.coordinates
    }
    return LazyState(wanted, _reader(stream, wanted))


def _reader(stream: Stream, wanted: Mapping[str, Spec]) -> Callable[[str], Tensor]:
    group_of = {name: group for group in stream.groups for name in group.names}
    layers = layers_of([name for group in stream.groups for name in group.names])
    labels = tuple(stream.experts)
    buffers = set(stream.parts.buffers)
    told: list[str] = []

    def read(name: str) -> Tensor:
        try:
            return merged(name)
        except torch.OutOfMemoryError:
            raise MethodError(
                f"tensor '{name}' does not fit into the memory of {stream.device} with method '{stream.method.name}': "
                "use fewer threads, or merge on the processor"
            ) from None

    def merged(name: str) -> Tensor:
        spec = wanted[name]
        group = group_of.get(name)
        method = AVERAGE if group is None else stream.method  # running statistics, where the method leaves them alone
        settings: dict[str, Any] = {} if group is None else dict(group.settings)
        if "layers" in method.extras and settings.get("layers") is None:
            settings["layers"] = layers
        tensors = {label: {name: state[name]} for label, state in stream.experts.items()}
        start = {name: (stream.reference if stream.base is None else stream.base)[name]}
        space = FlatSpace(
            (name,), (spec.shape,), (0, spec.numel), compute_dtype(t[name] for t in (start, *tensors.values()))
        )
        zero = torch.zeros(space.size, dtype=space.dtype, device=stream.device)
        origin = zero if stream.base is None else space.flatten(start).to(stream.device)
        rows = [space.flatten(tensor).to(stream.device).sub_(origin) for tensor in tensors.values()]
        part = Partition(shared=(), buffers=(name,)) if name in buffers else Partition(shared=(name,))
        check_finite(start, tensors, part, (origin, *rows))
        vector = merge_flat(
            method,
            origin,
            rows,
            space,
            part,
            names=labels,
            coefficients=None if group is None else group.coefficients,
            seed=stream.seed,
            **settings,
        ).cpu()
        if name in buffers and not told:
            negative = zero_count(space, origin.cpu(), vector, [row.cpu() for row in rows])
            if negative:
                told.append(name)
                _log.warning(CLAMPED, f"{negative} (in '{name}', perhaps more elsewhere)")
        tensor = vector.view(spec.shape).to(spec.dtype)
        check_result({name: tensor}, vector, method.name)
        return tensor

    return read
