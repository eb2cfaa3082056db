"""Tasks as a command line names them: a published data set, one of ``npz8``, or a path."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.tasks.catalogue import find
from experiments.tasks.dataset import ImageTask, split
from experiments.tasks.loading import load
from experiments.tasks.local import load_local
from experiments.tasks.npz8 import NAMES, VARIABLE, load_one, npz8_root
from theory.errors import MergeboundError


def expand(names: Sequence[str]) -> tuple[str, ...]:
    """``npz8`` alone stands for its eight data sets (``npz8:mnist``, ...); everything else is kept.

    Raises:
        MergeboundError: a task is named twice, or none is.
    """
    found = [one for name in names for one in ([f"npz8:{k}" for k in NAMES] if name == "npz8" else [name])]
    if not found:
        raise MergeboundError("no task is named; give a data set (see mergebound data list), npz8:NAME or a path")
    twice = next((name for name in found if found.count(name) > 1), None)
    if twice is not None:
        raise MergeboundError(f"task {twice!r} is named twice; name every task once")
    return tuple(found)


def open_task(name: str, root: str | Path | None = None, *, seed: int = 0) -> ImageTask:
    """One task.

    Args:
        name: ``npz8:NAME``; an ``.npz`` file or a folder of images; else a data set of ``mergebound data list``.
        root: folder of the data sets; default: what ``MERGEBOUND_DATA`` names.
        seed: names the split.

    Raises:
        MergeboundError: unknown name, or data that are missing or damaged; names the file.
    """
    if name.startswith("npz8:"):
        return split(load_one(root, name.removeprefix("npz8:")), seed=seed)
    path = Path(name)
    if path.suffix == ".npz" or path.is_dir():
        return split(load_local(path), seed=seed)
    entry = find(name)
    try:
        folder = npz8_root(root)
    except MergeboundError as error:
        raise MergeboundError(f"{name}: give --root, the folder of the data sets, or set {VARIABLE}") from error
    return split(load(entry.name, folder), seed=seed)
