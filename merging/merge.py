"""Merge checkpoints in memory.

``M = x_0 + method(Delta_1, ..., Delta_N)`` over the shared tensors; buffers, private tensors and constants as
:mod:`merging.partition` says.  Task vectors and sums are float32 (float64 where a checkpoint is), rounded to the base's
storage type once, at the end.  Experts are put in the order of their names first, so that the order in which they
are given does not change a bit of the result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from merging.compatible import check_compatible, check_finite, check_result
from merging.errors import MethodError
from merging.flat import FlatSpace, compute_dtype
from merging.method import Method, Rows, check_coefficients
from merging.methods.average import average_flat
from merging.partition import Partition, is_variance, partition
from merging.registry import get
from merging.types import StateDict

Coefficients = Sequence[float] | Mapping[str, float]
"""One coefficient per expert: in the order of the experts, or by their names."""


def flat_space(base: StateDict, parts: Partition, experts: Mapping[str, StateDict] | None = None) -> FlatSpace:
    """The layout of everything that is merged: shared tensors first, then buffers."""
    space = FlatSpace.of(base, parts.coordinates)
    states = () if experts is None else tuple(experts.values())
    dtype = compute_dtype(state[name] for state in (base, *states) for name in parts.coordinates)
    return FlatSpace(space.names, space.shapes, space.offsets, dtype)


def task_vectors(
    base: StateDict, experts: Mapping[str, StateDict], partition: Partition
) -> dict[str, dict[str, Tensor]]:
    """``Delta_i = x_i - x_0`` of each expert over shared tensors and buffers, in float32 (float64 where stored so).

    Raises:
        CheckpointError: tensors that are missing, mis-shaped or of another kind.
    """
    check_compatible(base, experts, partition)
    space = flat_space(base, partition, experts)
    origin = space.flatten(base)
    return {name: space.unflatten(space.flatten(state).sub_(origin)) for name, state in experts.items()}


def merge_state_dicts(
    method: str | Method,
    base: StateDict,
    experts: Mapping[str, StateDict],
    *,
    partition: Partition | None = None,
    coefficients: Coefficients | None = None,
    seed: int = 0,
    private_from: str | None = None,
    **settings: Any,
) -> dict[str, Tensor]:
    """Merge N fine-tuned checkpoints of one base.

    Args:
        method: a name (see :func:`merging.registry.methods`) or a :class:`~merging.method.Method` of one's own.
        base: the checkpoint ``x_0`` that all experts were fine-tuned from.
        experts: name to checkpoint.
        partition: which tensors are merged; by default :func:`merging.partition.partition` of the base, where heads
            are private.
        coefficients: one per expert, for methods that use them.
        seed: for methods that draw random numbers.
        private_from: the expert whose private tensors the result carries (default: the base's).
        **settings: the method's parameters.

    Returns:
        A new checkpoint in the base's tensor order and storage types; it shares no memory with the inputs.

    Raises:
        CheckpointError: checkpoints that do not fit together, or hold NaN or infinite weights.
        MethodError: an unknown method, or settings outside their domain.
    """
    chosen = get(method) if isinstance(method, str) else method
    parts = _partition(base) if partition is None else partition
    if not experts:
        raise MethodError("there is nothing to merge: give at least one expert")
    if private_from is not None and private_from not in experts:
        raise MethodError(f"private_from names no expert ('{private_from}'): choose among {', '.join(experts)}")
    check_compatible(base, experts, parts)
    space = flat_space(base, parts, experts)
    origin = space.flatten(base)
    rows = [space.flatten(state).sub_(origin) for state in experts.values()]
    check_finite(base, experts, parts, (origin, *rows))
    vector = merge_flat(
        chosen, origin, rows, space, parts, names=tuple(experts), coefficients=coefficients, seed=seed, **settings
    )
    merged = {
        name: tensor if tensor.dtype == base[name].dtype else tensor.to(base[name].dtype)
        for name, tensor in space.unflatten(vector).items()
    }
    check_result(merged, vector, chosen.name)
    donor = base if private_from is None else experts[private_from]
    result: dict[str, Tensor] = {}
    for name, tensor in base.items():
        if name in merged:
            result[name] = merged[name]
        elif name not in parts.private:
            result[name] = tensor.detach().clone()
        elif name in donor:
            result[name] = donor[name].detach().clone()
    extra = {} if donor is base else {n: t for n, t in donor.items() if n not in base and parts.is_private(n)}
    return result | {name: tensor.detach().clone() for name, tensor in extra.items()}


def merge_flat(
    method: str | Method,
    base: Tensor,
    task_vectors: Tensor | Rows,
    space: FlatSpace,
    partition: Partition,
    *,
    names: Sequence[str] | None = None,
    coefficients: Coefficients | None = None,
    seed: int = 0,
    **settings: Any,
) -> Tensor:
    """:func:`merge_state_dicts` on flat vectors, for many merges of the same experts.

    Args:
        base: ``x_0``, shape ``(P,)``.
        task_vectors: ``(N, P)``, or a list of N vectors.  Not modified, assumed finite.
        space: the layout, from :func:`flat_space` (shared tensors first, then buffers).
        partition: tells how many tensors of the layout are shared.
        names: one name per expert; default ``"0", "1", ...``.

    Returns:
        The merged vector ``M``, shape ``(P,)``, in the layout's type.

    Raises:
        MethodError: see :func:`merge_state_dicts`.
    """
    chosen = get(method) if isinstance(method, str) else method
    given = list(task_vectors.unbind(0)) if isinstance(task_vectors, Tensor) else list(task_vectors)
    labels = tuple(str(index) for index in range(len(given))) if names is None else tuple(names)
    if not given or len(labels) != len(given) or len(set(labels)) != len(labels):
        raise MethodError(f"{len(given)} task vectors came with names {list(labels)}: give one distinct name each")
    arguments = chosen.settings(settings)
    order = sorted(range(len(labels)), key=labels.__getitem__)
    weights = _coefficients(chosen, coefficients, labels)
    if weights is not None:
        arguments["coefficients"] = tuple(weights[index] for index in order)
    if arguments.get("groups"):
        arguments["groups"] = {
            pattern: tuple(check_coefficients(values, len(given))[index] for index in order)
            for pattern, values in arguments["groups"].items()
        }
    if not chosen.deterministic:
        arguments |= {"names": tuple(labels[index] for index in order), "seed": seed}
    rows = [given[index] for index in order]
    count = len(partition.shared)
    if chosen.linear or count == len(space.names):
        update = chosen.on_rows(rows, space, **arguments)
    else:
        split = space.offsets[count]
        shared = chosen.on_rows([row[:split] for row in rows], space.take(0, count), **arguments)
        buffers = average_flat([row[split:] for row in rows], space.take(count, len(space.names)))
        update = torch.cat((shared, buffers))
    merged = update.add_(base)
    for name, piece in list(space.segments())[count:]:
        if is_variance(name):
            merged[piece].clamp_(min=0.0)
    return merged


def _partition(base: StateDict) -> Partition:
    return partition(base)


def _coefficients(method: Method, given: Coefficients | None, names: Sequence[str]) -> tuple[float, ...] | None:
    if given is None:
        if method.coefficients == "required":
            raise MethodError(f"method '{method.name}' needs coefficients: give one per expert")
        return None
    if method.coefficients == "none":
        raise MethodError(f"method '{method.name}' takes no coefficients: leave them out, or use 'weighted'")
    if isinstance(given, Mapping):
        if set(given) != set(names):
            raise MethodError(f"coefficients name {sorted(given)} but the experts are {sorted(names)}: name each once")
        given = [given[name] for name in names]
    return check_coefficients(given, len(names))
