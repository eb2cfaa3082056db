"""Arithmetic on hyperparameters, as ``0.1 * batch_size / 256``: parsed into a tree and walked, never run as code."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from experiments.grid.errors import GridError
from theory.errors import nearest

LONGEST = 200
"""Characters of an expression."""

_BINARY: dict[type, Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
}
FUNCTIONS: dict[str, Callable[..., float]] = {
    "sqrt": math.sqrt,
    "exp": math.exp,
    "log": math.log,
    "floor": math.floor,
    "ceil": math.ceil,
    "round": round,
    "min": min,
    "max": max,
}
"""What may be called."""


@dataclass(frozen=True)
class Expression:
    """A formula.

    Attributes:
        text: as it was written; expressions with the same text are equal.
        names: of the hyperparameters that it reads, sorted.
    """

    text: str
    names: tuple[str, ...]

    def value(self, given: Mapping[str, float]) -> float:
        """The number for given hyperparameters.

        Raises:
            GridError: it is not a finite number (division by zero, overflow, root of a negative number).
        """
        try:
            found = float(_walk(ast.parse(self.text, mode="eval").body, given))
        except (ArithmeticError, ValueError, TypeError) as error:
            raise GridError(f"{self.text!r} has no value for {_shown(self.names, given)} ({error})") from error
        if not math.isfinite(found):
            raise GridError(f"{self.text!r} is not a finite number for {_shown(self.names, given)}; change it")
        return found


def parse(text: str, known: tuple[str, ...]) -> Expression:
    """Read a formula of numbers, ``+ - * / // **``, brackets, names and :data:`FUNCTIONS`.

    Args:
        text: of at most :data:`LONGEST` characters.
        known: names that may be used.

    Raises:
        GridError: anything else.
    """
    form = f"write numbers, + - * / **, brackets, {', '.join(FUNCTIONS)} and names of hyperparameters"
    if len(text) > LONGEST:
        raise GridError(f"the expression has {len(text)} characters, more than {LONGEST}; write the number")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise GridError(f"{text!r} is neither a number nor an expression; {form}") from error
    names: set[str] = set()
    _check(tree, text, known, names, form)
    return Expression(text.strip(), tuple(sorted(names)))


def _check(node: ast.AST, text: str, known: tuple[str, ...], names: set[str], form: str) -> None:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return
    if isinstance(node, ast.Name):
        if node.id not in known:
            raise GridError(f"{text!r} reads {node.id!r}, no numeric hyperparameter; {nearest(node.id, known)}")
        names.add(node.id)
        return
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        return _check(node.operand, text, known, names, form)
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        _check(node.left, text, known, names, form)
        return _check(node.right, text, known, names, form)
    calls = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS
    if calls and isinstance(node, ast.Call) and node.args and not node.keywords:
        for argument in node.args:
            _check(argument, text, known, names, form)
        return None
    raise GridError(f"{text!r} is not an expression that is understood; {form}")


def _walk(node: ast.expr, given: Mapping[str, float]) -> float:
    if isinstance(node, ast.Constant):
        return float(node.value)  # type: ignore[arg-type]
    if isinstance(node, ast.Name):
        return float(given[node.id])
    if isinstance(node, ast.UnaryOp):
        inner = _walk(node.operand, given)
        return -inner if isinstance(node.op, ast.USub) else inner
    if isinstance(node, ast.BinOp):
        return _BINARY[type(node.op)](_walk(node.left, given), _walk(node.right, given))
    assert isinstance(node, ast.Call)
    assert isinstance(node.func, ast.Name)
    return float(FUNCTIONS[node.func.id](*(_walk(argument, given) for argument in node.args)))


def _shown(names: tuple[str, ...], given: Mapping[str, float]) -> str:
    return ", ".join(f"{name} = {given[name]:g}" for name in names) or "any hyperparameters"
