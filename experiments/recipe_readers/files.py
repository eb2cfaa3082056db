"""Text files of other tools: bounded, plain data only, every value checked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from theory import RecipeError

LARGEST_FILE = 200_000_000


def read_text(path: Path) -> str:
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise RecipeError(f"{path}: is larger than {LARGEST_FILE // 10**6} MB; give the file that the tool wrote")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror or error}); give a training run's file") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: is not a text file; give args.yaml or trainer_state.json") from error


def _mapping(path: Path, content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: holds no mapping of names to values; give the file that the tool wrote")
    return {str(key): value for key, value in content.items()}


def read_json(path: Path) -> dict[str, Any]:
    try:
        return _mapping(path, json.loads(read_text(path)))
    except (json.JSONDecodeError, RecursionError) as error:
        raise RecipeError(f"{path}: is not valid JSON; give the file that the tool wrote") from error


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        return _mapping(path, yaml.safe_load(read_text(path)))
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(
            f"{path}: is not plain YAML (Python objects are not read); give the args.yaml that timm wrote"
        ) from error


class Values:
    """The keys of a file, taken one by one; numbers are checked, what is left over can be listed."""

    def __init__(self, path: Path, content: Mapping[str, Any]) -> None:
        self.path, self.content, self.taken = path, content, set[str]()

    def get(self, key: str, default: Any = None) -> Any:
        self.taken.add(key)
        value = self.content.get(key, default)
        return default if value is None else value

    def number(self, key: str, default: float | None = None, *, least: float = 0.0) -> float | None:
        value = self.get(key, default)
        if value is None:
            return None
        try:
            number = float(value)
        except (TypeError, ValueError) as error:
            raise RecipeError(f"{self.path}: {key} is {value!r}; it should be a number") from error
        if isinstance(value, bool) or not math.isfinite(number) or number < least:
            raise RecipeError(f"{self.path}: {key} is {value!r}; it should be a finite number of at least {least:g}")
        return number

    def whole(self, key: str, default: int | None = None, *, least: int = 0) -> int | None:
        number = self.number(key, default, least=least)
        if number is None:
            return None
        if number != int(number):
            raise RecipeError(f"{self.path}: {key} is {number:g}; it should be a whole number")
        return int(number)

    def left(self) -> list[str]:
        return [key for key in self.content if key not in self.taken]
