"""Reading specifications from pages of YAML: a file, or a page that comes with the package, checked by its model."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from theory.errors import MergeboundError

LARGEST = 1 << 20
"""Bytes of a file."""
Spec = TypeVar("Spec", bound=BaseModel)


def pages_in(package: str, prefix: str = "") -> tuple[str, ...]:
    """Names of the pages ``PREFIX<name>.yaml`` in a package, sorted."""
    names = (entry.name for entry in resources.files(package).iterdir())
    return tuple(sorted(n[len(prefix) : -5] for n in names if n.startswith(prefix) and n.endswith(".yaml")))


def packaged_page(package: str, name: str) -> str:
    """Text of the page ``NAME.yaml`` of a package."""
    return resources.files(package).joinpath(f"{name}.yaml").read_text(encoding="utf-8")


def read_page(
    source: str | Path,
    model: type[Spec],
    package: str,
    prefix: str = "",
    *,
    names: Sequence[str] | None = None,
    kind: str = "study",
    called: str = "size",
) -> Spec:
    """A specification from a YAML file, or from a page of a package by its name.

    Args:
        source: path that ends in ``.yaml`` or ``.yml``, or a name.
        model: checks the entries.
        package, prefix: where the pages ``PREFIX<name>.yaml`` are.
        names: of these pages, in the order in which errors list them; default: sorted.
        kind: what a page specifies, for errors.
        called: what a name is, for errors.

    Raises:
        MergeboundError: no such file or name, or an entry that is not valid (named with its place).
    """
    path, known = Path(source), tuple(names) if names is not None else pages_in(package, prefix)
    listed = ", ".join(known)
    try:
        if path.suffix in (".yaml", ".yml"):
            if path.stat().st_size > LARGEST:
                raise MergeboundError(f"{path}: more than {LARGEST} bytes; a {kind} fits on a page")
            text = path.read_text(encoding="utf-8")
        elif str(source) in known:
            text = packaged_page(package, f"{prefix}{source}")
        else:
            raise MergeboundError(f"no {called} is called {str(source)!r}; choose from {listed}, or give a YAML file")
    except (OSError, UnicodeDecodeError) as error:
        raise MergeboundError(f"{path}: cannot be read ({error}); known by name: {listed}") from error
    return parsed(text, model, str(source), kind)


def parsed(text: str, model: type[Spec], source: str, kind: str) -> Spec:
    """A specification from YAML.

    Raises:
        MergeboundError: not YAML, or an entry that is not valid (named with its place).
    """
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise MergeboundError(f"{source}: not readable as YAML: {' '.join(str(error).split())}") from error
    return validated(content, model, source, kind)


def validated(content: Any, model: type[Spec], source: str, kind: str) -> Spec:
    """A specification from plain data.

    Raises:
        MergeboundError: an entry that is not valid, named with its place, or with ``kind`` for the whole.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or kind
        raise MergeboundError(f"{source}: {place}: {first['msg'].removeprefix('Value error, ')}") from error
