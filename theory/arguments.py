"""Wrong kinds of arguments at the public functions, said in one sentence: which argument, what it is, what to give.

The public functions of :mod:`theory` are :func:`advised`: where a call fails with an error of Python's own (an
attribute that None does not have, a string that is no number), the arguments are held against the annotations of the
function.  If one does not fit, that is said by a :class:`RecipeError`; if all fit, the error is a defect of the toolkit
and is passed on as it is.  A call that succeeds costs nothing.
"""

from __future__ import annotations

import collections.abc
import inspect
import sys
import types
import typing
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np

from theory.errors import MergeboundError, RecipeError

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Kind = TypeVar("Kind")
_PLAIN: dict[Any, tuple[type, ...]] = {float: (int, float, np.number), int: (int, np.integer), bool: (bool, np.bool_)}


def advised(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The function, whose failures on arguments of the wrong kind name the argument and what to give.

    >>> from theory import master_bound
    >>> master_bound(None)
    Traceback (most recent call last):
    theory.errors.RecipeError: master_bound: merge is None; give a Merge
    """

    @wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        try:
            return function(*args, **kwargs)
        except MergeboundError:
            raise
        except (AttributeError, KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
            advice = _advice(function, args, kwargs)
            if advice is None:
                raise
            raise RecipeError(advice) from error

    return call


def advised_fields(kind: type[Kind]) -> type[Kind]:
    """A dataclass whose checks fail on fields of the wrong kind with the same advice as :func:`advised` functions.

    >>> from theory import LogitCurvature
    >>> LogitCurvature("x")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    theory.errors.RecipeError: LogitCurvature: ... is 'x'; give a numpy array of numbers
    """
    made: Any = kind
    original = made.__init__

    @wraps(original)
    def fill(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            original(self, *args, **kwargs)
        except MergeboundError:
            raise
        except (AttributeError, KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
            advice = _advice(original, (self, *args), kwargs, kind.__name__, _hints(kind))
            if advice is None:
                raise
            raise RecipeError(advice) from error

    made.__init__ = fill
    return kind


def _is_calculator(item: object) -> bool:
    """Whether an exported object is a function (also one that keeps its results)."""
    return callable(item) and inspect.isfunction(inspect.unwrap(item))


def _advice(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    owner: str | None = None,
    hints: dict[str, Any] | None = None,
) -> str | None:
    """What to say about the first argument that does not fit its annotation; None where all do."""
    try:
        bound = inspect.signature(function).bind(*args, **kwargs)
    except TypeError:  # too few or too many: Python's own message says which
        return None
    hints = _hints(function) if hints is None else hints
    for name, value in bound.arguments.items():
        wanted = hints.get(name, Any)
        if not _fits(value, wanted):
            return f"{owner or function.__name__}: {name} is {_short(value)}; give {_words(wanted)}"
    return None


def _hints(function: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function, localns=dict(vars(sys.modules["theory"])))
    except NameError:  # names that are imported for the type checker only, and not exported
        return {}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"a {type(value).__name__}"


def _fits(value: Any, wanted: Any) -> bool:
    """Whether a value may be what an annotation asks for; in doubt it may."""
    if wanted is Any or isinstance(wanted, (typing.TypeVar, str)):
        return True
    if _is_array_like(wanted):
        return _is_numbers(value)
    origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is typing.Annotated:
        return _fits(value, inner[0])
    if origin is typing.Literal:
        return any(value is item or (isinstance(value, str) and value == item) for item in inner)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, item) for item in inner)
    if wanted is None or wanted is type(None):
        return value is None
    if wanted in _PLAIN:
        return isinstance(value, _PLAIN[wanted])
    if origin is np.ndarray:
        return isinstance(value, np.ndarray)
    if origin is tuple and inner and inner[-1] is not Ellipsis:
        return isinstance(value, (tuple, list)) and len(value) == len(inner) and all(map(_fits, value, inner))
    if origin in (tuple, list, set, frozenset, collections.abc.Sequence, collections.abc.Iterable):
        if isinstance(value, (str, bytes)) and inner[:1] != (str,):
            return False
        if not isinstance(value, collections.abc.Iterable):
            return False
        return len(inner) == 0 or _all_fit(value, inner[0])
    if origin in (dict, collections.abc.Mapping):
        return isinstance(value, collections.abc.Mapping)
    if origin is collections.abc.Callable:
        return callable(value)
    if origin is not None:
        return not isinstance(origin, type) or isinstance(value, origin)
    return not isinstance(wanted, type) or isinstance(value, wanted)


def _all_fit(value: Any, wanted: Any) -> bool:
    if isinstance(value, np.ndarray):
        return True
    return len(value) > 0 and all(_fits(item, wanted) for item in value) if hasattr(value, "__len__") else True


def _is_array_like(wanted: Any) -> bool:
    """Whether an annotation is numpy's ``ArrayLike`` (a union with buffers and nested sequences)."""
    union = typing.get_origin(wanted) in (typing.Union, types.UnionType)
    return union and ("_SupportsArray" in repr(wanted) or "_Buffer" in repr(wanted))


def _is_numbers(value: Any) -> bool:
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):
        return False
    return array.dtype.kind in "biuf" and array.size > 0


def _words(wanted: Any) -> str:
    """An annotation in words."""
    if _is_array_like(wanted):
        return "a number or an array of numbers"
    origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_words(item) for item in inner if item is not type(None)))
    if origin is typing.Literal:
        return "one of " + ", ".join(repr(item) for item in inner)
    if origin is np.ndarray:
        return "a numpy array of numbers"
    if origin in (tuple, list, collections.abc.Sequence, collections.abc.Iterable):
        return f"a sequence, each item {_words(inner[0])}" if inner else "a sequence"
    if origin in (dict, collections.abc.Mapping):
        return "a mapping (dict)"
    if origin is collections.abc.Callable:
        return "a function"
    if wanted is float:
        return "a number"
    if wanted is int:
        return "a whole number"
    if wanted is bool:
        return "True or False"
    if wanted is str:
        return "a name (text)"
    name = getattr(wanted, "__name__", str(wanted))
    return f"{'an' if name[:1] in 'AEIOU' else 'a'} {name}"
