"""Many merges of the same rows: a chunk of all experts is read once, for every merge that needs it.

A *body* is what several merges share up to a last factor (the same experts, coefficients and density); each merge then
is ``body * scale + base`` or ``body / scale + base``.  A chunk of the experts and of a body fits the first or second
level of the cache, so that what remains is arithmetic and writing the merges.  Sums run in the order of the rows,
products and sums are rounded separately: the bits of :func:`merging.method.combine`,
:func:`merging.methods.ties.merge_elected` and the other definitions.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from merging.kernels.philox import words

CHUNK = 1024
"""Coordinates per chunk: nine float32 chunks fill a first-level cache of 48 KB."""

COMBINE, ELECT_SUM, ELECT_MEAN, LARGEST, UNIFY = range(5)
"""What a body is: a linear combination, a disjoint sum or mean, MagMax, EMR's elected vector."""

compiled = numba.njit(nogil=True, cache=True, error_model="numpy")


@compiled
def _combine(rows: Any, origin: int, members: Any, weights: Any, out: Any) -> None:
    """``out = sum_i w_i row_i`` over the members in order, four at a time to spare loads and stores."""
    n = out.size
    count = members.size
    done = 1
    a = rows[members[0], origin : origin + n]
    u = weights[0]
    if count >= 4:
        b = rows[members[1], origin : origin + n]
        c = rows[members[2], origin : origin + n]
        d = rows[members[3], origin : origin + n]
        v, w, x = weights[1], weights[2], weights[3]
        for j in range(n):
            out[j] = a[j] * u + b[j] * v + c[j] * w + d[j] * x
        done = 4
    elif count >= 2:
        b = rows[members[1], origin : origin + n]
        v = weights[1]
        for j in range(n):
            out[j] = a[j] * u + b[j] * v
        done = 2
    else:
        for j in range(n):
            out[j] = a[j] * u
    while done + 4 <= count:
        a = rows[members[done], origin : origin + n]
        b = rows[members[done + 1], origin : origin + n]
        c = rows[members[done + 2], origin : origin + n]
        d = rows[members[done + 3], origin : origin + n]
        u, v, w, x = weights[done], weights[done + 1], weights[done + 2], weights[done + 3]
        for j in range(n):
            out[j] = out[j] + a[j] * u + b[j] * v + c[j] * w + d[j] * x
        done += 4
    while done < count:
        a = rows[members[done], origin : origin + n]
        u = weights[done]
        for j in range(n):
            out[j] = out[j] + a[j] * u
        done += 1


@compiled
def _elect_few(rows: Any, origin: int, members: Any, zeros: Any, mean: bool, out: Any) -> None:
    """:func:`_elect` of one to eight rows without weights, in registers; rows of zeros change nothing."""
    n = out.size
    count = members.size
    a = rows[members[0], origin : origin + n]
    b = rows[members[1], origin : origin + n] if count > 1 else zeros[:n]
    c = rows[members[2], origin : origin + n] if count > 2 else zeros[:n]
    d = rows[members[3], origin : origin + n] if count > 3 else zeros[:n]
    zero = out.dtype.type(0)
    one = out.dtype.type(1)
    if count <= 4:
        for j in range(n):
            vote = a[j] + b[j] + c[j] + d[j]
            s = one if vote > zero else (-one if vote < zero else zero)
            p, q, r, t = a[j] * s, b[j] * s, c[j] * s, d[j] * s
            total = (p if p > zero else zero) + (q if q > zero else zero)
            total = total + (r if r > zero else zero) + (t if t > zero else zero)
            mass = (one if p > zero else zero) + (one if q > zero else zero)
            mass = mass + (one if r > zero else zero) + (one if t > zero else zero)
            out[j] = total / (mass if mean and mass != zero else one) * s
        return
    e = rows[members[4], origin : origin + n]
    f = rows[members[5], origin : origin + n] if count > 5 else zeros[:n]
    g = rows[members[6], origin : origin + n] if count > 6 else zeros[:n]
    h = rows[members[7], origin : origin + n] if count > 7 else zeros[:n]
    for j in range(n):
        vote = a[j] + b[j] + c[j] + d[j] + e[j] + f[j] + g[j] + h[j]
        s = one if vote > zero else (-one if vote < zero else zero)
        p, q, r, t = a[j] * s, b[j] * s, c[j] * s, d[j] * s
        total = (p if p > zero else zero) + (q if q > zero else zero)
        total = total + (r if r > zero else zero) + (t if t > zero else zero)
        mass = (one if p > zero else zero) + (one if q > zero else zero)
        mass = mass + (one if r > zero else zero) + (one if t > zero else zero)
        p, q, r, t = e[j] * s, f[j] * s, g[j] * s, h[j] * s
        total = total + (p if p > zero else zero) + (q if q > zero else zero)
        total = total + (r if r > zero else zero) + (t if t > zero else zero)
        mass = mass + (one if p > zero else zero) + (one if q > zero else zero)
        mass = mass + (one if r > zero else zero) + (one if t > zero else zero)
        out[j] = total / (mass if mean and mass != zero else one) * s


@compiled
def _elect(
    rows: Any,
    origin: int,
    members: Any,
    before: Any,
    votes: Any,
    after: Any,
    mean: bool,
    zeros: Any,
    sign: Any,
    mass: Any,
    out: Any,
) -> None:
    """Disjoint sum or mean of ``before_i row_i`` with weights ``after_i`` over the sign of ``sum_i votes_i row_i``."""
    n = out.size
    count = members.size
    plain = True
    for i in range(count):
        plain = plain and before[i] == 1.0 and after[i] == 1.0 and votes[i] == 1.0
    if plain and count <= 8:
        _elect_few(rows, origin, members, zeros, mean, out)
        return
    _combine(rows, origin, members, votes, sign)
    zero = out.dtype.type(0)
    one = out.dtype.type(1)
    for j in range(n):
        value = sign[j]
        sign[j] = one if value > zero else (-one if value < zero else zero)
        out[j] = zero
        mass[j] = zero
    done = 0
    while done < count:
        a = rows[members[done], origin : origin + n]
        u, v = before[done], after[done]
        for j in range(n):
            p = (a[j] * u) * sign[j]
            out[j] = out[j] + (p * v if p > zero else zero)
            mass[j] = mass[j] + (v if p > zero else zero)
        done += 1
    if mean:
        for j in range(n):
            out[j] = out[j] / (mass[j] if mass[j] != zero else one) * sign[j]
    else:
        for j in range(n):
            out[j] = out[j] * sign[j]


@compiled
def _largest(rows: Any, origin: int, members: Any, lowest: Any, out: Any) -> None:
    """The entry of largest magnitude; of opposite ones the positive."""
    n = out.size
    a = rows[members[0], origin : origin + n]
    for j in range(n):
        out[j] = a[j]
        lowest[j] = a[j]
    for i in range(1, members.size):
        a = rows[members[i], origin : origin + n]
        for j in range(n):
            out[j] = out[j] if out[j] > a[j] else a[j]
            lowest[j] = lowest[j] if lowest[j] < a[j] else a[j]
    for j in range(n):
        out[j] = out[j] if out[j] >= -lowest[j] else lowest[j]


@compiled
def _unify(rows: Any, origin: int, members: Any, ones: Any, sign: Any, out: Any) -> None:
    """The largest magnitude among the entries of the sign of the plain sum."""
    n = out.size
    _combine(rows, origin, members, ones, sign)
    zero = out.dtype.type(0)
    one = out.dtype.type(1)
    for j in range(n):
        value = sign[j]
        sign[j] = one if value > zero else (-one if value < zero else zero)
        out[j] = zero
    for i in range(members.size):
        a = rows[members[i], origin : origin + n]
        for j in range(n):
            p = a[j] * sign[j]
            out[j] = out[j] if out[j] > p else p
    for j in range(n):
        out[j] = out[j] * sign[j]


@compiled
def _agree(rows: Any, origin: int, members: Any, strictness: Any, threshold: float, votes: Any, out: Any) -> None:
    """Multiply by 1 where at least ``threshold`` members have ``|row| > l |out - row|``, by 0 elsewhere."""
    n = out.size
    for j in range(n):
        votes[j] = 0
    for i in range(members.size):
        a = rows[members[i], origin : origin + n]
        factor = strictness[i]
        for j in range(n):
            votes[j] += 1 if abs(a[j]) > abs(out[j] - a[j]) * factor else 0
    zero = out.dtype.type(0)
    one = out.dtype.type(1)
    for j in range(n):
        out[j] = out[j] * (one if votes[j] >= threshold else zero)


@compiled
def _trim(row: Any, ranks: Any, edges: Any, keep: Any, start: int, out: Any) -> None:
    """``out``: the chunk from ``start`` of a row, zero where the rank within its piece reaches the piece's ``keep``."""
    zero = out.dtype.type(0)
    stop = start + out.size
    piece = np.searchsorted(edges, start, side="right") - 1
    while piece < keep.size and edges[piece] < stop:
        low, high = max(edges[piece], start), min(edges[piece + 1], stop)
        values, order, target = row[low:high], ranks[low:high], out[low - start : high - start]
        limit = keep[piece]
        for j in range(target.size):
            target[j] = values[j] if order[j] < limit else zero
        piece += 1


@compiled
def drop_entries(row: Any, key: Any, limit: Any, out: Any) -> None:
    """``row`` times 1 where the stream's word is at least ``limit`` (uint64), times 0 elsewhere; one tensor."""
    buffer = np.empty(4096, np.uint32)
    zero = out.dtype.type(0)
    one = out.dtype.type(1)
    for low in range(0, row.size, 4096):
        high = min(low + 4096, row.size)
        drawn, values, target = buffer[: high - low], row[low:high], out[low:high]
        words(key, low, drawn)
        for j in range(drawn.size):
            target[j] = values[j] * (one if drawn[j] >= limit else zero)


@compiled
def merge_block(
    rows: Any,
    base: Any,
    out: Any,
    kind: int,
    divide: bool,
    consensus: bool,
    bodies: Any,
    starts: Any,
    members: Any,
    before: Any,
    votes: Any,
    after: Any,
    strictness: Any,
    threshold: float,
    levels: Any,
    ranks: Any,
    edges: Any,
    keep: Any,
    places: Any,
    scales: Any,
    start: int,
    stop: int,
    chunk: int,
) -> None:
    """Write ``base + merge`` for every merge over the coordinates ``start:stop``; all floats are of one type.

    Args:
        rows: ``(N, P)``.
        base: ``(P,)``.
        out: ``(block, P)``; row ``places[m]`` belongs to merge m.
        kind: one of the constants above.
        divide: a merge is ``body / scale + base``, otherwise ``body * scale + base``.
        consensus: coordinates on which too few experts agree with the body are zero.
        bodies: ``(B + 1,)``; body b serves the merges ``bodies[b]:bodies[b + 1]``.
        starts: ``(B + 1,)``; body b has the entries ``starts[b]:starts[b + 1]`` of the next five arrays.
        members: rows of the bodies, in the order of their sums.
        before: factors of the rows in a disjoint sum or mean.
        votes: factors of the rows in the sum that elects (in the combination, for ``COMBINE``).
        after: factors of what agrees.
        strictness: ``l`` of every member, for ``consensus``.
        threshold: how many have to agree, for ``consensus``.
        levels: ``(B,)``: which row of ``keep`` a body is trimmed with; -1: not at all.
        ranks: ``(N, P)`` place of every entry in its piece by decreasing magnitude, from zero.
        edges: ``(S + 1,)`` borders of the pieces.
        keep: ``(L, S)`` how many entries of each piece are kept.
        places, scales: ``(M,)``.
        start, stop: coordinates.
        chunk: coordinates at a time.
    """
    experts = rows.shape[0]
    trimmed = np.empty((experts, chunk), rows.dtype)
    holds = np.empty(experts, np.int64)
    body_buffer = np.empty(chunk, rows.dtype)
    zeros = np.zeros(chunk, rows.dtype)
    sign_buffer = np.empty(chunk, rows.dtype)
    mass_buffer = np.empty(chunk, rows.dtype)
    votes_buffer = np.empty(chunk, np.int32)
    for low in range(start, stop, chunk):
        high = min(low + chunk, stop)
        n = high - low
        body, sign, mass, agreeing = body_buffer[:n], sign_buffer[:n], mass_buffer[:n], votes_buffer[:n]
        origin_base = base[low:high]
        holds[:] = -1
        for b in range(levels.size):
            first, last = starts[b], starts[b + 1]
            some = members[first:last]
            source, origin = rows, low
            level = levels[b]
            if level >= 0:
                for i in some:
                    if holds[i] != level:
                        _trim(rows[i], ranks[i], edges, keep[level], low, trimmed[i, :n])
                        holds[i] = level
                source, origin = trimmed, 0
            if kind == COMBINE:
                _combine(source, origin, some, votes[first:last], body)
            elif kind == LARGEST:
                _largest(source, origin, some, sign, body)
            elif kind == UNIFY:
                _unify(source, origin, some, votes[first:last], sign, body)
            else:
                _elect(
                    source,
                    origin,
                    some,
                    before[first:last],
                    votes[first:last],
                    after[first:last],
                    kind == ELECT_MEAN,
                    zeros,
                    sign,
                    mass,
                    body,
                )
            if consensus:
                _agree(rows, low, some, strictness[first:last], threshold, agreeing, body)
            for m in range(bodies[b], bodies[b + 1]):
                target = out[places[m], low:high]
                scale = scales[m]
                if divide:
                    for j in range(n):
                        target[j] = body[j] / scale + origin_base[j]
                else:
                    for j in range(n):
                        target[j] = body[j] * scale + origin_base[j]
