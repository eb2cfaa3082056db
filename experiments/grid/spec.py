"""The specification of a grid: what is varied, and how; it expands to runs (:mod:`experiments.grid.expand`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from experiments.grid.axes import HYPERPARAMETERS, Axis, check_value, read_axis
from experiments.grid.errors import GridError, Place
from experiments.spec import NUMERICS_VERSION
from theory.errors import MergeboundError, nearest

MOST_RUNS = 100_000
"""More runs than this are refused unless ``most_runs`` says otherwise."""

BASE_AXES = ("architecture", "seed", "quality")
"""Entries of a base that may be lists."""

PLACE = ("device", "store")
"""Entries that say where a grid runs, not what it is."""

Count = Annotated[int, Field(ge=1)]


def _axis(raw: Any, info: ValidationInfo) -> Axis:
    with_place: Axis = _guard(read_axis, info.field_name, raw)
    return with_place


Hyperparameter = Annotated[Axis, PlainValidator(_axis), PlainSerializer(lambda axis: axis.raw)]
"""A value, an expression, or an axis (:func:`experiments.grid.axes.read_axis`)."""

Match = dict[str, Any]
"""Runs that an entry is for: values by field (``task``, ``architecture``, ``base.kind``, or a hyperparameter); a list
means any of its values, a family of tasks all of them."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class When(_Strict):
    """Axes that hold for some runs only, in place of those of the grid."""

    match: Match
    set: dict[str, Any]

    @field_validator("set")
    @classmethod
    def _axes(cls, content: dict[str, Any]) -> dict[str, Any]:
        _settable(content, HYPERPARAMETERS)
        return {name: _guard(read_axis, name, raw, place=(name,)) for name, raw in content.items()}


class Override(_Strict):
    """Values for some runs, set after everything else; later overrides win."""

    match: Match
    set: dict[str, Any]

    @field_validator("set")
    @classmethod
    def _values(cls, content: dict[str, Any]) -> dict[str, Any]:
        _settable(content, (*HYPERPARAMETERS, "checkpoints"))
        return {
            name: _guard(read_checkpoints if name == "checkpoints" else check_value, *_named(name), raw, place=(name,))
            for name, raw in content.items()
        }


class Joint(_Strict):
    """A joint design: ``count`` points in the space of several axes.

    ``axes``: a list to choose from, ``{uniform: {low, high}}`` or ``{log_uniform: {low, high}}`` by hyperparameter.
    """

    count: Count
    axes: Annotated[dict[str, Any], Field(min_length=1)]

    @field_validator("axes")
    @classmethod
    def _axes(cls, content: dict[str, Any]) -> dict[str, Any]:
        _settable(content, HYPERPARAMETERS)
        return {name: _guard(read_axis, name, raw, place=(name,), joint=True) for name, raw in content.items()}


class Every(_Strict):
    """Checkpoints after every so many steps."""

    every: Count


class GridSpec(_Strict):
    """A grid of fine-tuning runs.

    Attributes:
        name: of the grid.
        tasks: as :func:`experiments.tasks.named.expand` takes them: data sets, families (``npz8``, ``digits8``), paths.
        base: content of a :class:`~experiments.bases.spec.BaseSpec`, or several; ``architecture``, ``seed`` and
            ``quality`` may be lists.
        seeds: a number n (seeds 0 .. n - 1) or a list; instead of ``seed``.
        checkpoints: steps (those beyond a run's last are left out; the last is always kept), or ``{every: n}``.
        tie: groups of hyperparameters whose values go together, first with first, instead of each with each.
        when: axes that hold for some runs only.
        sobol, random: joint designs, scrambled Sobol points or independent ones, instead of axes of their own.
        overrides: values for some runs.
        exclude: runs that are left out.
        order: fields, slowest first; the others follow in the order ``base``, ``task``, hyperparameters of a run.
        draw_seed: names everything that is drawn here.
        most_runs: a larger grid is refused.
        device, store: where it runs and where its results go, unless the command line says otherwise.  They are no part
            of what a grid is: :meth:`digest` leaves them out.

    All other fields are the hyperparameters of :class:`~experiments.grid.run_spec.RunSpec`.
    """

    name: Annotated[str, Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    base: tuple[dict[str, Any], ...]

    learning_rate: Hyperparameter | None = None
    steps: Hyperparameter | None = None
    batch_size: Hyperparameter | None = None
    data_share: Hyperparameter | None = None
    momentum: Hyperparameter | None = None
    nesterov: Hyperparameter | None = None
    weight_decay: Hyperparameter | None = None
    optimizer: Hyperparameter | None = None
    beta2: Hyperparameter | None = None
    epsilon: Hyperparameter | None = None
    sam_radius: Hyperparameter | None = None
    schedule: Hyperparameter | None = None
    warm_up: Hyperparameter | None = None
    label_smoothing: Hyperparameter | None = None
    clip_norm: Hyperparameter | None = None
    augment: Hyperparameter | None = None
    sampling: Hyperparameter | None = None
    precision: Hyperparameter | None = None
    trained: Hyperparameter | None = None
    rank: Hyperparameter | None = None
    seed: Hyperparameter | None = None
    split_seed: Hyperparameter | None = None

    seeds: Count | tuple[Annotated[int, Field(ge=0)], ...] | None = None
    checkpoints: tuple[Count, ...] | Every | None = None
    tie: tuple[tuple[str, ...], ...] = ()
    when: tuple[When, ...] = ()
    sobol: tuple[Joint, ...] = ()
    random: tuple[Joint, ...] = ()
    overrides: tuple[Override, ...] = ()
    exclude: tuple[Match, ...] = ()
    order: tuple[str, ...] = ()
    draw_seed: Annotated[int, Field(ge=0)] = 0
    most_runs: Count = MOST_RUNS
    device: Annotated[str, Field(min_length=1)] | None = None
    store: Annotated[str, Field(min_length=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _shapes(cls, content: Any) -> Any:
        """Single entries become lists of one."""
        if not isinstance(content, Mapping):
            return content
        found = dict(content)
        for name in ("sobol", "random", "base"):
            if isinstance(found.get(name), Mapping):
                found[name] = [found[name]]
        if isinstance(found.get("tasks"), str):
            found["tasks"] = [found["tasks"]]
        tie = found.get("tie")
        if isinstance(tie, list | tuple) and tie and all(isinstance(each, str) for each in tie):
            found["tie"] = [tie]
        return found

    @field_validator("checkpoints", mode="before")
    @classmethod
    def _steps(cls, raw: Any) -> Any:
        return _guard(read_checkpoints, raw)

    @field_validator("tasks")
    @classmethod
    def _tasks(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        from experiments.tasks.named import expand

        for number, name in enumerate(names):
            if names.index(name) != number:
                raise _placed(GridError(f"task {name!r} is named twice; name every task once", (number,)))
            if ":" in name:
                _guard(_known_task, name, place=(number,))
        try:
            expand(names)
        except MergeboundError as error:
            raise _placed(GridError(str(error))) from error
        return names

    @field_validator("base")
    @classmethod
    def _bases(cls, bases: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        _guard(_check_bases, bases)
        return bases

    @model_validator(mode="after")
    def _fits(self) -> GridSpec:
        from experiments.grid.checks import check_consistent

        _guard(check_consistent, self)
        return self

    def axes(self) -> dict[str, Axis]:
        """The axes that stand on their own, by hyperparameter."""
        found = {name: getattr(self, name) for name in HYPERPARAMETERS if getattr(self, name) is not None}
        if self.seeds is not None:
            if isinstance(self.seeds, int):
                found["seed"] = Axis("range", low=0, high=self.seeds - 1, step=1, raw=self.seeds)
            else:
                found["seed"] = Axis("values", self.seeds, raw=list(self.seeds))
        return found

    def digest(self) -> str:
        """Content hash of the specification and the numerics version, 64 hexadecimal digits."""
        content = {name: value for name, value in self.content().items() if name not in PLACE}
        text = json.dumps({"numerics": NUMERICS_VERSION, **content}, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def content(self) -> dict[str, Any]:
        """Plain data that :meth:`model_validate` reads back to an equal specification."""
        return {str(key): item for key, item in _plain(self).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return {
            name: _plain(getattr(value, name)) for name in type(value).model_fields if name in value.model_fields_set
        }
    if isinstance(value, Axis):
        return _plain(value.raw)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else getattr(value, "text", str(value))


def read_checkpoints(raw: Any) -> Any:
    """Checkpoints as a grid states them: ascending steps, ``{every: n}``, or nothing.

    Raises:
        GridError: with the place.
    """
    if raw is None or isinstance(raw, Every):
        return raw
    if isinstance(raw, Mapping):
        if set(raw) != {"every"}:
            wrong = next((str(key) for key in raw if key != "every"), "")
            raise GridError("write {every: 1000} or a list of steps", (wrong,) if wrong else ())
        if type(raw["every"]) is not int or raw["every"] < 1:
            raise GridError(f"{raw['every']!r}: give a number of steps, 1 or more", ("every",))
        return Every(every=raw["every"])
    steps = [raw] if isinstance(raw, int) else raw
    if not isinstance(steps, list | tuple):
        raise GridError(f"{raw!r}: write {{every: 1000}} or a list of steps")
    for number, step in enumerate(steps):
        if type(step) is not int or step < 1:
            raise GridError(f"{step!r}: give a number of steps, 1 or more", (number,))
        if number and step <= steps[number - 1]:
            raise GridError(f"{step} does not come after {steps[number - 1]}; list the steps in order", (number,))
    return tuple(steps)


def _named(name: str) -> tuple[str, ...]:
    return () if name == "checkpoints" else (name,)


def _settable(names: Iterable[str], known: tuple[str, ...]) -> None:
    for name in names:
        if name not in known:
            raise _placed(GridError(f"there is no hyperparameter of this name; {nearest(name, known)}", (name,)))


def _known_task(name: str) -> None:
    from experiments.tasks.digits8 import EIGHT
    from experiments.tasks.npz8 import NAMES

    family, _, rest = name.partition(":")
    known = {"npz8": NAMES, "digits8": (*EIGHT, "pretraining")}.get(family)
    if known is not None and rest not in known:
        raise GridError(f"{family} has no task {rest!r}; {nearest(rest, known)}")


def _check_bases(bases: tuple[dict[str, Any], ...]) -> None:
    from experiments.grid.bases import base_specs

    if not bases:
        raise GridError("there is no base; give kind and architecture of one")
    for number, content in enumerate(bases):
        try:
            base_specs(content)
        except GridError as error:
            raise error.at((number,)) from error


def _placed(error: GridError) -> PydanticCustomError:
    context = {"message": error.message, "place": list(error.place)}
    return PydanticCustomError("grid", "{message}", context)


def _guard(call: Any, *arguments: Any, place: Place = (), **options: Any) -> Any:
    """Call something within a validator: errors keep their place."""
    try:
        return call(*arguments, **options)
    except GridError as error:
        raise _placed(error.at(place)) from error
