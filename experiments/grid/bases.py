"""The bases of a grid: what one entry stands for, and opening one with the data that it needs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from experiments.bases.base import Base
from experiments.bases.spec import BaseSpec
from experiments.grid.errors import GridError
from theory.errors import MergeboundError, nearest

LISTS = ("architecture", "seed", "quality")
"""Entries of a base that may be lists."""


def base_specs(content: Mapping[str, Any]) -> tuple[BaseSpec, ...]:
    """All bases that one entry stands for: its lists multiplied, the last one fastest.

    Raises:
        GridError: an unknown key, an empty list, or an entry that is not valid, with its place.
    """
    for key in content:
        if key not in BaseSpec.model_fields:
            raise GridError(f"a base has no entry of this name; {nearest(key, BaseSpec.model_fields)}", (str(key),))
    varied = [name for name in LISTS if isinstance(content.get(name), list | tuple)]
    for name in varied:
        if not content[name]:
            raise GridError("the list is empty, so that the grid would have no runs; give at least one value", (name,))
    found: list[BaseSpec] = []
    for values in itertools.product(*(content[name] for name in varied)):
        spec = _validated({**content, **dict(zip(varied, values, strict=True))})
        if spec in found:
            raise GridError("a base is named twice; list every value once", (varied[0],))
        found.append(spec)
    return tuple(found)


def _validated(content: dict[str, Any]) -> BaseSpec:
    try:
        return BaseSpec.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = tuple(part for part in first["loc"] if part in content or first["type"] == "missing")
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "missing":
            raise GridError(f"{first['loc'][0]} is missing; a base has at least kind and architecture") from error
        if not place and message.partition(":")[0] in content:  # validators of the whole name their field
            field, _, rest = message.partition(":")
            raise GridError(rest.strip(), (field,)) from error
        raise GridError(message[:1].lower() + message[1:], place) from error


def weights_file(spec: BaseSpec, root: str | Path | None) -> Path | None:
    """The local weights of a base: relative names are looked up here, then below the folder of the data sets.

    Raises:
        MergeboundError: neither place has it; names the file.
    """
    if spec.weights is None:
        return None
    given = spec.weights.expanduser()
    places = [given] if given.is_absolute() else [given, *([folder / given] if (folder := _root(root)) else [])]
    for path in places:
        if path.exists():
            return path
    raise MergeboundError(f"{' and '.join(str(p) for p in places)}: there is no such file; give the base's weights")


def _root(root: str | Path | None) -> Path | None:
    from experiments.tasks.npz8 import npz8_root

    try:
        return npz8_root(root)
    except MergeboundError:
        return None


def open_base(
    spec: BaseSpec,
    root: str | Path | None = None,
    *,
    cache: Path | None = None,
    download: bool = False,
    device: str = "cpu",
) -> Base:
    """The base of a run.

    A base of kind ``pretrain`` is made of the training images of the task that its ``data`` names, without augmentation
    of its own, and is kept in the cache.

    Args:
        spec: of the run.
        root: folder of the data sets; relative names of weights are looked up in it too.
        cache: folder of bases; default: ``bases`` in the cache folder of the user.
        download: allow the network.
        device: where a base is pretrained.

    Raises:
        MergeboundError: as :func:`experiments.bases.spec.load_base`, or a task that cannot be opened.
    """
    from experiments.bases.base import build
    from experiments.bases.known_hashes import cache_folder
    from experiments.bases.spec import load_base
    from experiments.inputs.resident import residents
    from experiments.models.form import input_format
    from experiments.tasks.named import open_task

    kept = cache if cache is not None else cache_folder() / "bases"
    if spec.weights is not None:
        spec = spec.model_copy(update={"weights": weights_file(spec, root)})
    if spec.kind != "pretrain":
        return load_base(spec, cache=kept, download=download, device=device)
    if not spec.data:
        raise MergeboundError(f"{spec.architecture}: name the task that the base is pretrained on as its data")
    task = open_task(spec.data, root, seed=0)
    network = build(spec.architecture, spec.classes or task.classes, spec.options, spec.seed)
    train, validation, _ = residents(task, input_format(network), seed=spec.seed)
    return load_base(
        spec, data=train, validation=validation, data_digest=task.digest, cache=kept, download=download, device=device
    )
