"""Read ``recipe.yaml`` into the recipes of :mod:`theory`; errors name file, field and remedy.

The file has three parts: ``defaults`` (fields that all experts share), ``experts`` (a list, each with a name) and
``merge``.  The fields are those of :class:`theory.Expert` and :class:`theory.Merge`; a list where a number is expected
is a schedule with one value per step.  An expert may name the folder of its training run (``run: runs/photos``, with
``devices`` if it was distributed): what timm or the Hugging Face Trainer wrote there fills the fields that are not
given.  ``docs/examples/recipe.yaml`` is a complete example.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from theory import Expert, Merge, RecipeError, Schedule
from theory.errors import nearest
from theory.recipe import Method


class ExpertModel(BaseModel):
    """One expert as written in the file."""

    model_config = ConfigDict(extra="forbid", strict=False)

    name: str
    n: int
    batch_size: int | list[int]
    learning_rate: float | list[float]
    steps: int | None = None
    momentum: float = 0.0
    weight_decay: float = 0.0
    sampling: Literal["without_replacement", "with_replacement", "reshuffle"] = "without_replacement"
    drop_last: bool = False
    curvature: Literal["convex", "strongly_convex", "smooth"] = "smooth"
    L: float | None = None
    mu: float | None = None
    kappa: float | None = None
    pl_constant: float | None = None
    initial_gradient_norm: float | None = None
    sigma: float | None = None
    sigma0: float | None = None
    D_inf: float | None = None
    D_2: float | None = None
    D_envelope: float | None = None
    initial_risk: float | None = None
    training_risk: float | None = None
    minimal_risk: float | None = None
    base_norm: float | None = None
    drift: float | None = None
    private_drift: float | None = None
    epsilon: float | None = None
    batch_gradient_norms: list[float] | None = None
    batch_losses: list[float] | None = None
    held_out_losses: list[float] | None = None
    head: Literal["none", "frozen", "trained"] = "none"
    optimizer: str = "sgd"
    gradient_clipping: bool = False
    measured: list[str] = Field(default_factory=list)
    nesterov: bool = False
    decoupled_decay: bool = False
    G: float | None = None
    B: float | None = None
    D_inf_shared: float | None = None
    D_inf_private: float | None = None
    cross_smoothness: float | None = None
    minimizer_distance: float | None = None


class MergeModel(BaseModel):
    """The merge as written in the file."""

    model_config = ConfigDict(extra="forbid")

    method: Method = "average"
    weights: list[float] | None = None
    coefficients: float | list[float] | None = None
    drop_rate: float = 0.0
    rescale: bool = True
    independent_masks: bool = True
    shared_samples: bool | None = None
    data_independent_choices: bool | None = None
    per_sample_loss: bool | None = None
    orthogonal_task_vectors: bool | None = None
    dispersion: float | None = None
    sensitivity: float | list[float] | None = None
    measured: list[str] = Field(default_factory=lambda: ["dispersion", "sensitivity"])


class RecipeModel(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid")

    defaults: dict[str, Any] = Field(default_factory=dict)
    experts: list[ExpertModel] = Field(min_length=1)
    merge: MergeModel = Field(default_factory=MergeModel)


def read_recipe(path: Path) -> Merge:
    """Read a recipe file; raises :class:`theory.RecipeError` with file, field and remedy in one sentence."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(
            f"{path}: cannot be read ({error.strerror or error}); give the path of a recipe.yaml"
        ) from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: is not a text file; give the path of a recipe.yaml") from error
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}" if mark is not None else "the text"
        raise RecipeError(f"{path}: {where} is not valid YAML; check indentation, colons and brackets") from error
    return recipe_from(content, str(path), path.parent)


def recipe_from(content: Any, source: str, folder: Path | None = None) -> Merge:
    """Turn parsed YAML (or JSON) into a :class:`theory.Merge`; ``source`` is named in errors.

    ``folder``: where relative paths in ``run`` start (default: the working folder).
    """
    if not isinstance(content, dict):
        raise RecipeError(f"{source}: holds no mapping; start it with 'experts:' and a list of experts")
    filled = dict(content)
    defaults, experts = filled.get("defaults") or {}, filled.get("experts")
    if isinstance(defaults, dict) and isinstance(experts, list):
        filled["defaults"] = defaults
        runs = [_run_fields(item, defaults, folder or Path(), source) for item in experts]
        filled["experts"] = [
            _one_expert(defaults, fields, item) if isinstance(item, dict) else item
            for item, (fields, _) in zip(experts, runs, strict=True)
        ]
        mixed = [item["name"] for item, (_, broken) in zip(experts, runs, strict=True) if broken]
        if mixed:
            filled["merge"] = _without_per_sample_loss(filled.get("merge"), mixed[0], source)
    if filled.get("merge", ...) is None:
        filled.pop("merge")
    try:
        model = RecipeModel.model_validate(filled)
    except ValidationError as error:
        raise RecipeError(f"{source}: {_first_problem(error, filled)}") from error
    try:
        return Merge(tuple(_expert(item) for item in model.experts), **_merge_fields(model.merge))
    except RecipeError as error:
        raise type(error)(f"{source}: {error}") from error


def _run_fields(item: Any, defaults: dict[str, Any], folder: Path, source: str) -> tuple[dict[str, Any], bool]:
    """Fields that the files of ``run`` hold, as plain values, and whether they say that A3 is broken."""
    if not isinstance(item, dict) or "run" not in item:
        return {}, False
    from experiments.recipe_readers import read_run

    name, place = item.get("name"), item["run"]
    if not isinstance(place, str) or not isinstance(name, str):
        raise RecipeError(f"{source}: run needs a path and its expert a name; give run: folder of the training run")
    samples, devices = item.get("n", defaults.get("n")), item.get("devices")
    for label, value in (("n", samples), ("devices", devices)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise RecipeError(f"{source}: expert {name!r}: {label} is {value!r}; give a whole number")
    reading = read_run(folder / place, name=name, n=samples, devices=devices)
    plain = {
        key: value.values.tolist() if isinstance(value, Schedule) else value for key, value in reading.fields().items()
    }
    return {**plain, "measured": list(reading.guessed)}, reading.per_sample_loss is False


def _one_expert(defaults: dict[str, Any], read: dict[str, Any], item: dict[str, Any]) -> dict[str, Any]:
    """Defaults, what the run's files say, the expert's own fields; what the files only bracket counts as measured."""
    own = {key: value for key, value in item.items() if key not in ("run", "devices")}
    fields = {**defaults, **read, **own}
    stated = own.get("measured", defaults.get("measured", []))
    if isinstance(stated, list):
        stated = [*stated, *(name for name in read.get("measured", []) if name not in own)]
    return {**fields, "measured": stated}


def _without_per_sample_loss(merge: Any, name: str, source: str) -> Any:
    stated = dict(merge) if isinstance(merge, dict) else {}
    if stated.get("per_sample_loss"):
        raise RecipeError(
            f"{source}: merge: per_sample_loss is true, but expert {name!r} was trained with mixed samples (mixup or "
            "alike); leave it out"
        )
    return {**stated, "per_sample_loss": False}


def _expert(model: ExpertModel) -> Expert:
    fields = model.model_dump()
    for name in ("learning_rate", "batch_size", "batch_gradient_norms", "batch_losses", "held_out_losses"):
        if isinstance(fields[name], list):
            fields[name] = Schedule(np.asarray(fields[name], dtype=np.float64))
    fields["measured"] = frozenset(fields["measured"])
    return Expert(**fields)


def _merge_fields(model: MergeModel) -> dict[str, Any]:
    return {**model.model_dump(), "measured": frozenset(model.measured)}


def _first_problem(error: ValidationError, content: dict[str, Any]) -> str:
    problem = error.errors(include_url=False)[0]
    place = [part for part in problem["loc"] if not (isinstance(part, str) and part in ("int", "float"))]
    place = [part for part in place if not (isinstance(part, str) and part.startswith("list["))]
    names: list[str] = []
    for index, part in enumerate(place):
        if isinstance(part, int) and index == 1 and place[0] == "experts":
            item = content["experts"][part]
            label = item.get("name") if isinstance(item, dict) else None
            names[-1] = f"expert {label!r}" if label else f"expert number {part + 1}"
        elif isinstance(part, int):
            names[-1] = f"{names[-1]}[{part}]"
        else:
            names.append(str(part))
    where = ": ".join(names) or "file"
    kind = problem["type"]
    if kind == "extra_forbidden":
        kinds: dict[str, type[BaseModel]] = {"experts": ExpertModel, "merge": MergeModel}
        model = kinds.get(str(place[0]), RecipeModel) if len(place) > 1 else RecipeModel
        close = get_close_matches(str(place[-1]), list(model.model_fields), n=1)
        hint = f"did you mean {close[0]!r}?" if close else "check its spelling or remove it"
        return f"{where} is not a known field; {hint}"
    if kind == "missing":
        return f"{where} is missing; add it"
    if kind == "literal_error":
        options = re.findall(r"'([^']*)'", problem["msg"])
        return f"{where} is {problem.get('input')!r}; {nearest(problem.get('input'), options)}"
    message = problem["msg"].removeprefix("Input should be ")
    return f"{where} is {problem.get('input')!r}; it should be {message}"
