"""Which compiled loop merges which tensors: one small program per family of methods.

Every program writes ``M`` (base included) of a chunk in float32, with the bits of the method's definition.  Methods
without a program of their own are merged chunk by chunk (elementwise ones) or tensor by tensor by their definition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from math import fsum
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from merging.errors import MethodError
from merging.flat import FlatSpace
from merging.kernels.elect import drop, elect, largest_of
from merging.kernels.gram import add_gram
from merging.kernels.linear import copy, linear, linear_without_base
from merging.kernels.norms import masked_norms
from merging.kernels.philox import keep
from merging.linear_form import LinearForm
from merging.method import Method
from merging.methods.ties import kept
from merging.random_masks import stream_key
from merging.span import Array
from merging.streaming.selection import Domain, Threshold, next_above, select
from merging.streaming.source import Buffers, Inputs

Floats = NDArray[np.float32]
_KEPT_MASKS = 1 << 25
"""Bytes of masks of one tensor up to which they are kept between two passes."""

_NONE: Floats = np.empty(0, dtype=np.float32)


class Program(Protocol):
    """How the tensors of one group of settings are merged.

    Attributes:
        passes: how often the checkpoints are read.
        whole: tensors are merged as a whole (their chunks cannot be told apart).
    """

    @property
    def passes(self) -> int: ...

    @property
    def whole(self) -> bool: ...

    def prepare(self, inputs: Inputs, chunk: int, pool: Executor | None, workers: int) -> None:
        """What has to be known of the whole model first."""

    def prepare_tensor(self, inputs: Inputs, name: str, size: int, chunk: int) -> object:
        """What has to be known of a whole tensor before its chunks are merged."""

    def merge(
        self, inputs: Inputs, name: str, start: int, stop: int, known: object, buffers: Buffers, out: Floats
    ) -> int:
        """Write entries ``start`` to ``stop`` of ``M`` into ``out``; returns the number of suspicious entries."""


@dataclass(frozen=True)
class Linear:
    """Fixed numbers times the task vectors."""

    forms: Mapping[str, LinearForm]
    passes: int = 1
    whole: bool = False

    def prepare(self, inputs: Inputs, chunk: int, pool: Executor | None, workers: int) -> None:
        """Nothing."""

    def prepare_tensor(self, inputs: Inputs, name: str, size: int, chunk: int) -> object:
        """Nothing."""
        return None

    def merge(
        self, inputs: Inputs, name: str, start: int, stop: int, known: object, buffers: Buffers, out: Floats
    ) -> int:
        """See :class:`Program`; NaN and infinite weights reach the result."""
        _combine(inputs, name, start, stop, self.forms[name], 0.0, buffers, out)
        return 0


@dataclass
class Elected:
    """TIES: trim, elect, aggregate; with ``drop``, DARE-TIES.

    Attributes:
        domains: what is ranked together: one domain for the whole model, or ``None``: every tensor on its own.
        density: share kept.
        rounding: how the number kept is rounded.
        votes: weights of the votes (``None``: plain).
        turns: factors of the entries before anything else.
        weights: of the aggregate.
        mean: disjoint mean, or sum.
        factor: scale of the update.
        mask: which entries are dropped at random.
        match: what is left of every tensor is rescaled to the L1 norm that it had.
    """

    domain: Domain | None
    density: float
    rounding: Any
    votes: Floats
    turns: Floats
    weights: Floats
    mean: bool
    factor: float
    mask: Mask | None = None
    match: bool = False
    thresholds: list[Threshold] | None = None
    offsets: Mapping[str, int] | None = None
    whole: bool = False

    @property
    def passes(self) -> int:
        """Two, if anything is trimmed or matched."""
        return 2 if self.density < 1.0 or self.match else 1

    def prepare(self, inputs: Inputs, chunk: int, pool: Executor | None, workers: int) -> None:
        """Thresholds over the whole model."""
        if self.domain is None:
            return
        offsets: dict[str, int] = {}
        place = 0
        for name, size in self.domain:
            offsets[name] = place
            place += size
        self.offsets = offsets
        if self.density < 1.0:
            keep = kept(place, self.density, self.rounding)
            self.thresholds = select(inputs, self.domain, keep, chunk=chunk, pool=pool, workers=workers)

    def prepare_tensor(self, inputs: Inputs, name: str, size: int, chunk: int) -> object:
        """Thresholds or L1 norms within the tensor."""
        if self.match and self.mask is not None:
            return self.mask.match(inputs, name, size, chunk)
        if self.domain is not None or self.density == 1.0 or size == 0:
            return None
        return select(inputs, [(name, size)], kept(size, self.density, self.rounding), chunk=chunk)

    def merge(
        self, inputs: Inputs, name: str, start: int, stop: int, known: object, buffers: Buffers, out: Floats
    ) -> int:
        """See :class:`Program`: the suspicious entries are NaN and infinite differences, which elections may hide."""
        chunk = inputs.chunk(name, start, stop, buffers)
        experts = len(chunk.experts)
        ratios = known.ratios if isinstance(known, Matched) else _NONE
        thresholds = known if isinstance(known, list) else self.thresholds
        trimmed = buffers.floats("trimmed", 2048 * experts).reshape(experts, 2048)
        drawn = _masks(self.mask, known, experts, name, start, stop, buffers)
        first = start + (0 if self.offsets is None else self.offsets[name])
        bad = 0
        for begin, end, lowest in _pieces(thresholds, first, stop - start, experts):
            bad += elect(
                out[begin:end],
                chunk.base + 4 * begin,
                chunk.experts + 4 * begin,
                lowest,
                drawn + begin,
                ratios,
                self.votes,
                self.turns,
                self.weights,
                self.mean,
                np.float32(self.factor),
                trimmed,
            )
        return bad


@dataclass(frozen=True)
class Matched:
    """What is known of a tensor whose L1 norms are matched.

    Attributes:
        ratios: by how much the L1 norm of every expert's task vector shrinks; one where nothing is left.
        keep: the masks, shape ``(N, n)``, if they are small enough to be kept; they are drawn again otherwise.
    """

    ratios: Floats
    keep: NDArray[np.uint8] | None


@dataclass(frozen=True)
class Mask:
    """Independent Bernoulli masks, keyed by the names of experts and tensors (DARE)."""

    seed: int
    names: Sequence[str]
    least: int

    def draw(self, name: str, start: int, stop: int, buffers: Buffers) -> NDArray[np.uint8]:
        """One where an entry of an expert is kept, zero elsewhere, for a chunk of a tensor, shape ``(N, n)``."""
        aligned = start // 4 * 4
        count = stop - aligned
        drawn = buffers.bytes("masks", count * len(self.names)).reshape(len(self.names), count)
        self._fill(name, aligned, drawn)
        return drawn[:, start - aligned :]

    def _fill(self, name: str, start: int, masks: NDArray[np.uint8]) -> None:
        """Draw masks from entry ``start`` on, a multiple of four."""
        for row, expert in zip(masks, self.names, strict=True):
            keep(stream_key(self.seed, expert, name), start, np.uint32(self.least), row)

    def match(self, inputs: Inputs, name: str, size: int, chunk: int) -> Matched:
        """L1 norms of a tensor before and after dropping entries."""
        buffers = Buffers()
        experts = len(self.names)
        kept = np.empty((experts, size), dtype=np.uint8) if experts * size <= _KEPT_MASKS else None
        sums = np.zeros((experts, 2))
        step = max(1 << 16, chunk // (1 << 16) * (1 << 16))
        for start in range(0, size, step):
            stop = min(size, start + step)
            found = inputs.chunk(name, start, stop, buffers)
            if kept is None:
                drawn = self.draw(name, start, stop, buffers)
            else:
                drawn = kept[:, start:stop]
                self._fill(name, start, drawn)
            for row, address, total in zip(drawn, found.experts, sums, strict=True):
                masked_norms(found.base, address, row, total)
        ratios = [total / rest if rest > 0.0 else 1.0 for total, rest in sums.tolist()]
        return Matched(np.array(ratios, dtype=np.float32), kept)


@dataclass(frozen=True)
class Dropped:
    """DARE: drop entries at random, add up."""

    mask: Mask | None
    weights: Floats
    factor: float
    match: bool = False
    whole: bool = False

    @property
    def passes(self) -> int:
        """Two, if norms are matched."""
        return 2 if self.match else 1

    def prepare(self, inputs: Inputs, chunk: int, pool: Executor | None, workers: int) -> None:
        """Nothing."""

    def prepare_tensor(self, inputs: Inputs, name: str, size: int, chunk: int) -> object:
        """L1 norms of the tensor."""
        return self.mask.match(inputs, name, size, chunk) if self.match and self.mask is not None else None

    def merge(
        self, inputs: Inputs, name: str, start: int, stop: int, known: object, buffers: Buffers, out: Floats
    ) -> int:
        """See :class:`Program`; NaN and infinite weights reach the result."""
        chunk = inputs.chunk(name, start, stop, buffers)
        ratios = known.ratios if isinstance(known, Matched) else _NONE
        drawn = _masks(self.mask, known, len(chunk.experts), name, start, stop, buffers)
        drop(out, chunk.base, chunk.experts, drawn, ratios, self.weights, np.float32(self.factor))
        return 0


@dataclass(frozen=True)
class Largest:
    """MagMax: the entry of largest magnitude."""

    factor: float
    passes: int = 1
    whole: bool = False

    def prepare(self, inputs: Inputs, chunk: int, pool: Executor | None, workers: int) -> None:
        """Nothing."""

    def prepare_tensor(self, inputs: Inputs, name: str, size: int, chunk: int) -> object:
        """Nothing."""
        return None

    def merge(
        self, inputs: Inputs, name: str, start: int, stop: int, known: object, buffers: Buffers, out: Floats
    ) -> int:
        """See :class:`Program`: the suspicious entries are NaN and infinite differences."""
        chunk = inputs.chunk(name, start, stop, buffers)
        return int(largest_of(out, chunk.base, chunk.experts, np.float32(self.factor)))


@dataclass
class Span:
    """Coefficients from the experts' inner products: SLERP, Karcher mean, Model Stock.

    Attributes:
        solve: Gram matrix to coefficients.
        on_weights: of ``x_i`` instead of ``x_i - x_0``.
        domain: one problem over these tensors, or ``None``: one for each tensor.
        suspects: tensors of the domain that hold NaN or infinite weights, or differences that overflow.
    """

    solve: Callable[[str, Array], Array]
    on_weights: bool
    domain: Domain | None
    shared: Array | None = None
    suspects: tuple[str, ...] = ()
    passes: int = 2
    whole: bool = False

    def prepare(self, inputs: Inputs, chunk: int, pool: Executor | None, workers: int) -> None:
        """The Gram matrix of the whole model, summed tensor by tensor in their order."""
        if self.domain is None:
            return

        def one(entry: tuple[str, int]) -> Array:
            found = gram_of(inputs, *entry, chunk, self.on_weights)
            inputs.release(entry[0], range(len(inputs.experts)))
            return found

        grams = [one(entry) for entry in self.domain] if pool is None else list(pool.map(one, self.domain))
        self.suspects = tuple(name for (name, _), gram in zip(self.domain, grams, strict=True) if not _finite(gram))
        self.shared = self._solved("the whole model", np.sum(grams, axis=0))

    def prepare_tensor(self, inputs: Inputs, name: str, size: int, chunk: int) -> object:
        """The coefficients of one tensor."""
        if self.shared is not None:
            return self.shared
        return self._solved(name, gram_of(inputs, name, size, chunk, self.on_weights))

    def _solved(self, name: str, matrix: Array) -> Array:
        """The coefficients; of weights or differences that are no numbers, what the definition makes of them."""
        with np.errstate(all="ignore"):
            return self.solve(name, matrix)

    def merge(
        self, inputs: Inputs, name: str, start: int, stop: int, known: object, buffers: Buffers, out: Floats
    ) -> int:
        """See :class:`Program`; NaN and infinite weights reach the result."""
        assert isinstance(known, np.ndarray)
        coefficients = [float(value) for value in known]
        shift = fsum([*coefficients, -1.0]) if self.on_weights else 0.0
        _combine(inputs, name, start, stop, LinearForm(coefficients), shift, buffers, out)
        return 0


@dataclass(frozen=True)
class ByDefinition:
    """An elementwise method as it is written, on the chunk's task vectors."""

    method: Method
    settings: Mapping[str, Any]
    passes: int = 1
    whole: bool = False

    def prepare(self, inputs: Inputs, chunk: int, pool: Executor | None, workers: int) -> None:
        """Nothing."""

    def prepare_tensor(self, inputs: Inputs, name: str, size: int, chunk: int) -> object:
        """Nothing."""
        return None

    def merge(
        self, inputs: Inputs, name: str, start: int, stop: int, known: object, buffers: Buffers, out: Floats
    ) -> int:
        """See :class:`Program`."""
        size = stop - start
        chunk = inputs.chunk(name, start, stop, buffers)
        rows = buffers.floats("rows", size * len(chunk.experts)).reshape(len(chunk.experts), size)
        origin = buffers.floats("origin", size)
        copy(chunk.base, origin)
        for row, address in zip(rows, chunk.experts, strict=True):
            copy(address, row)
        start_point, moved = torch.from_numpy(origin), torch.from_numpy(rows)
        moved -= start_point
        space = FlatSpace((name,), ((size,),), (0, size))
        update = self.method.on_rows(list(moved.unbind(0)), space, **self.settings)
        torch.add(update, start_point, out=torch.from_numpy(out))
        return int(np.count_nonzero(~np.isfinite(rows)))


def gram_of(inputs: Inputs, name: str, size: int, chunk: int, on_weights: bool) -> Array:
    """Inner products of all experts over one tensor, shape ``(N, N)``, in float64.

    Sums are over pieces of 65,536 entries, whatever the size of the chunks.
    """
    buffers = Buffers()
    experts = len(inputs.experts)
    total: Array = np.zeros((experts, experts))
    step = 1 << 16
    for start in range(0, size, max(step, chunk // step * step)):
        stop = min(size, start + max(step, chunk // step * step))
        found = inputs.chunk(name, start, stop, buffers)
        for begin in range(0, stop - start, step):
            part: Array = np.zeros((experts, experts))
            count = min(step, stop - start - begin)
            add_gram(found.base + 4 * begin, found.experts + 4 * begin, count, on_weights, part)
            total += part
    return total


def numbers(values: Sequence[float] | None) -> Floats:
    """Coefficients for a compiled loop; ``None``: none."""
    return _NONE if values is None else np.array(values, dtype=np.float32)


def refuse_weighted_mean(weights: Sequence[float] | None, mean: bool) -> None:
    """What :func:`merging.methods.ties.merge_elected` refuses.

    Raises:
        MethodError: a weighted mean over coefficients that are not positive.
    """
    if weights is not None and mean and min(weights) <= 0.0:
        raise MethodError("the weighted disjoint mean needs positive coefficients: use aggregation=sum for others")


def _combine(
    inputs: Inputs, name: str, start: int, stop: int, form: LinearForm, shift: float, buffers: Buffers, out: Floats
) -> None:
    chunk = inputs.chunk(name, start, stop, buffers)
    weights = numbers(form.weights)
    factor, divisor = np.float32(form.factor), np.float32(form.divisor)
    if inputs.base is None:
        linear_without_base(out, chunk.experts, weights, factor, divisor)
    else:
        linear(out, chunk.base, chunk.experts, weights, factor, divisor, np.float32(shift))


def _masks(
    mask: Mask | None, known: object, experts: int, name: str, start: int, stop: int, buffers: Buffers
) -> NDArray[np.int64]:
    """Addresses of every expert's mask of a chunk; none where nothing is dropped."""
    if mask is None:
        return np.empty(0, dtype=np.int64)
    if isinstance(known, Matched) and known.keep is not None:
        return _rows(known.keep) + start
    return _rows(mask.draw(name, start, stop, buffers))


def _rows(matrix: NDArray[np.uint8]) -> NDArray[np.int64]:
    return int(matrix.ctypes.data) + matrix.strides[0] * np.arange(len(matrix), dtype=np.int64)


def _pieces(
    thresholds: Sequence[Threshold] | None, first: int, size: int, experts: int
) -> list[tuple[int, int, Floats]]:
    """A chunk, divided where an expert's last entry of its threshold's magnitude is kept."""
    if thresholds is None:
        return [(0, size, np.zeros(experts, dtype=np.float32))]
    inner = {cut for cut in (threshold.cut - first for threshold in thresholds) if 0 < cut < size}
    ends = sorted({*inner, size})
    begins = [0, *ends[:-1]]
    found = []
    for begin, end in zip(begins, ends, strict=True):
        lowest = [t.value if first + begin < t.cut else next_above(t.value) for t in thresholds]
        found.append((begin, end, np.array(lowest, dtype=np.float32)))
    return found


def _finite(matrix: Array) -> bool:
    return bool(np.isfinite(matrix).all())
