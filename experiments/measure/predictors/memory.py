"""How much memory passes take: measured on one and two images, so that batches can be chosen within a limit."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from theory.errors import MergeboundError

SAFETY = 1.25
"""Batches are chosen as if everything took so much more than was measured."""


class LiveTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors made inside ``with``, and the most that lived at one time (``peak``).

    Workspaces that a kernel allocates and frees by itself are not tensors and are not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: int = 0
        self.peak: int = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operation and look at what it made."""
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage(), given)
        return out

    def _add(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key = id(storage)
        if key in given or key in self._known:
            return
        size = storage.nbytes()

        def gone(_: Any) -> None:
            if self._known.pop(key, None) is not None:
                self.live -= size

        self._known[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


def peak_bytes(work: Callable[[], Any]) -> int:
    """Most bytes of tensors that lived at one time while ``work`` ran, beyond those it was given."""
    with LiveTensors() as seen:
        work()
    return int(seen.peak)


@dataclass(frozen=True)
class Appetite:
    """Bytes of a pass over n images and D directions, ``fixed + image n + direction D + both n D``."""

    fixed: float
    image: float
    direction: float
    both: float

    def of(self, images: int, directions: int) -> float:
        """Bytes of a pass, with :data:`SAFETY`."""
        return SAFETY * (
            self.fixed + self.image * images + self.direction * directions + self.both * images * directions
        )


def appetite(work: Callable[[int, int], Any]) -> Appetite:
    """Measure ``work(images, directions)`` at one and two of each."""
    sizes = ((1, 1), (2, 1), (1, 2), (2, 2))
    one, images, directions, four = (peak_bytes(partial(work, n, d)) for n, d in sizes)
    both = max(four - images - directions + one, 0)
    image, direction = max(images - one - both, 0), max(directions - one - both, 0)
    return Appetite(max(one - image - direction - both, 0), image, direction, both)


def fit_batches(found: Appetite, memory: int, images: int, directions: int) -> tuple[int, int]:
    """Images and directions per pass within ``memory`` bytes: as many images as fit, then as many directions.

    Raises:
        MergeboundError: not even one image and one direction fit.
    """
    if found.of(1, 1) > memory:
        raise MergeboundError(
            f"memory = {memory / 2**20:.0f} MiB: one image takes about {found.of(1, 1) / 2**20:.0f} MiB; allow more"
        )

    def most(limit: int, fits: Callable[[int], bool]) -> int:
        low, high = 1, max(limit, 1)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return low

    n = most(images, lambda count: found.of(count, 1) <= memory)
    return n, most(directions, lambda count: found.of(n, count) <= memory)
