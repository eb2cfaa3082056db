"""Grids in YAML (or JSON): read with the line of every entry, so that every complaint names its line."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from experiments.grid.errors import GridError, Place, dotted
from experiments.grid.expand import Expansion, expansion
from experiments.grid.spec import GridSpec
from theory.errors import nearest

LARGEST = 1 << 20
"""Bytes of a file."""
MOST_NODES = 200_000
"""Entries of a file, aliases followed."""


@dataclass(frozen=True)
class GridFile:
    """A grid and where each of its entries is written.

    Attributes:
        spec: the grid.
        source: the file, or the preset's name with ``.yaml``.
        lines: line (from 1) of each entry by its place; keys and items of lists.
        text: of the file.
    """

    spec: GridSpec
    source: str
    lines: Mapping[Place, int] = field(repr=False)
    text: str = field(repr=False)

    def line(self, place: Place) -> int | None:
        """The line of a place, or of what is around it."""
        return line_of(self.lines, place)

    def error(self, error: GridError) -> GridError:
        """The same error with file and line."""
        place = _flat(error.place, yaml.load(self.text, Loader=_Loader))
        return GridError(error.message, place, source=self.source, line=self.line(place))


def grid_presets() -> tuple[str, ...]:
    """Names of the grids that come with the package."""
    folder = resources.files("experiments.presets.grid")
    return tuple(sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml")))


def read_grid(source: str | Path) -> GridFile:
    """Read a grid from a YAML or JSON file, or a preset by name.

    Raises:
        GridError: no such file or preset, or anything that is not right in it, with its line.
    """
    path = Path(source)
    if path.suffix not in (".yaml", ".yml", ".json"):
        names = grid_presets()
        if str(source) not in names:
            raise GridError(f"{source}: there is no such preset; {nearest_preset(str(source))}, or give a .yaml file")
        text = resources.files("experiments.presets.grid").joinpath(f"{source}.yaml").read_text(encoding="utf-8")
        return parse_grid(text, f"{source}.yaml")
    try:
        if path.stat().st_size > LARGEST:
            raise GridError(f"the file has more than {LARGEST} bytes; a grid fits on a page", source=str(path))
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise GridError(f"there is no such file; presets: {', '.join(grid_presets())}", source=str(path)) from error
    except OSError as error:
        raise GridError(f"cannot be read ({error.strerror}); check name and permissions", source=str(path)) from error
    except UnicodeDecodeError as error:
        raise GridError("is not a text file in UTF-8; save it as one", source=str(path)) from error
    return parse_grid(text, str(path))


def read_runs(file: GridFile) -> Expansion:
    """The runs of a grid that was read.

    Raises:
        GridError: too many runs, or a combination that cannot be run, with the line.
    """
    try:
        return expansion(file.spec)
    except GridError as error:
        raise file.error(error) from error


def nearest_preset(name: str) -> str:
    """The preset that was meant, or all of them."""
    by_words = {preset.replace("-", "_"): preset for preset in grid_presets()}
    said = nearest(name, by_words)
    return re.sub(r"[a-z0-9]+(?:_[a-z0-9]+)+", lambda match: by_words.get(match[0], match[0]), said)


def parse_grid(text: str, source: str = "grid") -> GridFile:
    """Read a grid from text.

    Args:
        text: YAML or JSON.
        source: what to call it in messages.

    Raises:
        GridError: with the line.
    """
    try:
        content, lines = _read(text)
    except GridError as error:
        raise GridError(error.message, error.place, source=source, line=error.line) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise GridError(_advice(problem), source=source, line=None if mark is None else mark.line + 1) from error
    except RecursionError as error:
        raise GridError("entries are nested too deeply; write it flatter", source=source) from error
    if not isinstance(content, Mapping):
        said = "is empty" if content is None else "is not a mapping"
        raise GridError(f"the file {said}; write `key: value` lines, beginning with name", source=source, line=1)
    try:
        spec = GridSpec.model_validate(content)
    except ValidationError as error:
        told = [each for each in error.errors() if each["type"] != "missing"] or error.errors()
        problems = sorted((_problem(each, content) for each in told), key=_by_line(lines))
        first = problems[0]
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise GridError(first.message + more, first.place, source=source, line=line_of(lines, first.place)) from error
    return GridFile(spec, source, lines, text)


def line_of(lines: Mapping[Place, int], place: Place) -> int | None:
    """The line of a place; of the nearest entry around it where it is not written itself."""
    for end in range(len(place), -1, -1):
        if place[:end] in lines:
            return lines[place[:end]]
    return None


def _by_line(lines: Mapping[Place, int]) -> Any:
    return lambda error: (line_of(lines, error.place) or 0, dotted(error.place))


# --- YAML ------------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML with YAML 1.2's numbers: ``1e-3`` is one."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def _read(text: str) -> tuple[Any, dict[Place, int]]:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        lines: dict[Place, int] = {(): 1}
        if node is None:
            return None, lines
        _walk(node, (), lines, [0], ())
        return loader.construct_document(node), lines
    finally:
        loader.dispose()


def _walk(node: yaml.Node, place: Place, lines: dict[Place, int], visited: list[int], above: tuple[int, ...]) -> None:
    """Note the line of every entry, and refuse keys that are given twice."""
    visited[0] += 1
    line = node.start_mark.line + 1
    if visited[0] > MOST_NODES:
        raise GridError(f"the file has more than {MOST_NODES:,} entries; a grid fits on a page", place, line=line)
    if id(node) in above:
        raise GridError("an alias holds itself; write the values", place, line=line)
    inside = (*above, id(node))
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            lines[(*place, number)] = item.start_mark.line + 1
            _walk(item, (*place, number), lines, visited, inside)
    elif isinstance(node, yaml.MappingNode):
        seen: dict[Hashable, int] = {}
        for key, value in node.value:
            where = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise GridError("a key is a list or a mapping; keys are plain words here", place, line=where)
            if key.value in seen:
                raise GridError(
                    f"the key is given twice, first on line {seen[key.value]}; remove one",
                    (*place, key.value),
                    line=where,
                )
            seen[key.value] = where
            lines[(*place, key.value)] = where
            _walk(value, (*place, key.value), lines, visited, inside)


def _advice(problem: str) -> str:
    if r"'\t'" in problem or "tab" in problem:
        return "the line begins with a tab; indent with spaces"
    return f"not readable as YAML ({problem}); check indentation, colons and brackets"


# --- what pydantic found ---------------------------------------------------------------------------------------------


def _problem(error: Mapping[str, Any], content: Any) -> GridError:
    """One of pydantic's complaints in the place where it is written."""
    place = _written(error["loc"], content)
    kind, said = error["type"], str(error["msg"]).removeprefix("Value error, ")
    context = error.get("ctx", {})
    if kind == "grid":
        own = GridError(context["message"], tuple(context["place"])).at(place)
        return GridError(own.message, _flat(own.place, content))
    if kind == "extra_forbidden":
        return GridError(f"there is no such key; {nearest(error['loc'][-1], _keys_beside(error['loc']))}", place)
    if kind == "missing":
        return GridError(f"{error['loc'][-1]} is missing; add it", place)
    if kind == "too_short":
        return GridError("the list is empty, so that the grid would have no runs; give at least one value", place)
    if kind == "string_pattern_mismatch":
        return GridError(f"{error['input']!r}: use letters, digits, dots, _ and -, a letter or digit first", place)
    shown = "" if isinstance(error["input"], Mapping | list) else f"{error['input']!r}: "
    return GridError(f"{shown}{said[:1].lower()}{said[1:]}; correct the value", place)


def _written(loc: tuple[Any, ...], content: Any) -> Place:
    """The part of pydantic's location that is written in the file (it names types, too)."""
    place: list[str | int] = []
    for part in loc:
        listed = isinstance(content, list) and isinstance(part, int) and part < len(content)
        if listed or (isinstance(content, Mapping) and part in content):
            content = content[part]
            place.append(part)  # what is skipped: names of types, and single entries that count as lists of one
    return tuple(place)


def _flat(place: Place, content: Any) -> Place:
    """A place without the positions in lists that stand for a single entry."""
    found: list[str | int] = []
    tie = content.get("tie") if isinstance(content, Mapping) else None
    if place[:1] == ("tie",) and isinstance(tie, list) and all(isinstance(each, str) for each in tie):
        place = ("tie", *place[2:])
    for part in place:
        if isinstance(part, int) and not isinstance(content, list | tuple):
            continue
        listed = isinstance(content, list) and isinstance(part, int) and part < len(content)
        content = content[part] if listed else content.get(part) if isinstance(content, Mapping) else None
        found.append(part)
    return tuple(found)


def _keys_beside(loc: tuple[Any, ...]) -> tuple[str, ...]:
    from experiments.grid.spec import Joint, Override, When

    owners: dict[str, type[BaseModel]] = {"when": When, "overrides": Override, "sobol": Joint, "random": Joint}
    owner = owners.get(str(loc[0]), GridSpec) if len(loc) > 1 else GridSpec
    return tuple(owner.model_fields)
