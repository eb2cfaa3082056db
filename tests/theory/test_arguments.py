"""Wrong kinds of arguments at every public name: a typed error that says what to give, or a number; nothing else."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import numpy as np
import pytest

import theory
from theory import Expert, Merge, MergeboundError, RecipeError
from theory.arguments import advised

CALLABLE = [
    name
    for name in theory.__all__
    if callable(getattr(theory, name)) and name not in ("MergeboundError", "RecipeError", "AssumptionError")
]
POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def fill(item: Any, junk: Any) -> Any:
    """Call with the same junk in every required place."""
    required = [one for one in inspect.signature(item).parameters.values() if one.default is one.empty]
    places = [junk for one in required if one.kind in POSITIONAL]
    return item(*places, **{one.name: junk for one in required if one.kind is one.KEYWORD_ONLY})


@pytest.mark.parametrize("junk", [None, "x", 3, [], {}], ids=repr)
@pytest.mark.parametrize("name", CALLABLE)
def test_junk_everywhere(name: str, junk: Any) -> None:
    message, found = "", None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = fill(getattr(theory, name), junk)
        except MergeboundError as refusal:
            message = str(refusal)
    assert not message or len(message) > 15
    if isinstance(found, (float, np.ndarray)) and np.asarray(found).dtype.kind == "f":
        assert not np.isnan(found).any()


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda: theory.master_bound(None), "master_bound: merge is None; give a Merge"),  # type: ignore[arg-type]
        (lambda: theory.compare(None), "compare: merge is None; give a Merge"),  # type: ignore[arg-type]
        (lambda: theory.design(None, {}), "design: merge is None; give a Merge"),  # type: ignore[arg-type]
        (lambda: theory.bound_interval("x", {}), "bound_interval: merge is 'x'; give a Merge"),  # type: ignore[arg-type]
        (lambda: theory.clock(3), "clock: expert is 3; give an Expert"),  # type: ignore[arg-type]
        (lambda: theory.bound_to_python(None), "bound_to_python: bound is None; give a Bound"),  # type: ignore[arg-type]
        (lambda: theory.explain_method([]), r"explain_method: name is \[\]; give a name \(text\)"),  # type: ignore[arg-type]
        (lambda: theory.task_vectors(3), "task_vectors: names is 3; give a sequence"),  # type: ignore[arg-type]
        (lambda: theory.explain_method("tise"), "there is no method 'tise'; did you mean 'ties'"),
        (lambda: theory.operator("fischer"), "did you mean 'fisher'"),
        (lambda: Merge((Expert("a", 9, 3, 0.1, 2),), method="task-arithmetic"), "did you mean 'task_arithmetic'"),  # type: ignore[arg-type]
        (lambda: theory.merge_with((Expert("a", 9, 3, 0.1, 2),), "avarage"), "did you mean 'average'"),
        (lambda: Expert("a", 9, 3, 0.1, 2, sampling="reshufle"), "did you mean 'reshuffle'"),  # type: ignore[arg-type]
        (lambda: Expert("a", 9, 3, 0.1, 2, curvature="Convex"), "did you mean 'convex'"),  # type: ignore[arg-type]
    ],
)
def test_advice(ask: Any, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        ask()


def test_defects_are_not_disguised() -> None:
    """Arguments that fit their annotations: the error of the function itself is passed on."""

    @advised
    def broken(merge: Merge, scale: float = 1.0) -> float:
        return merge.no_such_field * scale  # type: ignore[attr-defined, no-any-return]

    merge = Merge((Expert("a", 9, 3, 0.1, 2),))
    with pytest.raises(AttributeError, match="no_such_field"):
        broken(merge)
    with pytest.raises(RecipeError, match="broken: merge is 1"):
        broken(1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="missing"):
        broken()  # type: ignore[call-arg]
    assert theory.master_bound.__wrapped__.__module__ == "theory.risk"  # type: ignore[attr-defined]
