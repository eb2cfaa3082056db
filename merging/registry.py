"""Methods by name."""

from __future__ import annotations

from difflib import get_close_matches

from merging.errors import MethodError
from merging.method import Method
from merging.methods import average, dare, risk_optimal, task_arithmetic, ties, weighted


def methods() -> dict[str, Method]:
    """Every method of the package, by name."""
    modules = (average, weighted, task_arithmetic, ties, dare, risk_optimal)
    return {module.METHOD.name: module.METHOD for module in modules}


def get(name: str) -> Method:
    """The method of that name.

    Raises:
        MethodError: there is none; the message lists close matches.
    """
    known = methods()
    if name in known:
        return known[name]
    close = get_close_matches(name.lower().replace("-", "_"), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"choose among {', '.join(known)}"
    raise MethodError(f"unknown merging method '{name}': {hint}")
