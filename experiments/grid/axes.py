"""One hyperparameter of a grid: a value, or an axis of values that are listed, counted up or drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cache
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import TypeAdapter, ValidationError

from experiments.grid.errors import GridError
from experiments.grid.expressions import Expression, parse
from experiments.grid.run_spec import RunSpec
from experiments.inputs.augment import PRESETS
from theory.errors import nearest

HYPERPARAMETERS = tuple(name for name in RunSpec.model_fields if name not in ("task", "base", "checkpoints"))
"""Fields of a run that a grid may vary, in their order."""

WHOLE = ("steps", "batch_size", "warm_up", "rank", "seed", "split_seed")
NUMERIC = (
    *("learning_rate", "steps", "batch_size", "data_share", "momentum", "weight_decay", "beta2", "epsilon"),
    *("sam_radius", "warm_up", "label_smoothing", "clip_norm", "rank", "seed", "split_seed"),
)
"""Hyperparameters that are numbers: expressions may stand for them, and read them."""

Kind = Literal["values", "range", "uniform", "log_uniform", "choice"]
DRAWN = ("uniform", "log_uniform", "choice")
_FORMS = "a value, a list, {from, to, step}, {uniform: {low, high, samples}}, {log_uniform: ...} or {choice: ...}"


@dataclass(frozen=True)
class Axis:
    """Values of one hyperparameter.

    Attributes:
        kind: ``values`` (one or several), ``range``, or how they are drawn.
        items: of ``values`` and ``choice``; an :class:`~experiments.grid.expressions.Expression` stands for itself.
        low, high: of ``range``, ``uniform`` and ``log_uniform``, both included.
        step: of ``range``.
        samples: how many are drawn; 0 within a joint design, which has a number of its own.
        raw: what was written.
    """

    kind: Kind
    items: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float = 0.0
    samples: int = 0
    raw: Any = field(default=None, compare=False)

    @property
    def listed(self) -> bool:
        """Whether it was written as a list."""
        return isinstance(self.raw, list | tuple)


def read_axis(name: str, raw: Any, *, joint: bool = False) -> Axis:
    """An axis from what a specification says.

    Args:
        name: of the hyperparameter.
        raw: plain data.
        joint: within a joint design: no ``samples`` of its own, and no range.

    Raises:
        GridError: with the place within ``raw``.
    """
    if isinstance(raw, Axis):
        return raw
    if isinstance(raw, Mapping):
        return _read_mapping(name, dict(raw), joint)
    if not isinstance(raw, list | tuple):
        if joint:
            raise GridError("within a joint design, give {uniform: ...}, {log_uniform: ...} or a list to choose from")
        return Axis("values", (check_value(name, raw),), raw=raw)
    items = _items(name, raw)
    return Axis("choice", items, raw=list(raw)) if joint else Axis("values", items, raw=list(raw))


def _items(name: str, raw: Iterable[Any], place: tuple[str | int, ...] = ()) -> tuple[Any, ...]:
    found: list[Any] = []
    for number, item in enumerate(raw):
        try:
            value = check_value(name, item)
        except GridError as error:
            raise error.at((*place, number)) from error
        if value in found:
            raise GridError(f"{item!r} is listed twice; list every value once", (*place, number))
        found.append(value)
    if not found:
        raise GridError("the list is empty, so that the grid would have no runs; give at least one value", place)
    return tuple(found)


def _read_mapping(name: str, raw: dict[Any, Any], joint: bool) -> Axis:
    if "range" in raw and len(raw) == 1 and isinstance(raw["range"], Mapping):
        return _range(name, dict(raw["range"]), raw, ("range",), joint)
    if {"from", "to"} & set(raw):
        return _range(name, raw, raw, (), joint)
    kind = next(iter(raw), None)
    if len(raw) != 1 or kind not in DRAWN:
        close = nearest(kind, (*DRAWN, "range")) if isinstance(kind, str) else "the mapping is empty"
        raise GridError(f"{close}; give {_FORMS}", (kind,) if isinstance(kind, str) else ())
    content = raw[kind]
    if kind == "choice" and isinstance(content, list | tuple):
        content = {"of": content}
    if not isinstance(content, Mapping):
        raise GridError("give a mapping, as {low: 0.001, high: 0.1, samples: 8}", (kind,))
    content = {("samples" if key == "count" else key): value for key, value in content.items()}
    wanted = ("of",) if kind == "choice" else ("low", "high")
    _keys(content, (*wanted, "samples"), (*wanted, *(() if joint else ("samples",))), (kind,))
    samples = _samples(content, joint, (kind,))
    if kind == "choice":
        if not isinstance(content["of"], list | tuple):
            raise GridError("give a list of values to choose from", (kind, "of"))
        items = _items(name, content["of"], (kind, "of"))
        if samples > len(items):
            raise GridError(f"{samples} of {len(items)} values cannot be chosen; lower samples", (kind, "samples"))
        return Axis("choice", items, samples=samples, raw=raw)
    low, high = (_end(name, content, end, (kind,)) for end in ("low", "high"))
    if low >= high:
        raise GridError(f"low = {low:g} is not below high = {high:g}; write the smaller number as low", (kind, "low"))
    if kind == "log_uniform" and low <= 0:
        raise GridError(f"low = {low:g}: a logarithmic scale needs numbers above 0", (kind, "low"))
    return Axis("uniform" if kind == "uniform" else "log_uniform", (), low, high, samples=samples, raw=raw)


def _range(name: str, content: dict[Any, Any], raw: Any, place: tuple[str, ...], joint: bool) -> Axis:
    if joint:
        raise GridError("a range is not drawn from; give {uniform: ...}, {log_uniform: ...} or a list", place)
    _keys(content, ("from", "to", "step"), ("from", "to", "step"), place)
    low, high = (_end(name, content, end, place) for end in ("from", "to"))
    step = _number(name, content["step"], (*place, "step"))
    if step <= 0:
        raise GridError(f"step = {step:g}: give a number above 0", (*place, "step"))
    if low > high:
        raise GridError(f"the range is empty: from {low:g} is above to {high:g}; exchange them", (*place, "from"))
    if name in WHOLE and step != int(step):
        raise GridError(f"step = {step:g}: {name} is a whole number, so give a whole step", (*place, "step"))
    return Axis("range", (), low, high, step, raw=raw)


def _keys(content: Mapping[Any, Any], known: tuple[str, ...], needed: tuple[str, ...], place: tuple[str, ...]) -> None:
    for key in content:
        if key not in known:
            raise GridError(f"there is no such key; {nearest(key, known)}", (*place, str(key)))
    for key in needed:
        if key not in content:
            raise GridError(f"{key} is missing; give {', '.join(needed)}", place)


def _samples(content: Mapping[Any, Any], joint: bool, place: tuple[str, ...]) -> int:
    if joint and "samples" in content:
        raise GridError("a joint design has one count for all its axes; leave samples out", (*place, "samples"))
    samples = content.get("samples", 0)
    if not joint and (type(samples) is not int or samples < 1):
        raise GridError(f"{samples!r}: give how many values are drawn, 1 or more", (*place, "samples"))
    return int(samples)


def _end(name: str, content: Mapping[Any, Any], key: str, place: tuple[str, ...]) -> float:
    number = _number(name, content[key], (*place, key))
    try:
        check_value(name, int(number) if name in WHOLE and number == int(number) else number)
    except GridError as error:
        raise error.at((*place, key)) from error
    return number


def _number(name: str, raw: Any, place: tuple[str | int, ...]) -> float:
    if name not in NUMERIC:
        raise GridError(f"{name} is not a number; list its values, or choose: {{choice: {{of: [...]}}}}", place)
    if type(raw) not in (int, float) or not math.isfinite(raw):
        raise GridError(f"{raw!r} is not a number", place)
    return float(raw)


# --- values ----------------------------------------------------------------------------------------------------------


@cache
def _adapter(name: str) -> TypeAdapter[Any]:
    info = RunSpec.model_fields[name]
    kind: Any = Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation
    return TypeAdapter(kind)


def check_value(name: str, raw: Any) -> Any:
    """A value that a run takes, or an expression that gives one.

    Raises:
        GridError: of the wrong type or outside the domain.
    """
    if isinstance(raw, Expression):
        return raw
    if isinstance(raw, str) and name in NUMERIC:
        found = parse(raw, NUMERIC)
        if name in found.names:
            raise GridError(f"{raw!r} reads {name} itself; write it with other hyperparameters")
        if found.names:
            return found
        number = found.value({})
        raw = int(number) if name in WHOLE and number == int(number) else number
    if isinstance(raw, bool) and name in NUMERIC:
        raise GridError(f"{str(raw).lower()} is not a number; {_remedy(name)}")
    if isinstance(raw, Mapping | list | tuple):
        raise GridError("give one value here, not a list or a mapping")
    try:
        value = _adapter(name).validate_python(raw)
    except ValidationError as error:
        first = error.errors()[0]
        said = first["msg"][:1].lower() + first["msg"][1:]
        choices = getattr(RunSpec.model_fields[name].annotation, "__args__", ())
        close = f"; {nearest(raw, choices)}" if first["type"] == "literal_error" else ""
        if name in NUMERIC and first["type"].startswith(("int_", "float_")):
            close = f"; {_remedy(name, raw)}"
        raise GridError(f"{raw!r} cannot be used: {said}{close}") from error
    if name == "augment" and value not in PRESETS:
        raise GridError(f"there is no augmentation {value!r}; {nearest(value, PRESETS)}")
    return value


def _remedy(name: str, raw: Any = None) -> str:
    """What to write instead of something that is no number, or no whole one."""
    if name not in WHOLE:
        return "give a number, such as 0.1"
    near = max(1, round(raw)) if isinstance(raw, float) and math.isfinite(raw) else 100
    return f"give a whole number, such as {near}"


def resolved(values: Mapping[str, Any]) -> dict[str, Any]:
    """Hyperparameters with every expression replaced by its number (whole ones rounded to the nearest).

    Raises:
        GridError: expressions that read each other in a circle, or one without a value; the place is the field.
    """
    found = {name: value for name, value in values.items() if not isinstance(value, Expression)}
    waiting = {name: value for name, value in values.items() if isinstance(value, Expression)}
    while waiting:
        ready = [name for name, formula in waiting.items() if not set(formula.names) & set(waiting)]
        if not ready:
            said = f"{', '.join(waiting)} read each other in a circle; give one of them a number"
            raise GridError(said, (min(waiting),))
        for name in ready:
            formula = waiting.pop(name)
            empty = [each for each in formula.names if found.get(each) is None]
            if empty:
                raise GridError(f"{formula.text!r} reads {empty[0]}, which has no value; give it one", (name,))
            try:
                number = formula.value(found)
            except GridError as error:
                raise error.at((name,)) from error
            found[name] = round(number) if name in WHOLE else number
    return found


# --- points ----------------------------------------------------------------------------------------------------------


def size(axis: Axis) -> int:
    """How many values at most, without making them (whole numbers that are drawn may coincide)."""
    if axis.kind == "values":
        return len(axis.items)
    if axis.kind == "range":
        return int((Decimal(str(axis.high)) - Decimal(str(axis.low))) / Decimal(str(axis.step))) + 1
    return axis.samples


def points(name: str, axis: Axis, seed: int) -> tuple[Any, ...]:
    """The values, without repetition; those of fewer samples are the beginning of those of more.

    Args:
        name: of the hyperparameter: each draws from a stream of its own.
        axis: of the grid.
        seed: names the draws.
    """
    if axis.kind == "values":
        return axis.items
    if axis.kind == "range":
        first, step = Decimal(str(axis.low)), Decimal(str(axis.step))
        kind: Callable[[Decimal], Any] = int if name in WHOLE else float
        return tuple(kind(first + number * step) for number in range(size(axis)))
    rng = stream(seed, name)
    if axis.kind == "choice":
        return tuple(axis.items[k] for k in rng.permutation(len(axis.items))[: axis.samples])
    return tuple(dict.fromkeys(at(name, axis, float(u)) for u in rng.random(axis.samples)))


def at(name: str, axis: Axis, u: float) -> Any:
    """The value at a place u in [0, 1) of a drawn axis: its quantile function.

    Whole numbers: ``uniform`` gives each of low .. high the same probability; ``log_uniform`` cuts the logarithmic
    scale of [low, high + 1) at whole numbers.
    """
    if axis.kind == "choice":
        return axis.items[min(int(u * len(axis.items)), len(axis.items) - 1)]
    low, high = axis.low, axis.high + (name in WHOLE)
    value = low + (high - low) * u if axis.kind == "uniform" else low * (high / low) ** u
    return min(math.floor(value), int(axis.high)) if name in WHOLE else min(max(value, low), high)


def stream(seed: int, name: str) -> np.random.Generator:
    """The generator of one hyperparameter's, or one design's, draws."""
    return np.random.default_rng([seed, 0x6A1D, *name.encode()])
