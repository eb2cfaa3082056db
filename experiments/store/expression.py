"""The language of ``grid query``: comparisons of columns and constants, read as Python and turned into SQL.

``learning_rate < 0.01 and task == 'npz8:mnist'``, ``0.1 <= momentum <= 0.9``, ``between(step, 1000, 2000)``,
``task in ('digits:0', 'digits:1')``, ``not nesterov``, ``clip_norm is None``, ``isnan(test_loss)``,
``startswith(task, 'npz8:')``, ``learning_rate * batch_size > 1``, ``step == steps``.

Names are columns, or metrics as ``part_name`` (``test_accuracy``, with ``_low``, ``_high``, ``_n``); a metric of the
test part may be named without its part.  What was not measured equals nothing but ``None``.  Constants never become
part of the SQL text: they are bound as parameters.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from experiments.store.errors import QueryError
from theory.errors import nearest

LONGEST = 10_000
"""Characters of an expression."""
_OPERATORS: dict[type[ast.cmpop], str] = {
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Eq: "=",
    ast.NotEq: "<>",
}
_MIRRORED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "=": "=", "<>": "<>"}
_ARITHMETIC: dict[type[ast.operator], str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
_WORDS: dict[str, Any] = {"inf": math.inf, "nan": math.nan, "true": True, "false": False, "none": None}
_NAN_BITS = {"value": 1, "low": 2, "high": 4}
_HELP = "write comparisons such as `learning_rate < 0.01 and task == 'npz8:mnist'`"


@dataclass(frozen=True)
class Column:
    """What a name stands for.

    Attributes:
        sql: the column.
        kind: ``number``, ``text`` or ``bool``.
    """

    sql: str
    kind: str


@dataclass(frozen=True)
class Metric:
    """A measured number: its part, its name and which of value, low, high and n."""

    part: str
    name: str
    field: str = "value"
    kind: str = "number"


@dataclass
class _Term:
    """A side of a comparison: SQL with parameters, or a constant, or a metric."""

    kind: str
    sql: str = ""
    values: tuple[Any, ...] = ()
    metric: Metric | None = None
    constant: bool = False
    value: Any = None


def compile_expression(text: str, columns: Mapping[str, Column | Metric]) -> tuple[str, list[Any]]:
    """A condition of SQL and its parameters.

    Args:
        text: the expression.
        columns: what names may be used.  Checkpoints are ``c`` in the SQL.

    Raises:
        QueryError: says what is wrong and where.
    """
    if len(text) > LONGEST:
        raise QueryError(f"query: longer than {LONGEST} characters; filter the exported table instead")
    try:
        tree = ast.parse(text.strip(), mode="eval")
        return _Compiler(text.strip(), columns).condition(tree.body)
    except SyntaxError as error:
        raise QueryError(f"query: {text.strip()!r} is not an expression (column {error.offset}); {_HELP}") from error
    except (RecursionError, MemoryError, ValueError) as error:
        if isinstance(error, QueryError):
            raise
        raise QueryError("query: too deeply nested, or not text; split it into several queries") from error


class _Compiler:
    def __init__(self, text: str, columns: Mapping[str, Column | Metric]) -> None:
        self.text = text
        self.columns = columns

    def fail(self, node: ast.AST, reason: str) -> QueryError:
        part = ast.get_source_segment(self.text, node) or self.text
        return QueryError(f"query: {part!r}: {reason}")

    def condition(self, node: ast.expr) -> tuple[str, list[Any]]:
        if isinstance(node, ast.BoolOp):
            parts = [self.condition(value) for value in node.values]
            word = " AND " if isinstance(node.op, ast.And) else " OR "
            return "(" + word.join(sql for sql, _ in parts) + ")", [v for _, values in parts for v in values]
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            sql, values = self.condition(node.operand)
            return f"({sql} IS NOT TRUE)", values
        if isinstance(node, ast.Compare):
            return self._comparison(node)
        if isinstance(node, ast.Call):
            return self._call(node)
        if isinstance(node, ast.Name):
            term = self.term(node)
            if term.constant and isinstance(term.value, bool):
                return ("1" if term.value else "0"), []
            if term.kind == "bool":
                return f"({term.sql} = 1)", list(term.values)
        if isinstance(node, ast.Constant) and isinstance(node.value, bool):
            return ("1" if node.value else "0"), []
        raise self.fail(node, f"is neither true nor false; {_HELP}")

    def _comparison(self, node: ast.Compare) -> tuple[str, list[Any]]:
        parts, values = [], []
        left: ast.expr = node.left
        for op, right in zip(node.ops, node.comparators, strict=True):
            sql, more = self._pair(node, left, op, right)
            parts.append(sql)
            values += more
            left = right
        return "(" + " AND ".join(parts) + ")", values

    def _pair(self, node: ast.expr, left: ast.expr, op: ast.cmpop, right: ast.expr) -> tuple[str, list[Any]]:
        if isinstance(op, (ast.In, ast.NotIn)):
            return self._member(left, right, negated=isinstance(op, ast.NotIn))
        if isinstance(op, (ast.Is, ast.IsNot)):
            a, b = self.term(left), self.term(right)
            if not (b.constant and b.value is None) or a.constant:
                raise self.fail(node, "`is` compares a column with None only; write == for values")
            sql, values = self._absent(a)
            return (f"({sql} IS NOT TRUE)" if isinstance(op, ast.IsNot) else sql), values
        return self._compare(node, self.term(left), _OPERATORS[type(op)], self.term(right))

    def _compare(self, node: ast.expr, a: _Term, operator: str, b: _Term) -> tuple[str, list[Any]]:
        if a.constant and not b.constant:
            a, b, operator = b, a, _MIRRORED[operator]
        if a.constant:
            raise self.fail(node, "compares constants; name a column")
        if b.constant and (b.value is None or b.value != b.value):
            if operator not in ("=", "<>"):
                raise self.fail(node, "None and nan have no order; use ==, != or isnan()")
            sql, values = self._absent(a) if b.value is None else self._nan(node, a)
            return (f"({sql} IS NOT TRUE)" if operator == "<>" else sql), values
        if ("text" in (a.kind, b.kind)) and a.kind != b.kind:
            wanted = "text: put it in quotes" if a.kind == "text" else "a number: leave the quotes out"
            raise self.fail(node, f"the column holds {wanted}")
        if operator == "<>":  # everything but the equal, as in Python: what is NaN or absent is not equal
            sql, values = self._compare(node, a, "=", b)
            return f"({sql} IS NOT TRUE)", values
        if a.metric is not None and b.constant:
            m = a.metric
            inner = f"SELECT checkpoint FROM metrics WHERE name = ? AND part = ? AND {m.field} {operator} ?"
            return f"c.id IN ({inner})", [m.name, m.part, b.value]
        left, right = _whole(a), _whole(b)
        return f"({left.sql} {operator} {right.sql})", [*left.values, *right.values]

    def _member(self, left: ast.expr, right: ast.expr, *, negated: bool) -> tuple[str, list[Any]]:
        a = self.term(left)
        if not isinstance(right, (ast.Tuple, ast.List, ast.Set)):
            raise self.fail(right, "`in` takes a list of values, such as ('a', 'b')")
        if a.constant:
            raise self.fail(left, "names no column")
        parts, values = [], []
        for item in right.elts:
            b = self.term(item)
            if not b.constant:
                raise self.fail(item, "a list holds values, not columns")
            sql, more = self._compare(item, a, "=", b)
            parts.append(sql)
            values += more
        simple = a.metric is None and all(sql.endswith(" = ?)") for sql in parts)
        if simple and parts:
            found, values = f"({a.sql} IN ({', '.join('?' * len(parts))}))", [*a.values, *self._constants(right)]
        else:
            found = "(" + (" OR ".join(parts) or "0") + ")"
        return (f"({found} IS NOT TRUE)" if negated else found), values

    def _constants(self, items: ast.Tuple | ast.List | ast.Set) -> list[Any]:
        return [_bound(self.term(item).value) for item in items.elts]

    def _call(self, node: ast.Call) -> tuple[str, list[Any]]:
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        counts = {"between": 3, "isnan": 1, "startswith": 2}
        if name not in counts or node.keywords or len(node.args) != counts[name]:
            raise self.fail(node, "is not known; there are between(x, a, b), isnan(x) and startswith(x, 'text')")
        if name == "isnan":
            return self._nan(node, self.term(node.args[0]))
        if name == "startswith":
            a, b = self.term(node.args[0]), self.term(node.args[1])
            if a.constant or a.kind != "text" or not isinstance(b.value, str):
                raise self.fail(node, "startswith takes a text column and a text")
            return f"(substr({a.sql}, 1, ?) = ?)", [len(b.value), b.value]
        value, low, high = (self.term(item) for item in node.args)
        above, below = self._compare(node, value, ">=", low), self._compare(node, value, "<=", high)
        return f"({above[0]} AND {below[0]})", above[1] + below[1]

    def _absent(self, a: _Term) -> tuple[str, list[Any]]:
        if a.metric is None:
            return f"({a.sql} IS NULL)", list(a.values)
        m = a.metric
        there = f"{m.field} IS NOT NULL OR nan & {_NAN_BITS.get(m.field, 0)}"
        inner = f"SELECT checkpoint FROM metrics WHERE name = ? AND part = ? AND ({there})"
        return f"(c.id NOT IN ({inner}))", [m.name, m.part]

    def _nan(self, node: ast.expr, a: _Term) -> tuple[str, list[Any]]:
        if a.kind != "number" or a.constant:
            raise self.fail(node, "only columns of numbers can be nan")
        if a.metric is None:
            return "0", []
        m = a.metric
        bits = f"nan > 0 AND nan & {_NAN_BITS.get(m.field, 0)}"
        inner = f"SELECT checkpoint FROM metrics WHERE name = ? AND part = ? AND {bits}"
        return f"(c.id IN ({inner}))", [m.name, m.part]

    def term(self, node: ast.expr) -> _Term:
        if isinstance(node, ast.Constant):
            return self._constant(node, node.value)
        if isinstance(node, ast.Name):
            found = self.columns.get(node.id)
            if found is None and node.id.lower() in _WORDS:
                return self._constant(node, _WORDS[node.id.lower()])
            if found is None:
                found = self.columns.get(f"test_{node.id}")
            if found is None:
                raise self.fail(node, f"is no column; {nearest(node.id, sorted(self.columns))}")
            if isinstance(found, Metric):
                return _Term("number", metric=found)
            return _Term(found.kind, found.sql)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
            inner = self._number(node.operand)
            if inner.constant:
                return self._constant(node, -inner.value if isinstance(node.op, ast.USub) else inner.value)
            return _Term("number", f"({'-' if isinstance(node.op, ast.USub) else '+'}{inner.sql})", inner.values)
        if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
            a, b = _whole(self._number(node.left)), _whole(self._number(node.right))
            sql = f"(CAST({a.sql} AS REAL) {_ARITHMETIC[type(node.op)]} {b.sql})"
            return _Term("number", sql, (*a.values, *b.values))
        raise self.fail(node, f"cannot be compared; {_HELP}")

    def _number(self, node: ast.expr) -> _Term:
        found = self.term(node)
        if found.kind == "text" or (found.constant and not isinstance(found.value, (int, float))):
            raise self.fail(node, "is not a number")
        return found

    def _constant(self, node: ast.expr, value: Any) -> _Term:
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**63:
            value = float(value) if abs(value) < 10**300 else math.copysign(math.inf, value)
        if value is None or isinstance(value, (bool, int, float, str)):
            if isinstance(value, str) and not value.isprintable():
                raise self.fail(node, "holds characters that no column has")
            kind = "text" if isinstance(value, str) else "bool" if isinstance(value, bool) else "number"
            return _Term(kind, "?", (_bound(value),), constant=True, value=value)
        raise self.fail(node, "is neither a number nor a text")


def _whole(term: _Term) -> _Term:
    """A metric as a value that can stand anywhere."""
    if term.metric is None:
        return term
    m = term.metric
    sql = f"(SELECT {m.field} FROM metrics WHERE checkpoint = c.id AND part = ? AND name = ?)"
    return _Term("number", sql, (m.part, m.name))


def _bound(value: Any) -> Any:
    return int(value) if isinstance(value, bool) else value
