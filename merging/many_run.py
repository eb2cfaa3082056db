"""Run planned merges block by block; see :mod:`merging.many`."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from merging.flat import FlatSpace
from merging.many_plan import Form, Masks
from merging.many_table import Plan
from merging.methods.ties import kept
from merging.random_masks import match_l1, stream_key

Floats = NDArray[Any]
Ranks = NDArray[np.int32]

_KINDS = ("combine", "elect_sum", "elect_mean", "largest", "unify")


@dataclass(frozen=True)
class Experts:
    """N task vectors in the order of their sums.

    Attributes:
        rows: ``(N, P)``, contiguous, on the CPU.
        base: ``(P,)``.
        names: theirs; random masks depend on them.
        space: the layout of what the method covers, the first ``space.size`` coordinates.
    """

    rows: Tensor
    base: Tensor
    names: tuple[str, ...]
    space: FlatSpace


class Runner:
    """Fast paths over one set of experts; remembers the last random masks and rankings.

    Args:
        experts: what is merged.
        plan: all merges.
        threads: coordinates are split over so many threads, which changes no bit.
    """

    def __init__(self, experts: Experts, plan: Plan, threads: int) -> None:
        self._experts, self._plan, self._threads = experts, plan, threads
        self._masked = lru_cache(maxsize=1)(self._sparsify)
        self._ranked = lru_cache(maxsize=2)(self._rank)
        self._kept = lru_cache(maxsize=65536)(kept)

    def write(self, start: int, out: Tensor) -> None:
        """Make the merges number ``start`` to ``start + len(out)``; ``out``: ``(block, P)``, contiguous."""
        plan, space = self._plan, self._experts.space
        numbers = np.arange(start, start + len(out))
        for form in np.unique(plan.form[numbers]).tolist():
            chosen = numbers[plan.form[numbers] == form]
            self._form(plan.forms[form], chosen, chosen - start, out)
        size = out.shape[1]
        if space.size < size:  # running statistics are averaged
            average = replace(plan, scales=plan.members.sum(axis=1).astype(np.float64))
            form_average = Form("combine", divide=True)
            self._call(
                form_average, average, numbers, numbers - start, out, _array(self._experts.rows), (space.size, size)
            )

    def _form(self, form: Form, chosen: NDArray[np.int64], places: NDArray[np.int64], out: Tensor) -> None:
        rows = self._experts.rows
        if form.masks is not None:
            used = tuple(np.flatnonzero(self._plan.members[chosen].any(axis=0)).tolist())
            rows = self._masked(form.masks, used)
        self._call(form, self._plan, chosen, places, out, _array(rows), (0, self._experts.space.size))

    def _call(
        self,
        form: Form,
        plan: Plan,
        chosen: NDArray[np.int64],
        places: NDArray[np.int64],
        out: Tensor,
        rows: Floats,
        span: tuple[int, int],
    ) -> None:
        from merging.kernels import many

        dtype = rows.dtype
        members = plan.members[chosen]
        weights = np.where(members, plan.weights[chosen] if form.weighted else 1.0, 0.0).astype(dtype)
        levels = np.full(len(chosen), -1)
        edges, keep, ranks = np.zeros(2, np.int64), np.zeros((1, 1), np.int64), np.zeros((len(rows), 1), np.int32)
        if form.scope is not None:
            pieces = self._pieces(form)
            densities, levels = np.unique(plan.densities[chosen], return_inverse=True)
            edges = np.array([0, *(piece.stop for piece in pieces)], dtype=np.int64)
            sizes = np.diff(edges).tolist()
            keep = np.array([[self._kept(n, d, form.rounding) for n in sizes] for d in densities.tolist()])
            if (keep == np.diff(edges)).all():
                levels = np.full(len(chosen), -1)
            else:
                used = None if form.masks is None else tuple(np.flatnonzero(members.any(axis=0)).tolist())
                ranks = self._ranked(form.masks, used, form.scope)
        first, order, bodies = _bodies(levels, members, weights)
        owner, who = np.nonzero(members[first])
        starts = np.searchsorted(owner, np.arange(len(first) + 1))
        used_weights = weights[first][owner, who]
        ones = np.ones_like(used_weights)
        elects = form.kind.startswith("elect")
        arguments = (
            _array(self._experts.base),
            _array(out),
            _KINDS.index(form.kind),
            form.divide,
            form.strictness is not None,
            bodies,
            starts,
            np.ascontiguousarray(who),  # one kind of array: numba compiles a loop for each
            used_weights if form.turned else ones,
            used_weights if form.voting or not elects else ones,
            ones if form.turned else used_weights,
            np.full(len(ones), form.strictness or 0.0, dtype=dtype),
            float(np.float32(form.threshold)),
            levels[first].astype(np.int64),
            ranks,
            edges,
            keep,
            places[order],
            plan.scales[chosen][order].astype(dtype),
        )

        def part(low: int, high: int) -> None:
            many.merge_block(rows, *arguments, low, high, many.CHUNK)

        cuts = np.linspace(*span, self._threads + 1).astype(int).tolist()
        if self._threads == 1:
            part(*span)
        else:
            with ThreadPoolExecutor(self._threads) as pool:
                list(pool.map(part, cuts[:-1], cuts[1:]))

    def _pieces(self, form: Form) -> list[slice]:
        space = self._experts.space
        return [slice(0, space.size)] if form.scope == "global" else [piece for _, piece in space.segments()]

    def _sparsify(self, masks: Masks, used: Sequence[int]) -> Tensor:
        """Masked rows, ``(N, size)``; rows that nobody uses are left undefined."""
        from merging.kernels import many

        space, names = self._experts.space, self._experts.names
        rows = self._experts.rows[:, : space.size]
        result = rows.clone() if masks.drop == 0.0 else torch.empty_like(rows, memory_format=torch.contiguous_format)
        limit = np.uint64(round(masks.drop * 2**32))
        for i in used if masks.drop > 0.0 else ():
            for tensor, piece in space.segments():
                key = stream_key(masks.seed, names[i], tensor)
                many.drop_entries(_array(rows[i, piece]), key, limit, _array(result[i, piece]))
        if masks.rescale and masks.rescaling == "l1":
            match_l1([rows[i] for i in used], [result[i] for i in used], space)
        return result

    def _rank(self, masks: Masks | None, used: Sequence[int] | None, scope: str) -> Ranks:
        rows = self._experts.rows if masks is None else self._masked(masks, used)
        pieces = self._pieces(Form("combine", scope=cast(Any, scope)))
        return ranks_of(_array(rows)[:, : self._experts.space.size], pieces, used)


def ranks_of(rows: Floats, pieces: Sequence[slice], used: Sequence[int] | None = None) -> Ranks:
    """The place of every entry in its piece by decreasing magnitude, from zero; of equal ones the first by index.

    Args:
        rows: ``(N, P)`` float32 or float64, finite.
        pieces: the parts that are ranked on their own; they cover the rows.
        used: rows to rank (default: all); the others are left undefined.
    """
    ranks = np.empty(rows.shape, dtype=np.int32)
    for i in range(len(rows)) if used is None else used:
        magnitudes = np.abs(rows[i])
        for piece in pieces:
            part = magnitudes[piece]
            order = _decreasing(part)
            ranks[i, piece][order] = np.arange(len(part), dtype=np.int32)
    return ranks


def _decreasing(magnitudes: Floats) -> NDArray[np.int64]:
    """Stable order of nonnegative numbers, largest first."""
    if magnitudes.dtype != np.float32:
        return np.argsort(-magnitudes, kind="stable")
    bits = (~magnitudes.view(np.uint32)).astype(np.uint64)  # nonnegative floats sort like their bits
    keys = (bits << np.uint64(32)) | np.arange(len(magnitudes), dtype=np.uint64)
    keys.sort()
    return (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)


def _bodies(
    levels: NDArray[np.int64], members: NDArray[np.bool_], weights: Floats
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Merges that differ in the last factor only share a body.

    Returns:
        One merge of each body; all merges sorted by body; where in that order each body begins (and the last ends).
    """
    key = np.concatenate(
        [
            levels.astype(np.int64)[:, None].view(np.uint8),
            members.view(np.uint8),
            np.ascontiguousarray(weights).view(np.uint8),
        ],
        axis=1,
    )
    joined = np.ascontiguousarray(key).view(np.dtype((np.void, key.shape[1])))[:, 0]
    _, first, body = np.unique(joined, return_index=True, return_inverse=True)
    order = np.argsort(body, kind="stable")
    return first, order, np.searchsorted(body[order], np.arange(len(first) + 1))


def _array(tensor: Tensor) -> Floats:
    array: Floats = tensor.detach().numpy()
    return array
