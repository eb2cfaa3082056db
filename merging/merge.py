"""Merge checkpoints in memory.

``M = x_0 + method(Delta_1, ..., Delta_N)`` over the shared tensors; buffers, private tensors and constants as
:mod:`merging.partition` says.  Task vectors and sums are float32 (float64 where a checkpoint is), rounded to the base's
storage type once, at the end.  Experts are put in the order of their names first, so that the order in which they
are given does not change a bit of the result.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from merging.compatible import check_compatible, check_finite, check_result
from merging.errors import MethodError
from merging.flat import FlatSpace, compute_dtype
from merging.keys import KeyPolicy, harmonise
from merging.layers import layers_of
from merging.lazy import specs
from merging.method import Method, Rows, check_coefficients
from merging.methods.average import average_flat
from merging.partition import Partition, is_variance, partition, without
from merging.registry import get, methods
from merging.settings import Gradient, PerLayer, Resolved, Rule, resolve
from merging.tied import dealias
from merging.types import StateDict
from merging.variances import CLAMPED, zero_count

_log = logging.getLogger(__name__)

Coefficients = Sequence[float | Gradient | PerLayer] | Mapping[str, float | Gradient | PerLayer]
"""One coefficient per expert: in the order of the experts, or by their names."""


def flat_space(base: StateDict, parts: Partition, experts: Mapping[str, StateDict] | None = None) -> FlatSpace:
    """The layout of everything that is merged: shared tensors first, then buffers, each in the order of their names.

    The order of the tensors in the checkpoint does not count: it differs between formats and layouts of shards, and
    methods that rank over the whole model prefer the first of equal magnitudes.
    """
    space = FlatSpace.of(base, (*sorted(parts.shared), *sorted(parts.buffers)))
    states = [specs(state) for state in (base, *({} if experts is None else experts).values())]
    dtype = compute_dtype(described[name] for described in states for name in parts.coordinates)
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
    base: StateDict | None,
    experts: Mapping[str, StateDict],
    *,
    partition: Partition | None = None,
    coefficients: Coefficients | None = None,
    rules: Sequence[Rule] = (),
    seed: int = 0,
    private_from: str | None = None,
    policy: KeyPolicy = "strict",
    **settings: Any,
) -> dict[str, Tensor]:
    """Merge N fine-tuned checkpoints of one base.

    Args:
        method: a name (see :func:`merging.registry.methods`) or a :class:`~merging.method.Method` of one's own.
        base: the checkpoint ``x_0`` that all experts were fine-tuned from.  ``None`` for methods that do not depend on
            it with these settings (:attr:`~merging.method.Method.base_free`): private tensors and constants then come
            from the first expert by name.
        experts: name to checkpoint.
        partition: which tensors are merged; by default :func:`merging.partition.partition` of the base, where heads
            are private.
        coefficients: one per expert, for methods that use them.
        rules: settings and coefficients for the tensors that match a regular expression.
        seed: for methods that draw random numbers.
        private_from: the expert whose private tensors the result carries (default: the base's).
        policy: what happens to tensors that not all checkpoints have: ``"strict"`` (an error), ``"union"`` or
            ``"intersection"`` (:func:`merging.keys.harmonise`).
        **settings: the method's parameters; a number may be a :class:`~merging.settings.Gradient` or
            :class:`~merging.settings.PerLayer` of numbers.

    Returns:
        A new checkpoint in the base's tensor order and storage types; it shares no memory with the inputs.  Weights
        that are tied in the base and in all experts are merged once and stay tied.

    Raises:
        CheckpointError: checkpoints that do not fit together, or hold NaN or infinite weights.
        MethodError: an unknown method, or settings outside their domain.
    """
    chosen = get(method) if isinstance(method, str) else method
    job = _prepare(chosen, base, experts, partition, private_from, settings, policy)
    vector = merge_flat(
        chosen,
        job.origin,
        job.rows,
        job.space,
        job.parts,
        names=tuple(experts),
        coefficients=coefficients,
        rules=rules,
        seed=seed,
        **settings,
    )
    clamped = zero_count(job.space, job.origin, vector, job.rows)
    if clamped:
        _log.warning(CLAMPED, clamped)
    donor = job.reference if private_from is None else experts[private_from]
    return job.assemble(vector, donor, chosen.name)


def localize_state_dict(
    method: str | Method,
    base: StateDict,
    experts: Mapping[str, StateDict],
    expert: str,
    *,
    partition: Partition | None = None,
    coefficients: Coefficients | None = None,
    seed: int = 0,
    policy: KeyPolicy = "strict",
    **settings: Any,
) -> dict[str, Tensor]:
    """The checkpoint that a compressing method (EMR, TALL masks) hands back for one expert.

    Shared tensors are the base plus the expert's reconstructed task vector; buffers and private tensors are the
    expert's own.

    Raises:
        MethodError: the method keeps nothing per expert, or ``expert`` is not among the experts.
        CheckpointError: see :func:`merge_state_dicts`.
    """
    chosen = get(method) if isinstance(method, str) else method
    if chosen.localized is None:
        able = ", ".join(name for name, other in methods().items() if other.localized is not None)
        raise MethodError(f"method '{chosen.name}' keeps nothing per expert: choose among {able}")
    job = _prepare(chosen, base, experts, partition, expert, settings, policy)
    rows, labels = _ordered(chosen, job.rows, tuple(experts))
    arguments = chosen.settings(_extras(chosen, settings, labels, tuple(experts)))
    weights = _coefficients(chosen, coefficients, labels, tuple(experts))
    if weights is not None:
        arguments["coefficients"] = check_coefficients(weights, len(rows))
    if not chosen.deterministic:
        arguments |= {"names": labels, "seed": seed}
    shared = job.space.take(0, len(job.parts.shared))
    vectors = [shared.unflatten(row[: shared.size]) for row in rows]
    row = job.rows[tuple(experts).index(expert)].clone()
    row[: shared.size] = shared.flatten(chosen.localized(vectors, **arguments)[labels.index(expert)])
    return job.assemble(row.add_(job.origin), experts[expert], chosen.name)


@dataclass(frozen=True)
class _Job:
    """Checkpoints that fit together, as rows.

    ``reference`` gives names, storage types, constants and private tensors; ``aliases`` are second names of merged
    tensors; ``order`` and ``carried`` describe what else goes to the result.
    """

    reference: StateDict
    parts: Partition
    space: FlatSpace
    origin: Tensor
    rows: list[Tensor]
    aliases: Mapping[str, str]
    carried: StateDict
    order: tuple[str, ...]

    def assemble(self, vector: Tensor, donor: StateDict, method: str) -> dict[str, Tensor]:
        """A checkpoint of a merged vector, rounded once; private tensors come from ``donor``."""
        reference, parts = self.reference, self.parts
        types = {name: spec.dtype for name, spec in specs(reference).items()}
        merged = {
            name: tensor if tensor.dtype == types[name] else tensor.to(types[name])
            for name, tensor in self.space.unflatten(vector).items()
        }
        check_result(merged, vector, method)
        result: dict[str, Tensor] = {}
        for name in self.order:
            if name in merged:
                result[name] = merged[name]
            elif name in self.aliases:
                result[name] = merged[self.aliases[name]]
            elif name in parts.private:
                if name in donor:
                    result[name] = donor[name].detach().clone()
            else:
                source = self.carried if name in self.carried else reference
                result[name] = source[name].detach().clone()
        extra = [name for name in donor if name not in result and name not in parts.private and parts.is_private(name)]
        return result | {name: donor[name].detach().clone() for name in extra}


def _prepare(
    method: Method,
    base: StateDict | None,
    experts: Mapping[str, StateDict],
    partition: Partition | None,
    private_from: str | None,
    settings: Mapping[str, Any],
    policy: KeyPolicy,
) -> _Job:
    """Check that the checkpoints fit together and take their task vectors.

    Without a base the origin is zero, so that task vectors are the experts themselves.
    """
    if not experts:
        raise MethodError("there is nothing to merge: give at least one expert")
    if private_from is not None and private_from not in experts:
        raise MethodError(f"private_from names no expert ('{private_from}'): choose among {', '.join(experts)}")
    if base is None:
        plain = {key: value for key, value in settings.items() if not isinstance(value, Gradient | PerLayer)}
        if not method.base_free(method.settings(plain)):
            raise MethodError(f"method '{method.name}' needs the base that the experts were fine-tuned from: give it")
        base_or_first = experts[min(experts)]
    else:
        base_or_first = base
    parts = _partition(base_or_first) if partition is None else partition
    fitting = harmonise(base_or_first, experts, policy, parts)
    reference, states = fitting.base, fitting.experts
    aliases = dealias(reference, states, fitting.parts.coordinates)
    parts = without(fitting.parts, aliases)
    space = flat_space(reference, parts, states)
    if base is None:
        origin = torch.zeros(space.size, dtype=space.dtype)
        rows = [space.flatten(state) for state in states.values()]
    else:
        origin = space.flatten(reference)
        rows = [space.flatten(state).sub_(origin) for state in states.values()]
    check_finite(reference, states, parts, (origin, *rows))
    return _Job(reference, parts, space, origin, rows, aliases, fitting.carried, fitting.order)


def merge_flat(
    method: str | Method,
    base: Tensor,
    task_vectors: Tensor | Rows,
    space: FlatSpace,
    partition: Partition,
    *,
    names: Sequence[str] | None = None,
    coefficients: Coefficients | None = None,
    rules: Sequence[Rule] = (),
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
    rows, labels = _ordered(chosen, task_vectors, names)
    given = _extras(chosen, settings, labels, names)
    weights = _coefficients(chosen, coefficients, labels, names)
    run = _Run(chosen, base, rows, labels, space, seed)
    count = len(partition.shared)
    everything = chosen.linear or chosen.merges_buffers
    covered = space if everything else space.take(0, count)
    groups = resolve(chosen, covered.names, given, weights, _rules(rules, labels, names), labels)
    update = torch.empty(space.size, dtype=space.dtype, device=base.device)
    if len(groups) == 1:
        update[: covered.size] = run.whole(covered, groups[0])
    else:
        for group in groups:
            run.some(covered, group, update)
    if not everything and count < len(space.names):
        split = covered.size
        update[split:] = average_flat([row[split:] for row in rows], space.take(count, len(space.names)))
    merged = update.add_(base)
    for name, piece in list(space.segments())[count:]:
        if is_variance(name):
            merged[piece].clamp_(min=0.0)
    return merged


@dataclass(frozen=True)
class _Run:
    """One method on one set of experts, to be run on all tensors or on some."""

    method: Method
    base: Tensor
    rows: list[Tensor]
    labels: tuple[str, ...]
    space: FlatSpace
    seed: int

    def whole(self, covered: FlatSpace, group: Resolved) -> Tensor:
        """The merged task vector over the first ``covered.size`` coordinates, with one set of settings."""
        size = covered.size
        return self._apply([row[:size] for row in self.rows], self.base[:size], covered, group, covered.names)

    def some(self, covered: FlatSpace, group: Resolved, out: Tensor) -> None:
        """Write the tensors of one group of settings into ``out``."""
        members = set(group.names)
        pieces = [(name, piece) for name, piece in covered.segments() if name in members]
        if not self.method.is_tensorwise(group.settings):
            merged = self.whole(covered, group)
            for _, piece in pieces:
                out[piece] = merged[piece]
            return
        part = covered.select(group.names)
        base, *rows = (torch.cat([vector[piece] for _, piece in pieces]) for vector in (self.base, *self.rows))
        merged = self._apply(rows, base, part, group, covered.names)
        for (_, piece), (_, place) in zip(pieces, part.segments(), strict=True):
            out[piece] = merged[place]

    def _apply(
        self, rows: list[Tensor], base: Tensor, space: FlatSpace, group: Resolved, all_names: Sequence[str]
    ) -> Tensor:
        arguments = dict(group.settings)
        if group.coefficients is not None:
            arguments["coefficients"] = check_coefficients(group.coefficients, len(rows))
        if self.method.needs_base:
            arguments["base"] = base
        if "layers" in self.method.extras and arguments.get("layers") is None:
            arguments["layers"] = layers_of(all_names)
        if not self.method.deterministic:
            arguments |= {"names": self.labels, "seed": self.seed}
        return self.method.on_rows(rows, space, **arguments)


def _ordered(
    method: Method, task_vectors: Tensor | Rows, names: Sequence[str] | None
) -> tuple[list[Tensor], tuple[str, ...]]:
    """Experts by name, so that the order in which they are given changes nothing (unless it is part of the method)."""
    given = list(task_vectors.unbind(0)) if isinstance(task_vectors, Tensor) else list(task_vectors)
    labels = tuple(str(index) for index in range(len(given))) if names is None else tuple(names)
    if not given or len(labels) != len(given) or len(set(labels)) != len(labels):
        raise MethodError(f"{len(given)} task vectors came with names {list(labels)}: give one distinct name each")
    least, most = method.experts
    if len(given) < least or (most is not None and len(given) > most):
        wanted = f"{least}" if least == most else f"{least} or more" if most is None else f"{least} to {most}"
        raise MethodError(f"method '{method.name}' merges {wanted} experts and was given {len(given)}: change them")
    order = range(len(labels))
    if method.permutation_invariant:
        order = sorted(order, key=labels.__getitem__)  # type: ignore[assignment]
    return [given[index] for index in order], tuple(labels[index] for index in order)


def _in_order(values: Any, labels: Sequence[str], names: Sequence[str] | None, what: str) -> tuple[Any, ...]:
    """One entry per expert, put in the order of ``labels``; a sequence is in the order of ``names``."""
    if isinstance(values, Mapping):
        if set(values) != set(labels):
            raise MethodError(f"{what} name {sorted(values)} but the experts are {sorted(labels)}: name each once")
        return tuple(values[label] for label in labels)
    sequence = tuple(values)
    if len(sequence) != len(labels):
        raise MethodError(f"{len(sequence)} {what} were given for {len(labels)} experts: give one per expert, in order")
    place = {name: index for index, name in enumerate(map(str, range(len(labels))) if names is None else names)}
    return tuple(sequence[place[label]] for label in labels)


def _coefficients(
    method: Method, given: Coefficients | None, labels: Sequence[str], names: Sequence[str] | None
) -> tuple[Any, ...] | None:
    if given is None:
        if method.coefficients == "required":
            raise MethodError(f"method '{method.name}' needs coefficients: give one per expert")
        return None
    if method.coefficients == "none":
        raise MethodError(f"method '{method.name}' takes no coefficients: leave them out, or use 'weighted'")
    return _in_order(given, labels, names, "coefficients")


def _extras(
    method: Method, settings: Mapping[str, Any], labels: Sequence[str], names: Sequence[str] | None
) -> dict[str, Any]:
    given = dict(settings)
    for key in method.per_expert:
        if given.get(key) is not None:
            given[key] = _in_order(given[key], labels, names, key)
    if "groups" in method.extras and given.get("groups"):
        given["groups"] = {
            pattern: _in_order(values, labels, names, "coefficients") for pattern, values in given["groups"].items()
        }
    return given


def _rules(rules: Sequence[Rule], labels: Sequence[str], names: Sequence[str] | None) -> list[Rule]:
    return [
        rule
        if rule.coefficients is None
        else replace(rule, coefficients=_in_order(rule.coefficients, labels, names, "coefficients"))
        for rule in rules
    ]


def _partition(base: StateDict) -> Partition:
    return partition(base)
