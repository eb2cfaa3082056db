"""Random masks keyed by names: the same for the same expert and tensor, in whatever order, process or model part."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from merging.errors import MethodError
from merging.flat import FlatSpace
from merging.method import Rows
from merging.sums import magnitude

_BLOCKS = 4096  # of four words: what the second-level cache holds

Words = np.ndarray[tuple[int], np.dtype[np.uint32]]


def check_names(method: str, names: Sequence[str], experts: int) -> None:
    """Refuse names that would give two experts the same mask.

    Raises:
        MethodError: names that are missing or repeat.
    """
    if len(names) != experts or len(set(names)) != len(names):
        raise MethodError(
            f"{method} needs one distinct name per expert and got {list(names)} for {experts}: rename them"
        )


def uniform_words(seed: int, expert: str, tensor: str, count: int, start: int = 0) -> Words:
    """Uniform 32-bit words number ``start`` to ``start + count`` of a stream keyed by (seed, expert and tensor name).

    The generator is Philox4x32-10, which turns a counter into four words, so that any part of a tensor can be drawn on
    its own: word ``j`` is word ``j % 4`` of counter ``j // 4``.

    Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011
    (doi:10.1145/2063384.2063405), section 3.3.
    """
    key = stream_key(seed, expert, tensor)
    first, last = start // 4, -(-(start + count) // 4)
    words = np.empty(4 * (last - first), dtype=np.uint32)
    for block in range(first, last, _BLOCKS):
        numbers = np.arange(block, min(last, block + _BLOCKS), dtype=np.uint64)
        words[4 * (block - first) :][: 4 * len(numbers)] = philox(key, numbers)
    return words[start - 4 * first :][:count]


def stream_key(seed: int, expert: str, tensor: str) -> Words:
    """Four words: Philox's key (two), and the upper half of its counter."""
    digest = blake2b(f"{seed}\0{expert}\0{tensor}".encode(), digest_size=16, person=b"mergebound-dare").digest()
    words: Words = np.frombuffer(digest, dtype="<u4").astype(np.uint32)
    return words


def philox(key: Words, blocks: NDArray[np.uint64]) -> Words:
    """Four words for every block number, in order."""
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    a, b, c, d = (np.uint64(word) for word in key)
    x0, x1 = blocks & low, blocks >> half
    x2, x3 = np.full_like(blocks, c), np.full_like(blocks, d)
    for _ in range(10):
        p, q = np.uint64(0xD2511F53) * x0, np.uint64(0xCD9E8D57) * x2
        x0, x1, x2, x3 = (q >> half) ^ x1 ^ a, q & low, (p >> half) ^ x3 ^ b, p & low
        a, b = (a + np.uint64(0x9E3779B9)) & low, (b + np.uint64(0xBB67AE85)) & low
    words: Words = np.stack([x0, x1, x2, x3], axis=1).astype(np.uint32).reshape(-1)
    return words


def keep_mask(space: FlatSpace, seed: int, expert: str, drop: float) -> Tensor:
    """Boolean ``(P,)`` mask of the entries of one expert that are kept, each with probability ``1 - drop``."""
    mask = np.empty(space.size, dtype=np.bool_)
    for tensor, piece in space.segments():
        mask[piece] = uniform_words(seed, expert, tensor, piece.stop - piece.start) >= round(drop * 2**32)
    return torch.from_numpy(mask)


def drop_entries(rows: Rows, space: FlatSpace, names: Sequence[str], seed: int, drop: float) -> list[Tensor]:
    """N new rows with each entry set to zero with probability ``drop``, independently; nothing is rescaled."""
    if drop == 0.0:
        return [row.clone() for row in rows]
    return [row * keep_mask(space, seed, name, drop).to(row) for name, row in zip(names, rows, strict=True)]


def match_l1(rows: Rows, masked: Rows, space: FlatSpace) -> None:
    """Rescale every tensor of every masked row, in place, to the L1 norm it had (zero without survivors)."""
    for row, rest in zip(rows, masked, strict=True):
        for _, piece in space.segments():
            remaining = magnitude(rest[piece])
            if remaining > 0.0:
                rest[piece] *= magnitude(row[piece]) / remaining
