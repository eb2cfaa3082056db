"""Tasks as a command line names them: embedded digits, one of ``npz8``, a published data set, or a path."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.tasks.catalogue import find
from experiments.tasks.dataset import ImageTask, split
from experiments.tasks.digits8 import EIGHT
from experiments.tasks.digits_images import digits_task
from experiments.tasks.loading import load
from experiments.tasks.local import load_local
from experiments.tasks.npz8 import NAMES, VARIABLE, load_one, npz8_root
from theory.errors import MergeboundError


def expand(names: Sequence[str]) -> tuple[str, ...]:
    """``npz8`` and ``digits8`` alone stand for their eight tasks (``npz8:mnist``, ...); everything else is kept.

    Raises:
        MergeboundError: a task is named twice, or none is.
    """
    families = {"npz8": NAMES, "digits8": EIGHT}
    found = [one for name in names for one in ([f"{name}:{k}" for k in families[name]] if name in families else [name])]
    if not found:
        raise MergeboundError("no task is named; give a data set (see mergebound data list), npz8:NAME or a path")
    twice = next((name for name in found if found.count(name) > 1), None)
    if twice is not None:
        raise MergeboundError(f"task {twice!r} is named twice; name every task once")
    return tuple(found)


def anchored(name: str, folder: str | Path | None = None) -> str:
    """A task's name that means the same in every folder: a path becomes absolute, every other name stays.

    Args:
        name: as :func:`open_task` takes it.
        folder: that a relative path starts from; default: the current one.
    """
    if name.startswith(("digits8:", "npz8:")):
        return name
    path = (Path.cwd() if folder is None else Path(folder)) / Path(name)
    is_path = path.suffix == ".npz" or "/" in name or path.is_dir()
    return str(path.absolute()) if is_path else name


def open_task(name: str, root: str | Path | None = None, *, seed: int = 0) -> ImageTask:
    """One task.

    Args:
        name: ``digits8:NAME`` (embedded) or ``npz8:NAME``; an ``.npz`` file or a folder of images; else a data set of
            ``mergebound data list``.
        root: folder of the data sets; default: what ``MERGEBOUND_DATA`` names.
        seed: names the split.

    Raises:
        MergeboundError: unknown name, or data that are missing or damaged; names the file.
    """
    if name.startswith("digits8:"):
        return digits_task(name.removeprefix("digits8:"), seed=seed)
    if name.startswith("npz8:"):
        return split(load_one(root, name.removeprefix("npz8:")), seed=seed)
    path = Path(name)
    if path.suffix == ".npz" or path.is_dir():
        return split(load_local(path), seed=seed)
    if "/" in name or path.is_absolute():
        raise MergeboundError(f"{name}: there is no such folder; check the path")
    entry = find(name)
    try:
        folder = npz8_root(root)
    except MergeboundError as error:
        raise MergeboundError(f"{name}: give --root, the folder of the data sets, or set {VARIABLE}") from error
    return split(load(entry.name, folder), seed=seed)
