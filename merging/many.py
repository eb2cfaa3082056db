"""Thousands of merges of the same small experts, in memory.

``merge_many`` checks and plans; blocks of merges are made when they are asked for, so that ten thousand merges of a
hundred thousand parameters never need more memory than one block.  Every merge has the bits of
:func:`merging.merge.merge_flat`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from merging.compatible import check_finite
from merging.errors import MethodError
from merging.flat import FlatSpace
from merging.many_plan import planner_of
from merging.many_request import Asked, ManyCoefficients, Subsets, asked, merge_one
from merging.many_run import Experts, Runner
from merging.many_table import Plan, linear_coefficients, plan_merges
from merging.method import Method, Rows
from merging.partition import Partition, is_variance
from merging.registry import get

_BLOCK_BYTES = 2**25
_TOGETHER = 16  # merges per matrix product: they stay in the cache


@dataclass(frozen=True)
class ManyMerges:
    """C merges that are checked and planned; iterate over it for ``(start, block)`` pairs.

    Attributes:
        method: how they merge.
        base: ``x_0``, shape ``(P,)``.
        rows: the N task vectors, as ``(N, P)``.
        names: of the experts.
        space: the layout of the P coordinates.
        partition: which of them are shared.
        wanted: what each merge is to be.
        plan: how the fast path makes them; ``None``: one by one, by the definition.
        exact: whether the bits are the definition's.
        threads: of the fast path; they change no bit.
    """

    method: Method
    base: Tensor
    rows: Tensor
    names: tuple[str, ...]
    space: FlatSpace
    partition: Partition
    wanted: Asked
    plan: Plan | None
    exact: bool
    threads: int

    def __len__(self) -> int:
        """Number of merges C."""
        return self.wanted.count

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        return self.blocks()

    def blocks(self, size: int | None = None, *, out: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
        """Yield ``(start, block)``: the merges number ``start`` and following as the rows of ``(at most size, P)``.

        Args:
            size: merges per block (default: about 32 MB, or as many as ``out`` holds).
            out: a contiguous ``(size, P)`` tensor that every block is written into, so that a block is valid until the
                next one is asked for; by default every block is a new tensor.

        Raises:
            MethodError: an ``out`` that does not fit; settings that the definition refuses.
        """
        width = self.space.size
        if out is not None and (
            out.dim() != 2
            or out.shape[1] != width
            or len(out) == 0
            or out.dtype != self.space.dtype
            or not out.is_contiguous()
            or out.device != self.base.device
        ):
            raise MethodError(
                f"out is {out.dtype} of shape {tuple(out.shape)}: give contiguous {self.space.dtype} of shape "
                f"(merges per block, {width}) on the experts' device"
            )
        room = size if size is not None else max(1, _BLOCK_BYTES // max(1, width * self.space.dtype.itemsize))
        if out is not None:
            room = len(out) if size is None else min(size, len(out))
        if room < 1:
            raise MethodError(f"blocks of {room} merges were asked for: ask for at least one")
        return self._blocks(room, out)

    def _blocks(self, room: int, out: Tensor | None) -> Iterator[tuple[int, Tensor]]:
        write = self._writer()
        for start in range(0, len(self), room):
            count = min(room, len(self) - start)
            if out is None:
                block = torch.empty((count, self.space.size), dtype=self.space.dtype, device=self.base.device)
            else:
                block = out[:count]
            write(start, block)
            yield start, block

    def _writer(self) -> Callable[[int, Tensor], None]:
        if self.plan is None:
            return self._by_definition
        if not self.exact:
            joined = torch.cat([self.rows, self.base[None]])  # the base is one more row, with coefficient one
            return lambda start, block: self._by_product(joined, start, block)
        count = len(self.partition.shared)
        covers_all = self.method.linear or self.method.merges_buffers
        covered = self.space if covers_all else self.space.take(0, count)
        order = sorted(range(len(self.names)), key=self.names.__getitem__)
        rows = self.rows if order == list(range(len(order))) else self.rows[order]
        experts = Experts(rows, self.base, tuple(self.names[i] for i in order), covered)
        runner = Runner(experts, self.plan, self.threads)

        def write(start: int, block: Tensor) -> None:
            runner.write(start, block)
            self._clamp(block)

        return write

    def _by_definition(self, start: int, block: Tensor) -> None:
        rows = list(self.rows.unbind(0))
        for place in range(len(block)):
            block[place] = merge_one(
                self.method, self.base, rows, self.names, self.space, self.partition, self.wanted, start + place
            )

    def _by_product(self, joined: Tensor, start: int, block: Tensor) -> None:
        assert self.plan is not None
        place = np.argsort(sorted(range(len(self.names)), key=self.names.__getitem__))
        alphas = linear_coefficients(self.plan, slice(start, start + len(block)))[:, place]
        matrix = torch.from_numpy(np.column_stack([alphas, np.ones(len(block))])).to(joined)
        for low in range(0, len(block), _TOGETHER):
            torch.mm(matrix[low : low + _TOGETHER], joined, out=block[low : low + _TOGETHER])
        self._clamp(block)

    def _clamp(self, block: Tensor) -> None:
        for name, piece in list(self.space.segments())[len(self.partition.shared) :]:
            if is_variance(name):
                block[:, piece].clamp_(min=0.0)

    def stack(self) -> Tensor:
        """All merges in one ``(C, P)`` tensor."""
        out = torch.empty((len(self), self.space.size), dtype=self.space.dtype, device=self.base.device)
        write = self._writer()
        room = max(1, _BLOCK_BYTES // max(1, self.space.size * self.space.dtype.itemsize))
        for start in range(0, len(self), room):
            write(start, out[start : start + room])
        return out

    def evaluate(self, function: Callable[[Tensor], Any], size: int | None = None) -> NDArray[Any]:
        """``function(block)`` over all blocks, joined along the first axis; no merge is kept.

        Args:
            function: ``(block, P)`` merges to an array or tensor with one entry per merge along the first axis.  The
                block is overwritten afterwards.
            size: merges per block (default: about 32 MB).

        Raises:
            MethodError: a result of another length than the block.
        """
        width = self.space.size
        room = size if size is not None else max(1, _BLOCK_BYTES // max(1, width * self.space.dtype.itemsize))
        room = max(1, min(room, len(self)))
        out = torch.empty((room, width), dtype=self.space.dtype, device=self.base.device)
        found = []
        for _, block in self.blocks(out=out):
            result = function(block)
            values = result.detach().cpu().numpy().copy() if isinstance(result, Tensor) else np.array(result)
            if values.ndim == 0 or len(values) != len(block):
                raise MethodError(
                    f"evaluate returned shape {values.shape} for a block of {len(block)} merges: return one entry per "
                    "merge along the first axis"
                )
            found.append(values)
        return np.concatenate(found) if found else np.zeros(0)


def merge_many(
    method: str | Method,
    base: Tensor,
    task_vectors: Tensor | Rows,
    space: FlatSpace,
    partition: Partition,
    *,
    names: Sequence[str] | None = None,
    coefficients: ManyCoefficients | None = None,
    subsets: Subsets | None = None,
    each: Mapping[str, Sequence[Any]] | None = None,
    seed: int | Sequence[int] = 0,
    exact: bool = True,
    threads: int = 1,
    **settings: Any,
) -> ManyMerges:
    """C merges of the same N experts, each with the bits of :func:`merging.merge.merge_flat`.

    Running variances of BatchNorm that become negative are set to 0 without a warning for each merge:
    :func:`merging.variances.zero_shares` tells how many of a block's were.

    C is the common length of those of ``coefficients`` (where two-dimensional), ``subsets``, the entries of ``each``
    and ``seed`` (where a sequence) that are given; 1 if none is.

    Args:
        method: a name or a method of one's own.  Averages, given coefficients, task arithmetic, TIES, DARE, DARE-TIES,
            MagMax, EMR and consensus merges have fast paths (compiled by numba at first use) for float32 and float64
            on the CPU; everything else goes through the definition, one by one.
        base: ``x_0``, shape ``(P,)``.
        task_vectors: ``(N, P)``, or N vectors; not modified, and to be left alone until the merges are made.
        space: the layout, from :func:`merging.merge.flat_space`.
        partition: tells how many tensors of the layout are shared.
        names: of the experts; default ``"0", "1", ...``.  A subset's experts keep their names.
        coefficients: ``(N,)`` for all merges (or by name), or ``(C, N)``.  Those of a subset's members count.
        subsets: booleans ``(C, N)``, or C lists of indices: who takes part (default: everybody in every merge).
        each: setting to its C values, as in ``each={"coefficient": [0.1, 0.2], "density": [0.2, 0.2]}``.
        seed: one for all merges, or C.
        exact: ``False`` makes linear merges by a matrix product: coordinates differ from the exact path by at most
            ``(2 N + 4) u (|x_0| + sum_i |alpha_i Delta_i|)`` with the unit roundoff u (2^-24 in float32), and may
            depend on block size, number of threads and machine.
        threads: of the fast path; they change no bit.
        **settings: the method's other settings, for all merges.

    Raises:
        CheckpointError: NaN or infinite values (all inputs are checked once), or vectors that do not fit the layout.
        MethodError: see :func:`merging.merge.merge_flat`; lengths that do not agree.

    Example::

        for start, block in merge_many("ties", base, deltas, space, parts, subsets=subsets, density=0.2):
            losses[start : start + len(block)] = evaluate(block)
    """
    chosen = get(method) if isinstance(method, str) else method
    rows = task_vectors if isinstance(task_vectors, Tensor) else torch.stack(list(task_vectors))
    rows, base = rows.detach().contiguous(), base.detach().contiguous()
    if rows.dim() != 2:
        raise MethodError(f"task vectors of shape {tuple(rows.shape)}: give (experts, {space.size})")
    labels = tuple(str(index) for index in range(len(rows))) if names is None else tuple(names)
    if len(labels) != len(rows) or len(set(labels)) != len(labels):
        raise MethodError(f"{len(rows)} task vectors came with names {list(labels)}: give one distinct name each")
    if not isinstance(threads, int) or threads < 1:
        raise MethodError(f"threads is {threads}: give a whole number, at least one")
    for what, given in (("task vectors", rows), ("the base", base)):
        if given.dtype not in (torch.float32, torch.float64):
            raise MethodError(f"{what} come as {given.dtype}: convert them to {space.dtype}, as space.flatten does")
    states = {label: space.unflatten(row) for label, row in zip(labels, rows, strict=True)}
    check_finite(space.unflatten(base), states, partition, (base, *rows))
    wanted = asked(labels, coefficients, subsets, each, seed, settings)
    planner = planner_of(chosen)
    plan: Plan | None = None
    if planner is not None and rows.device.type == "cpu" and rows.dtype == base.dtype == space.dtype:
        found = plan_merges(chosen, planner, labels, wanted, space.dtype)
        if isinstance(found, Plan):
            plan = found
        else:  # the definition refuses this merge now, or all are made by it
            merge_one(chosen, base, list(rows.unbind(0)), labels, space, partition, wanted, found)
    if not exact and (plan is None or not chosen.linear):
        raise MethodError(f"these merges by '{chosen.name}' are no matrix product: leave out exact=False")
    return ManyMerges(chosen, base, rows, labels, space, partition, wanted, plan, exact, threads)
