"""Methods and their settings as the commands of ``mergebound measure`` take them: ``--methods`` and ``--set``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from theory.errors import MergeboundError

MethodSettings = Annotated[
    list[str] | None, typer.Option("--set", help="A method's parameter, as `ties.density=0.2`; repeatable.")
]


def listed(text: str) -> list[str]:
    """Names between commas, without blanks around them."""
    return [name.strip() for name in text.split(",") if name.strip()]


def method_settings(methods: Sequence[str], texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Settings of every method, empty where none were given.

    Args:
        methods: the names that may be set; each has to be one of a method.
        texts: ``method.parameter=value``, values as JSON or else as text.

    Raises:
        MergeboundError: an unknown method, a text of another form, or a method that is not among those.
    """
    from merging.registry import get

    found: dict[str, dict[str, Any]] = {name: {} for name in methods}
    for text in texts:
        place, equals, value = text.partition("=")
        name, dot, setting = place.partition(".")
        if not (equals and dot and setting):
            raise MergeboundError(f"--set {text}: write method.parameter=value, as ties.density=0.2")
        if name not in found:
            raise MergeboundError(f"--set {text}: {name!r} is not among the methods ({', '.join(methods) or 'none'})")
        found[name][setting] = _value(value)
    for name in methods:
        get(name)
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
