"""What somebody who reads a grid's results should know of it, although nothing is wrong."""

from __future__ import annotations

import re
from collections.abc import Iterable

from experiments.bases.spec import BaseSpec
from experiments.grid.run_spec import RunSpec

_FEW = 4


def remarks(runs: Iterable[RunSpec]) -> list[str]:
    """AdamW without a first moment's rate, and experts of a task that their base was trained on; one line each."""
    zero = 0
    bases: dict[int, tuple[BaseSpec, set[str]]] = {}
    for run in runs:
        zero += run.optimizer == "adamw" and run.momentum == 0
        bases.setdefault(id(run.base), (run.base, set()))[1].add(run.task)
    lines = [f"adamw with beta1 = 0 in {zero:,} runs, as its beta1 is momentum; give momentum: 0.9"] if zero else []
    return lines + own_tasks(bases.values())


def own_tasks(bases: Iterable[tuple[BaseSpec, Iterable[str]]]) -> list[str]:
    """One line for each way in which a base knows some of its experts' tasks.

    Args:
        bases: specifications, each with the names of its experts' tasks.
    """
    found: dict[str, set[str]] = {}
    for base, tasks in bases:
        for words, own in known_tasks(base, tasks):
            found.setdefault(words, set()).update(own)
    lines = []
    for words, own in found.items():
        few = ", ".join(sorted(own)[:_FEW]) + (f" and {len(own) - _FEW} more" if len(own) > _FEW else "")
        it = "them" if len(own) > 1 else "it"
        lines.append(
            f"{words}, so that experts and merges of {few} begin from a base that knows {it}; leave {it} out where "
            "that matters"
        )
    return lines


def known_tasks(base: BaseSpec, tasks: Iterable[str]) -> list[tuple[str, set[str]]]:
    """Those of some tasks that a base was trained on, with how that is known.

    Known are the ``data`` of a base that is pretrained on the spot; of a file of weights only what its path is called.

    Args:
        base: specification.
        tasks: names.
    """
    if base.kind == "pretrain" and base.data:
        own = {task for task in tasks if one_source(task, base.data)}
        return [(f"{base.architecture} is pretrained on {base.data}", own)] if own else []
    if base.weights is None:
        return []
    named = set(re.split(r"[^a-z0-9]+", "/".join(base.weights.parts[-2:]).lower()))
    own = {task for task in tasks if re.sub(r"[^a-z0-9]", "", task.rpartition(":")[2].lower()) in named}
    return [(f"the weights {base.weights.name} of {base.architecture} are named after a task", own)] if own else []


def one_source(task: str, other: str) -> bool:
    """Whether two tasks are splits of the same images: the same task, or both of the embedded digits."""
    return task == other or (task.startswith("digits8:") and other.startswith("digits8:"))
