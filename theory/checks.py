"""Refusals that low-level calculators share: numbers outside their domain, shapes that do not fit, by name."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from theory.errors import RecipeError
from theory.recipe import _numbers
from theory.symbolic import FloatArray


def amounts(where: str, **values: ArrayLike) -> list[FloatArray]:
    """Arrays of numbers of at least 0 (inf allowed); anything else is refused by name (:class:`RecipeError`).

    >>> amounts("demo", risk=[0.5, 1.0])[0].tolist()
    [0.5, 1.0]
    """
    arrays = []
    for name, value in values.items():
        array = _numbers(where, name, value)
        if np.any(np.isnan(array) | (array < 0)):
            raise RecipeError(f"{where}: {name} holds a negative number or no number; give numbers of at least 0")
        arrays.append(array)
    return arrays


def one_number(where: str, name: str, value: object, *, least: float = 0.0, below: float = np.inf) -> float:
    """One number in ``[least, below)``; an array, no number, or one outside is refused by name (:class:`RecipeError`).

    >>> one_number("demo", "level", 0.5, below=1)
    0.5
    """
    array = _numbers(where, name, value)
    if array.ndim or not least <= array < below:
        limits = f"of at least {least:g}" + (f" and below {below:g}" if below < np.inf else "")
        raise RecipeError(f"{where}: {name} is {str(value)[:40]}; give one finite number {limits}")
    return float(array)


def whole_number(where: str, name: str, value: object, *, least: int = 0) -> int:
    """One whole number of at least ``least``; anything else is refused by name (:class:`RecipeError`).

    >>> whole_number("demo", "seed", 3)
    3
    """
    number = one_number(where, name, value, least=least)
    if number != np.floor(number):
        raise RecipeError(f"{where}: {name} is {number:g}; give a whole number of at least {least}")
    return int(number)


def fitting(where: str, **arrays: FloatArray) -> None:
    """Refuse arrays that do not broadcast against each other (:class:`RecipeError` with all shapes)."""
    try:
        np.broadcast_shapes(*(array.shape for array in arrays.values()))
    except ValueError as error:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise RecipeError(f"{where}: shapes do not fit together ({shapes}); make them broadcast") from error


def fitting_experts(where: str, **arrays: FloatArray) -> None:
    """As :func:`fitting`, with experts on axis 0 and the axes of configurations aligned at the end."""
    depth = max(array.ndim for array in arrays.values())
    lifted = {
        name: array.reshape(array.shape[:1] + (1,) * (depth - array.ndim) + array.shape[1:]) if array.ndim else array
        for name, array in arrays.items()
    }
    fitting(where, **lifted)


def summing_to_one(where: str, weights: FloatArray) -> None:
    """Refuse weights (experts on axis 0) that do not sum to one (:class:`RecipeError`)."""
    if not np.all(np.abs(weights.sum(axis=0) - 1.0) <= 1e-9):
        raise RecipeError(f"{where}: weights do not sum to one over the tasks (axis 0); divide them by their sum")
