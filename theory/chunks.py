"""Many configurations in cache-sized pieces: slice a merge along its configurations, bound each piece, put together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from theory.assumptions import Assumption
from theory.bound import Bound, ExpertTerms, Term
from theory.clocks import is_constant, step_count
from theory.errors import RecipeError
from theory.recipe import Expert, Merge, Schedule
from theory.symbolic import FloatArray

PIECE = 16384
STEPS_PER_PIECE = 1 << 20
PER_EXPERT = ("weights", "coefficients", "sensitivity")
Record = TypeVar("Record", Expert, Merge)


def configurations(merge: Merge) -> tuple[int, ...]:
    """The shape that all fields of a merge and of its experts broadcast to; ``()`` for a single recipe."""
    shapes: set[tuple[int, ...]] = set()
    for expert in merge.experts:
        for name, value in vars(expert).items():
            if isinstance(value, (float, int)):
                continue
            if isinstance(value, Schedule):
                shapes.add(value.values.shape[:-1])
            elif _is_numeric(name, value):
                shapes.add(np.shape(value))
    for name, value in vars(merge).items():
        if name in PER_EXPERT and value is not None:
            shapes.add(np.shape(value)[1:])
        elif name in ("drop_rate", "dispersion") and value is not None:
            shapes.add(np.shape(value))
    return np.broadcast_shapes(*shapes)


def one_recipe(merge: Merge, where: str, takes: str = "one recipe") -> None:
    """Refuse a merge over several configurations (:class:`RecipeError` naming the first field that has them)."""
    owners = [("merge", vars(merge)), *((f"expert {expert.name!r}", vars(expert)) for expert in merge.experts)]
    for owner, record in owners:
        for name, value in record.items():
            if name == "experts" or value is None:
                continue
            shape = value.values.shape[:-1] if isinstance(value, Schedule) else ()
            if name in PER_EXPERT:
                shape = np.shape(value)[1:]
            elif _is_numeric(name, value):
                shape = np.shape(value)
            if np.prod(shape, dtype=np.int64) != 1:
                raise RecipeError(f"{owner}: {name} is an array; {where} takes {takes}")


def piece_size(merge: Merge) -> int:
    """How many configurations to treat at once: fewer where every step is written out."""
    written = [int(step_count(expert).max()) for expert in merge.experts if not is_constant(expert)]
    return max(1, min(PIECE, STEPS_PER_PIECE // max(written, default=1)))


def in_pieces(merge: Merge, bound: Callable[[Merge], Bound]) -> Bound:
    """The bound of every configuration, piece by piece; the same numbers as all at once.

    A merge whose fields do not broadcast to one shape is left to ``bound``, which says so.  Configurations that nothing
    covers are ``inf`` among others; a piece of nothing else is bounded together with one that is covered, and the merge
    is refused (with the reason of the first piece) where all pieces are.
    """
    try:
        shape = configurations(merge)
    except ValueError:
        return bound(merge)
    size, step = int(np.prod(shape, dtype=np.int64)), piece_size(merge)
    if size <= step:
        return bound(merge)
    flat = _flattened(merge, shape)
    starts = range(0, size, step)
    lengths = [min(step, size - start) for start in starts]
    tried = [_try(bound, _cut(flat, slice(start, start + step))) for start in starts]
    covered = _covered_place(tried, starts, lengths)
    skips = [int(isinstance(piece, RecipeError)) for piece in tried]
    pieces: list[Bound] = []
    for piece, start, length in zip(tried, starts, lengths, strict=True):
        if isinstance(piece, RecipeError):
            if covered is None:
                raise piece
            piece = bound(_cut(flat, np.append(covered, np.arange(start, start + length))))
        pieces.append(piece)

    def join(parts: Sequence[FloatArray]) -> FloatArray:
        if all(part.ndim == 0 for part in parts):
            return parts[0]
        whole = np.empty(size)
        start = 0
        for part, length, skip in zip(parts, lengths, skips, strict=True):
            whole[start : start + length] = part[skip:] if part.ndim and len(part) == length + skip else part
            start += length
        return whole.reshape(shape)

    first = pieces[0]
    terms = tuple(
        Term(
            term.name,
            join([piece.terms[i].value for piece in pieces]),
            join([piece.terms[i].share for piece in pieces]),
            term.formula,
            term.source,
        )
        for i, term in enumerate(first.terms)
    )
    experts = tuple(_join_rows([piece.experts[i] for piece in pieces], join) for i in range(len(first.experts)))
    assumptions: dict[tuple[str, str], Assumption] = {}
    for piece in pieces:
        assumptions |= {(item.name, item.why): item for item in piece.assumptions}
    tiers = {piece.tier for piece in pieces}
    return replace(
        first,
        value=join([piece.value for piece in pieces]),
        terms=terms,
        tier="certified" if tiers == {"certified"} else "estimated",
        assumptions=tuple(assumptions.values()),
        measured=_union(piece.measured for piece in pieces),
        experts=experts,
        V=join([piece.V for piece in pieces]),
        effective_V=join([piece.effective_V for piece in pieces]),
        dispersion_form=_names(piece.dispersion_form for piece in pieces),
        merge=merge,
    )


def _try(bound: Callable[[Merge], Bound], merge: Merge) -> Bound | RecipeError:
    try:
        return bound(merge)
    except RecipeError as reason:
        return reason


def _covered_place(tried: Sequence[Bound | RecipeError], starts: Sequence[int], lengths: Sequence[int]) -> int | None:
    """A configuration with a bound, finite if there is one; None where every piece was refused."""
    chosen = None
    for piece, start, length in zip(tried, starts, lengths, strict=True):
        if isinstance(piece, RecipeError):
            continue
        finite = np.flatnonzero(np.isfinite(np.broadcast_to(piece.value, (length,))))
        if len(finite):
            return start + int(finite[0])
        chosen = start if chosen is None else chosen
    return chosen


def _join_rows(rows: Sequence[ExpertTerms], join: Callable[[Sequence[FloatArray]], FloatArray]) -> ExpertTerms:
    drifts = [row.drift for row in rows if row.drift is not None]
    return ExpertTerms(
        rows[0].name,
        join([row.risk for row in rows]),
        _names(row.risk_form for row in rows),
        join(drifts) if len(drifts) == len(rows) else None,
        _names(row.drift_form for row in rows),
        join([row.epsilon for row in rows]),
        _names(row.epsilon_form for row in rows),
        join([row.sensitivity for row in rows]),
    )


def _union(groups: Iterable[Sequence[str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for group in groups for name in group))


def _names(forms: Iterable[str]) -> str:
    """Names joined by ``or``, each once, in order."""
    return " or ".join(dict.fromkeys(name for form in dict.fromkeys(forms) for name in form.split(" or ")))


def _is_numeric(name: str, value: Any) -> bool:
    return name != "name" and value is not None and not isinstance(value, (str, bool, np.bool_, frozenset, Schedule))


def _unchecked(record: Record, changes: dict[str, Any]) -> Record:
    """A copy with changed fields that is not validated again: slices of valid arrays are valid."""
    made = object.__new__(type(record))
    made.__dict__.update(vars(record))
    made.__dict__.update(changes)
    return made


def _spread(value: Any, shape: tuple[int, ...], lead: tuple[int, ...] = (), trail: tuple[int, ...] = ()) -> FloatArray:
    array = np.asarray(value, dtype=np.float64)
    return np.broadcast_to(array, (*lead, *shape, *trail)).reshape((*lead, -1, *trail))


def _flattened(merge: Merge, shape: tuple[int, ...]) -> Merge:
    experts = []
    for expert in merge.experts:
        changes: dict[str, Any] = {}
        for name, value in vars(expert).items():
            if isinstance(value, Schedule) and value.values.ndim > 1:
                changes[name] = Schedule(_spread(value.values, shape, trail=(value.steps,)))
            elif _is_numeric(name, value) and np.ndim(value):
                changes[name] = _spread(value, shape)
        experts.append(_unchecked(expert, changes))
    changes = {"experts": tuple(experts)}
    for item in fields(merge):
        value = getattr(merge, item.name)
        if item.name in PER_EXPERT and value is not None and np.ndim(value) > 1:
            array = np.asarray(value, dtype=np.float64)
            aligned = array.reshape(array.shape[0], *(1,) * (len(shape) - array.ndim + 1), *array.shape[1:])
            changes[item.name] = _spread(aligned, shape, lead=(merge.size,))
        elif item.name in ("drop_rate", "dispersion") and np.ndim(value):
            changes[item.name] = _spread(value, shape)
    return _unchecked(merge, changes)


def _cut(merge: Merge, part: slice | NDArray[np.int64]) -> Merge:
    experts = []
    for expert in merge.experts:
        changes: dict[str, Any] = {}
        for name, value in vars(expert).items():
            if isinstance(value, Schedule) and value.values.ndim > 1:
                changes[name] = _unchecked_schedule(value.values[part])
            elif _is_numeric(name, value) and np.ndim(value):
                changes[name] = value[part]
        experts.append(_unchecked(expert, changes))
    changes = {"experts": tuple(experts)}
    for item in fields(merge):
        value = getattr(merge, item.name)
        if item.name in PER_EXPERT and value is not None and np.ndim(value) > 1:
            changes[item.name] = value[:, part]
        elif item.name in ("drop_rate", "dispersion") and np.ndim(value):
            changes[item.name] = value[part]
    return _unchecked(merge, changes)


def _unchecked_schedule(values: FloatArray) -> Schedule:
    made = object.__new__(Schedule)
    object.__setattr__(made, "values", values)
    return made
