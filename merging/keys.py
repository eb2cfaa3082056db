"""Checkpoints whose tensors do not all match: an explicit policy for what is merged, kept, added and left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from merging.compatible import check_compatible
from merging.errors import CheckpointError, MethodError
from merging.lazy import LazyState, Region, Spec, sample_bytes, specs
from merging.partition import Partition, partition
from merging.tied import is_copy, tied_groups
from merging.types import StateDict

KeyPolicy = Literal["strict", "union", "intersection"]
POLICIES: tuple[KeyPolicy, ...] = ("strict", "union", "intersection")

_NEEDED = "use experts fine-tuned from this base, or make the tensor private"
_REMEDIES = "use experts fine-tuned from this base, make the tensor private, or choose the policy union or intersection"


@dataclass(frozen=True)
class KeyReport:
    """What happened to which tensors; everything is empty under ``strict``.

    Attributes:
        kept: of the base, because some expert lacks them or has another shape or kind (intersection).
        unmoved: by expert, tensors that it lacks and is taken not to have moved (union).
        added: by tensor that the base lacks, the experts that it is copied from (one) or averaged over (union).
        dropped: by expert, tensors that the base lacks and the result does too (intersection).
        tied: by expert, tensors that only one side stores because they are tied to another name (any but strict).
    """

    kept: tuple[str, ...] = ()
    unmoved: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    added: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    dropped: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tied: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        """Whether all checkpoints had the same tensors."""
        return not (self.kept or self.unmoved or self.added or self.dropped or self.tied)


@dataclass(frozen=True)
class Harmonised:
    """Checkpoints that fit together.

    Attributes:
        base: what is merged, the constants and the base's private tensors, in the base's order.
        experts: each has all of ``parts.coordinates`` and ``parts.constants``, and its own private tensors.
        carried: tensors that go to the result as they are (averages are computed on access).
        parts: the partition of ``base``.
        order: names of ``base`` and ``carried`` in the order of the result: the base's, then what was added.
        report: what happened to which tensors.
    """

    base: StateDict
    experts: Mapping[str, StateDict]
    carried: StateDict
    parts: Partition
    order: tuple[str, ...]
    report: KeyReport


def harmonise(
    base: StateDict,
    experts: Mapping[str, StateDict],
    policy: KeyPolicy = "strict",
    parts: Partition | None = None,
) -> Harmonised:
    """Make checkpoints fit together under a policy for missing and extra tensors.

    * ``strict``: any difference is an error (:func:`merging.compatible.check_compatible`).
    * ``intersection``: only tensors that the base and all experts have, in equal shape and kind, are merged; the
      base's others are kept as they are, the experts' others are left out.
    * ``union``: an expert that lacks a tensor of the base has not moved it (its task vector is zero there); a tensor
      that the base lacks is copied from the one expert that has it, or averaged over those that do (summed in float32
      or wider in the order of the experts' names, rounded once).  Different shapes or kinds are an error.

    A name that only one side stores because it is tied to another name (``lm_head.weight``, which Hugging Face files
    leave out) follows that name instead: the expert's missing tensor is its own other name's tensor, and an expert's
    extra name is not added.  No values are copied; lazy state dicts stay lazy.

    Args:
        base: the base checkpoint.
        experts: name to checkpoint.
        policy: see above.
        parts: which tensors are merged; default :func:`merging.partition.partition` of the base.  Private tensors are
            left alone: the base and every expert keep theirs.

    Raises:
        CheckpointError: the policy does not allow the difference, or nothing is left to merge.
        MethodError: an unknown policy.
    """
    if policy not in POLICIES:
        raise MethodError(f"the key policy is {policy!r}: choose among {', '.join(POLICIES)}")
    chosen = partition(base) if parts is None else parts
    if policy == "strict":
        check_compatible(base, experts, chosen, remedies=_REMEDIES)
        return Harmonised(base, dict(experts), {}, chosen, tuple(specs(base)), KeyReport())
    described = {name: specs(state) for name, state in experts.items()}
    own = specs(base)
    filled, tied = _fill_tied(base, experts, chosen)
    missing = {
        who: tuple(n for n in own if not chosen.is_private(n) and n not in found and n not in filled[who])
        for who, found in described.items()
    }
    extra = {
        who: tuple(n for n in found if n not in own and not chosen.is_private(n) and n not in tied[who])
        for who, found in described.items()
    }
    conflicts: dict[str, str] = {}
    for who, found in described.items():
        for name, spec in found.items():
            if name in own and not chosen.is_private(name) and _differs(own[name], spec):
                conflicts.setdefault(name, who)
    report = KeyReport(tied={who: names for who, names in tied.items() if names})
    if policy == "intersection":
        lacking = {name for names in missing.values() for name in names} | set(conflicts)
        kept = tuple(name for name in own if name in lacking)
        parts = _without(chosen, lacking)
        if not parts.shared:
            raise CheckpointError(
                "nothing is left to merge: the base and the experts have no floating tensor in common, so use experts "
                "fine-tuned from this base"
            )
        states = {
            who: _select(state, base, filled[who], (), lacking | set(extra[who]) | _surplus(tied[who], own))
            for who, state in experts.items()
        }
        return Harmonised(
            _select(base, base, {}, (), lacking),
            states,
            _lookup({name: (base,) for name in kept}, {name: name for name in kept}),
            parts,
            tuple(own),
            replace(report, kept=kept, dropped={who: names for who, names in extra.items() if names}),
        )
    for name, who in conflicts.items():
        raise _conflict(who, name, described[who][name], "the base", own[name])
    added = _added(experts, extra)
    states = {
        who: _select(state, base, filled[who], missing[who], set(extra[who]) | _surplus(tied[who], own))
        for who, state in experts.items()
    }
    return Harmonised(
        base,
        states,
        _lookup({name: tuple(experts[who] for who in whose) for name, whose in added.items()}, {n: n for n in added}),
        chosen,
        (*own, *added),
        replace(report, unmoved={who: names for who, names in missing.items() if names}, added=added),
    )


def _fill_tied(
    base: StateDict, experts: Mapping[str, StateDict], parts: Partition
) -> tuple[dict[str, dict[str, str]], dict[str, tuple[str, ...]]]:
    """By expert: which of its tensors stands in for a missing one, and all names that ties explain."""
    own = specs(base)
    filled: dict[str, dict[str, str]] = {}
    tied: dict[str, tuple[str, ...]] = {}
    for who, state in experts.items():
        found = specs(state)
        lost = [name for name in own if name not in found and not parts.is_private(name)]
        filled[who] = {}
        for name in lost:
            partner = _partner(base, name, [other for other in found if other in own])
            if partner is not None and not _differs(own[name], found[partner]):
                filled[who][name] = partner
        surplus = [name for name in found if name not in own and not parts.is_private(name)]
        explained = [n for n in surplus if _partner(state, n, [other for other in own if other in found]) is not None]
        tied[who] = (*filled[who], *explained)
    return filled, tied


def _partner(state: StateDict, name: str, others: list[str]) -> str | None:
    """The first of ``others`` that ``name`` is tied to in ``state``."""
    described = specs(state)
    for group in tied_groups(state):
        if name in group:
            return next((other for other in group if other != name and other in others), None)
    alike = (other for other in others if other != name and described[other] == described[name])
    return next((other for other in alike if is_copy(state, name, other)), None)


def _added(experts: Mapping[str, StateDict], extra: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Tensors that the base lacks, with the experts that have them, in the order of their names."""
    added: dict[str, tuple[str, ...]] = {}
    for who in sorted(extra):
        for name in extra[who]:
            added[name] = (*added.get(name, ()), who)
    for name, whose in added.items():
        first = specs(experts[whose[0]])[name]
        for who in whose[1:]:
            spec = specs(experts[who])[name]
            if _differs(first, spec):
                raise _conflict(who, name, spec, f"{whose[0]}", first)
            if not first.floating and not torch.equal(experts[who][name], experts[whose[0]][name].to(spec.dtype)):
                raise CheckpointError(
                    f"{who}: the integer tensor '{name}', which the base lacks, differs from that of {whose[0]} and "
                    "cannot be averaged: remove it, make it private, or merge the intersection"
                )
    return {name: added[name] for name in sorted(added)}


def _differs(one: Spec, other: Spec) -> bool:
    return one.shape != other.shape or one.floating != other.floating or one.dtype.is_complex != other.dtype.is_complex


def _conflict(who: str, name: str, spec: Spec, whose: str, reference: Spec) -> CheckpointError:
    if spec.shape != reference.shape:
        return CheckpointError(
            f"{who}: tensor '{name}' has shape {spec.shape} where {whose} has {reference.shape}: {_NEEDED}"
        )
    return CheckpointError(
        f"{who}: tensor '{name}' has type {spec.dtype} where {whose} has {reference.dtype}: convert it"
    )


def _without(parts: Partition, names: set[str]) -> Partition:
    def rest(members: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name for name in members if name not in names)

    return replace(parts, shared=rest(parts.shared), buffers=rest(parts.buffers), constants=rest(parts.constants))


def _surplus(tied: tuple[str, ...], own: Mapping[str, Spec]) -> set[str]:
    return {name for name in tied if name not in own}


def _select(
    state: StateDict, base: StateDict, filled: Mapping[str, str], missing: tuple[str, ...], without: set[str]
) -> StateDict:
    """A state dict without some names, and with others from itself (``filled``) or from the base (``missing``)."""
    if not (filled or missing or any(name in state for name in without)):
        return state
    names = {name: (state,) for name in specs(state) if name not in without}
    keys = {name: name for name in names}
    for name in missing:
        names[name], keys[name] = (base,), name
    for name, other in filled.items():
        if name not in without:
            names[name], keys[name] = (state,), other
    order = [name for name in specs(base) if name in names] + [name for name in names if name not in specs(base)]
    return _lookup({name: names[name] for name in order}, keys)


def _lookup(sources: Mapping[str, tuple[StateDict, ...]], keys: Mapping[str, str]) -> StateDict:
    """Tensors by name from several state dicts: a plain dict where all are in memory and nothing is averaged."""
    if not any(len(states) > 1 or isinstance(states[0], LazyState) for states in sources.values()):
        return {name: states[0][keys[name]] for name, states in sources.items()}

    def read(name: str) -> Tensor:
        return _mean([state[keys[name]] for state in sources[name]])

    def sample(name: str) -> Tensor:
        state = sources[name][0]
        if len(sources[name]) == 1 and isinstance(state, LazyState):
            return state.sample(keys[name])
        return sample_bytes(read(name))

    def region(name: str) -> Region | None:
        state = sources[name][0]
        return state.region(keys[name]) if len(sources[name]) == 1 and isinstance(state, LazyState) else None

    described = {name: _widest([specs(state)[keys[name]] for state in states]) for name, states in sources.items()}
    return LazyState(described, read, tied=_ties(sources, keys), sample=sample, region=region)


def _ties(sources: Mapping[str, tuple[StateDict, ...]], keys: Mapping[str, str]) -> tuple[tuple[str, ...], ...]:
    """Names that come from the same tensor, or from tied ones of the same source."""
    groups: dict[tuple[int, str], list[str]] = {}
    canonical = {
        id(state): {name: group[0] for group in tied_groups(state) for name in group}
        for states in sources.values()
        for state in states
    }
    for name, states in sources.items():
        if len(states) == 1:
            key = canonical[id(states[0])].get(keys[name], keys[name])
            groups.setdefault((id(states[0]), key), []).append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def _widest(found: list[Spec]) -> Spec:
    dtype = found[0].dtype
    for spec in found[1:]:
        if spec.dtype != dtype:
            try:
                dtype = torch.promote_types(dtype, spec.dtype)
            except RuntimeError:  # float8 with another type
                dtype = torch.float32
    return Spec(found[0].shape, dtype)


def _mean(tensors: list[Tensor]) -> Tensor:
    """The mean in float32 (float64 where one is stored so), rounded once; a single or integer tensor as it is."""
    if len(tensors) == 1 or not tensors[0].is_floating_point():
        return tensors[0]
    dtype = _widest([Spec(tuple(tensor.shape), tensor.dtype) for tensor in tensors]).dtype
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    total = tensors[0].detach().to(exact, copy=True)
    for tensor in tensors[1:]:
        total += tensor.detach().to(exact)
    return total.div_(len(tensors)).to(dtype)
