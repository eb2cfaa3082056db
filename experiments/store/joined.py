"""Small states joined into one array per type before they are packed.

A network of a thousand weights has as many tensors as one of a million, and a few calls for each of them cost more than
its weights.  What depends on names, shapes and the base alone (its bits laid end to end, the list of tensors) is made
once for all states of one kind; a state then costs a few calls for each type of number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from experiments.store.bits import PACKED, fits, integers, kind_of, ordered

SMALL = 1 << 20
"""Numbers of a state, at most; larger ones are packed tensor by tensor, which takes less memory."""
_KINDS = 8


@dataclass(frozen=True)
class Group:
    """The tensors of one type.

    Attributes:
        dtype: of their numbers.
        names: in the order in which they are laid end to end.
        starts: where each begins; int64.
        related: for each, whether the base has one like it; bool.
        against: bits of the base's, zeros where it has none; integers.
        ordered: the same as integers that grow with their floats.
        listed: name, shape and ``related`` of each, for the header.
    """

    dtype: torch.dtype
    names: tuple[str, ...]
    starts: np.ndarray
    related: np.ndarray
    against: np.ndarray
    ordered: np.ndarray
    listed: list[list[object]]


class Reference(dict[str, Tensor]):
    """Tensors of a base that many states are stored against, with what was made for states like the last ones."""

    def __init__(self, tensors: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(tensors or {})
        self._groups: dict[object, tuple[Group, ...]] = {}

    def groups(self, state: Mapping[str, Tensor]) -> tuple[Group, ...]:
        """How a state is laid out; nothing if it is too large, or holds tensors that are not packed."""
        kind = tuple((name, tensor.shape, tensor.dtype) for name, tensor in state.items())
        found = self._groups.get(kind)
        if found is None:
            while len(self._groups) >= _KINDS:
                self._groups.pop(next(iter(self._groups)))
            found = self._groups[kind] = _groups(state, self)
        return found


def join(state: Mapping[str, Tensor], group: Group) -> np.ndarray | None:
    """Bits of a group's tensors end to end; ``None`` if one of them has the base's bits, and need not be stored."""
    whole = torch.cat([state[name].reshape(-1) for name in group.names])
    bits = integers(whole)
    if group.related.any():
        first = (bits[group.starts] == group.against[group.starts]) & group.related
        if first.any() and bool((np.logical_and.reduceat(bits == group.against, group.starts) & group.related).any()):
            return None
    return bits


def _groups(state: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> tuple[Group, ...]:
    if sum(tensor.numel() for tensor in state.values()) > SMALL:
        return ()
    if any(tensor.dtype not in PACKED or not tensor.numel() for tensor in state.values()):
        return ()
    by_type: dict[torch.dtype, list[str]] = {}
    for name, tensor in state.items():
        by_type.setdefault(tensor.dtype, []).append(name)
    found = []
    for dtype, names in by_type.items():
        related = np.array([fits(state[name], base.get(name)) for name in names])
        parts = [
            integers(base[name]) if there else np.zeros(state[name].numel(), kind_of(dtype))
            for name, there in zip(names, related, strict=True)
        ]
        against = np.concatenate(parts)
        starts = np.cumsum([0, *(len(part) for part in parts[:-1])])
        listed: list[list[object]] = [
            [name, list(state[name].shape), bool(there)] for name, there in zip(names, related, strict=True)
        ]
        found.append(Group(dtype, tuple(names), starts, related, against, ordered(against, dtype), listed))
    return tuple(found)
