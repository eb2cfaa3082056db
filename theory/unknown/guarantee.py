"""Guaranteed ends of the interval: boxes of recipes are split until their enclosures meet the best point found."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from theory.enclosure import enclose
from theory.recipe import Merge
from theory.symbolic import FloatArray
from theory.unknown.family import Family, coefficient_rows

Found = tuple[FloatArray, float]
End = tuple[float, FloatArray, float]


def guaranteed_ends(
    family: Family, found: tuple[Found, Found], boxes: int, tolerance: float
) -> tuple[tuple[End, End], int]:
    """Guaranteed lower and upper end over all boxes, each with the best point found on the way, and boxes used."""
    made: list[End] = []
    used = 0
    combinations = family.combinations()
    for sign, (point, value) in zip((-1.0, 1.0), found, strict=True):
        end = sign * value
        for places in combinations:
            far, count, point, value = _split(family, places, sign, point, value, boxes // len(combinations), tolerance)
            end, used = max(end, sign * far), used + count
        made.append((sign * end, point, value))
    return (made[0], made[1]), used


def _split(
    family: Family,
    places: Mapping[int, int],
    sign: float,
    point: FloatArray,
    value: float,
    most: int,
    tolerance: float,
) -> tuple[float, int, FloatArray, float]:
    """The guaranteed end for one choice of the sets: boxes that may exceed the best value found are split."""
    merge, rows = family.fixed(places), family.continuous
    low, high = np.zeros((len(rows), 1)), np.ones((len(rows), 1))
    end = _ends(family, merge, low, high, sign)
    used, settled = 1, -np.inf
    while True:
        aim = value if np.isfinite(value) else sign * np.inf
        done = sign * end <= sign * aim + (tolerance * abs(aim) if np.isfinite(aim) else 0.0)
        done |= np.all(high - low <= 1e-6, axis=0)
        if np.any(done):
            settled = max(settled, float((sign * end[done]).max()))
        low, high, end = low[:, ~done], high[:, ~done], end[~done]
        if not end.size or used >= most:
            return sign * max([settled, *(sign * end)]), used, point, value
        order = np.argsort(-sign * end)
        take, keep = order[:256], order[256:]
        a, b = low[:, take], high[:, take]
        axis = np.argmax(b - a, axis=0)
        columns = np.arange(a.shape[1])
        middle = (a[axis, columns] + b[axis, columns]) / 2
        left, right = b.copy(), a.copy()
        left[axis, columns], right[axis, columns] = middle, middle
        new_low, new_high = np.concatenate([a, right], axis=1), np.concatenate([left, b], axis=1)
        used += new_low.shape[1]
        new_end = _ends(family, merge, new_low, new_high, sign)
        low, high = np.concatenate([low[:, keep], new_low], axis=1), np.concatenate([high[:, keep], new_high], axis=1)
        end = np.concatenate([end[keep], new_end])
        tried = np.zeros((len(family.unknowns), new_low.shape[1]))
        tried[list(rows)] = (new_low + new_high) / 2
        for row, place in places.items():
            tried[row] = place
        seen, good = family.values(tried)
        score = np.where(good, sign * seen, -np.inf)
        best = int(np.argmax(score))
        if score[best] > sign * value:
            point, value = tried[:, best], float(seen[best])


def _ends(family: Family, merge: Merge, low: FloatArray, high: FloatArray, sign: float) -> FloatArray:
    """Guaranteed ends of the bound on boxes of shares, shape ``(boxes,)``."""
    ranges: dict[str, dict[str, tuple[ArrayLike, ArrayLike]]] = {}
    span: tuple[FloatArray, FloatArray] | None = None
    for place, row in enumerate(family.continuous):
        item = family.unknowns[row]
        # whole numbers are rounded at both ends alike, so every rounded recipe of the box stays inside
        ends = (item.at(low[place]), item.at(high[place]))
        if item.field == "coefficients":
            if span is None:
                span = (coefficient_rows(merge, low.shape[1]), coefficient_rows(merge, low.shape[1]))
            for side in (0, 1):
                span[side][list(item.experts)] = ends[side]
            continue
        for index in item.experts:
            ranges.setdefault(merge.experts[index].name, {})[item.field] = ends
    found = enclose(merge, ranges, coefficient_range=span, recursion=False)
    return np.broadcast_to(found.upper if sign > 0 else found.lower, low.shape[1:])
