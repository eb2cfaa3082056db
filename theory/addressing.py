"""Which experts a key such as ``steps``, ``each.steps`` or ``photos.steps`` speaks of.

* ``steps`` and ``all.steps``: **one** number, common to all experts;
* ``each.steps`` and ``*.steps``: **one number per expert**, free of each other;
* ``photos.steps``: of the expert named photos alone.

The two are easily confused: a star reads like "all".  Say ``all`` or ``each``.
"""

from __future__ import annotations

from collections.abc import Sequence

from theory.errors import RecipeError

Group = tuple[str, tuple[int, ...]]


def field_of(key: str) -> str:
    """The field behind a key.

    >>> field_of("each.steps")
    'steps'
    """
    return key.rpartition(".")[2]


def is_common(key: str) -> bool:
    """Whether a key stands for one number that all experts share.

    >>> is_common("steps"), is_common("all.steps"), is_common("a.steps")
    (True, True, False)
    """
    return key.rpartition(".")[0] in ("", "all")


def groups_of(key: str, names: Sequence[str], purpose: str) -> list[Group]:
    """The numbers that a key stands for: the name of each and the experts (their places) that share it.

    Raises :class:`RecipeError` for a key that names no expert, and for an expert called ``all`` or ``each``, whose key
    could mean two things; ``purpose`` starts the message.

    >>> groups_of("steps", ["a", "b"], "design"), groups_of("each.steps", ["a", "b"], "design")
    ([('steps', (0, 1))], [('a.steps', (0,)), ('b.steps', (1,))])
    """
    owner, dot, field = key.rpartition(".")
    if owner in ("all", "each") and owner in names:
        raise RecipeError(f"{purpose}: {key!r} could mean the expert {owner!r} or {owner} experts; rename that expert")
    if owner == "all" or not dot:
        return [(key, tuple(range(len(names))))]
    if owner in ("each", "*"):
        return [(f"{name}.{field}", (place,)) for place, name in enumerate(names)]
    if owner not in names:
        raise RecipeError(
            f"{purpose}: {key!r} names no expert; the experts are {', '.join(names)}; 'all.{field}' is one number for "
            f"all of them, 'each.{field}' one per expert"
        )
    return [(key, (list(names).index(owner),))]


def scope_of(experts: Sequence[int], size: int, key: str) -> str:
    """What a number stands for, in words, and how to say the other thing; empty where there is one expert.

    >>> scope_of((0, 1), 2, "steps")
    "one for all 2 experts ('each.steps': one per expert)"
    """
    if size == 1:
        return ""
    if len(experts) == size:
        return f"one for all {size} experts ('each.{field_of(key)}': one per expert)"
    return "this expert alone"
