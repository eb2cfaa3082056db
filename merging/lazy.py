"""Mappings of name to tensor that fetch a tensor only when it is asked for, and know shapes and types without that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from merging.types import StateDict

if TYPE_CHECKING:
    from merging.remote_file import RemoteFile

_SAMPLE = 4096


@dataclass(frozen=True)
class Spec:
    """What is known of a tensor without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of entries."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the entries in bytes."""
        return self.numel * self.dtype.itemsize

    @property
    def floating(self) -> bool:
        """Whether this is a real floating type, which can be merged."""
        return self.dtype.is_floating_point


@dataclass(frozen=True)
class Region:
    """Where the bytes of a tensor lie in a file: in one piece, little-endian, row by row.

    Attributes:
        path: the file.
        identity: device, inode, size and time of change when its header was read.
        begin: first byte.
        end: behind the last byte.
        remote: the object, where the file is behind a URL (``path`` only names it then).
    """

    path: Path
    identity: tuple[int, int, int, int]
    begin: int
    end: int
    remote: RemoteFile | None = None

    @property
    def source(self) -> Path | RemoteFile:
        """What tells files apart."""
        return self.path if self.remote is None else self.remote


class LazyState(Mapping[str, Tensor]):
    """A state dict whose tensors are fetched on access, each time anew.

    It can be used wherever a :data:`~merging.types.StateDict` can; nothing is cached, so memory is bounded by what
    the caller keeps.

    Args:
        specs: shape and type of each tensor, in the mapping's order.
        read: fetches a tensor by name; must agree with ``specs``.
        tied: groups of names that the source stores once (see :mod:`merging.tied`).
        sample: a few bytes of a tensor (flat uint8), equal for equal tensors; default: read it whole.
        region: where a tensor's bytes lie in a file, or ``None`` where they do not; default: nowhere.
    """

    def __init__(
        self,
        specs: Mapping[str, Spec],
        read: Callable[[str], Tensor],
        *,
        tied: tuple[tuple[str, ...], ...] = (),
        sample: Callable[[str], Tensor] | None = None,
        region: Callable[[str], Region | None] | None = None,
    ) -> None:
        self._specs = dict(specs)
        self._read = read
        self._sample = sample
        self._region = region
        self.tied = tied

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._specs:
            raise KeyError(name)
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        return name in self._specs

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def __eq__(self, other: object) -> bool:
        return self is other  # comparing values would read everything

    def __hash__(self) -> int:
        return id(self)

    @property
    def names(self) -> tuple[str, ...]:
        """Tensor names, in order."""
        return tuple(self._specs)

    @property
    def specs(self) -> Mapping[str, Spec]:
        """Shape and type of every tensor."""
        return self._specs

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(spec.nbytes for spec in self._specs.values())

    def spec(self, name: str) -> Spec:
        """Shape and type of one tensor.

        Raises:
            KeyError: no such tensor.
        """
        return self._specs[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading it."""
        return self._specs[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Storage type of one tensor, without reading it."""
        return self._specs[name].dtype

    def tensor(self, name: str) -> Tensor:
        """Fetch one tensor."""
        return self[name]

    def region(self, name: str) -> Region | None:
        """Where a tensor's bytes lie in a file; ``None``: nowhere, or not in one piece."""
        return None if self._region is None else self._region(name)

    def sample(self, name: str) -> Tensor:
        """Some bytes of a tensor, as flat uint8: different bytes mean different tensors."""
        return sample_bytes(self[name]) if self._sample is None else self._sample(name)


def specs(state: StateDict) -> Mapping[str, Spec]:
    """Shape and type of every tensor of a state dict, lazy or not, without reading values."""
    if isinstance(state, LazyState):
        return state.specs
    return {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}


def remote_memory(states: Iterable[StateDict]) -> int:
    """Bytes that reading state dicts behind URLs in chunks holds at most (0: none of them is)."""
    lazy = [state for state in states if isinstance(state, LazyState)]
    regions = [state.region(name) for state in lazy for name in state.names]
    files = {region.remote for region in regions if region is not None and region.remote is not None}
    return sum(file.held for file in files)


def sample_window(nbytes: int) -> tuple[int, int]:
    """Which bytes of a tensor :func:`sample_bytes` takes: up to 4 KiB from its middle, aligned to 16."""
    start = max(0, (nbytes - _SAMPLE) // 2) // 16 * 16
    return start, min(nbytes, start + _SAMPLE)


def sample_bytes(tensor: Tensor) -> Tensor:
    """A few bytes from the middle of a tensor in memory, flat uint8."""
    start, stop = sample_window(tensor.numel() * tensor.element_size())
    size = tensor.element_size()
    if tensor.is_contiguous():
        piece = tensor.detach().reshape(-1)[start // size : -(-stop // size)]
    else:
        piece = tensor.detach().contiguous().reshape(-1)[start // size : -(-stop // size)]
    return piece.cpu().contiguous().view(torch.uint8)
