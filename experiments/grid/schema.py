"""JSON schema of a grid, for editors and other tools."""

from __future__ import annotations

from typing import Any

from experiments.bases.spec import BaseSpec
from experiments.grid.axes import HYPERPARAMETERS, NUMERIC
from experiments.grid.bases import LISTS
from experiments.grid.run_spec import RunSpec
from experiments.grid.spec import GridSpec

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def grid_schema() -> dict[str, Any]:
    """What a grid's file may hold, as a JSON schema (draft 2020-12).

    Cross checks (names of tasks, tied lengths, batches and data) are not part of it.
    """
    schema = GridSpec.model_json_schema()
    runs = RunSpec.model_json_schema()["properties"]
    defs: dict[str, Any] = schema.setdefault("$defs", {})
    for name in HYPERPARAMETERS:
        value = _value(name, runs[name])
        defs[f"value.{name}"] = value
        defs[f"axis.{name}"] = _axis(name)
        schema["properties"][name] = {"$ref": f"#/$defs/axis.{name}"}
    _settings(defs["When"], "axis")
    _settings(defs["Override"], "value", {"checkpoints": schema["properties"]["checkpoints"]})
    _joint(defs["Joint"])
    base = BaseSpec.model_json_schema()
    defs |= base.pop("$defs", {})
    for name in LISTS:
        one = base["properties"][name]
        base["properties"][name] = {"anyOf": [one, {"type": "array", "items": one, "minItems": 1}]}
    defs["base"] = base
    one_or_more = {"anyOf": [{"$ref": "#/$defs/base"}, _list({"$ref": "#/$defs/base"})]}
    schema["properties"]["base"] = one_or_more
    texts = {"type": "string"}
    schema["properties"]["tasks"] = {"anyOf": [texts, _list(texts)]}
    schema["properties"]["tie"] = {"type": "array", "items": {"anyOf": [texts, _list(texts)]}}
    for name in ("sobol", "random"):
        joint = {"$ref": "#/$defs/Joint"}
        schema["properties"][name] = {"anyOf": [joint, {"type": "array", "items": joint}]}
    return {"$schema": _DIALECT, **schema}


def _value(name: str, described: dict[str, Any]) -> dict[str, Any]:
    content = {key: item for key, item in described.items() if key not in ("default", "title")}
    if name not in NUMERIC:
        return content
    return {"anyOf": [content, {"type": "string", "description": "expression, as 0.1 * batch_size / 256"}]}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


def _mapping(properties: dict[str, Any], *needed: str) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(needed), "additionalProperties": False}


def _axis(name: str) -> dict[str, Any]:
    value = {"$ref": f"#/$defs/value.{name}"}
    count = {"type": "integer", "minimum": 1}
    forms = [
        value,
        _list(value),
        _mapping({"choice": _mapping({"of": _list(value), "samples": count}, "of")}, "choice"),
    ]
    if name in NUMERIC:
        number = {"type": "number"}
        span = _mapping({"from": number, "to": number, "step": number}, "from", "to", "step")
        drawn = _mapping({"low": number, "high": number, "samples": count, "count": count}, "low", "high")
        forms += [span, _mapping({"range": span}, "range")]
        forms += [_mapping({kind: drawn}, kind) for kind in ("uniform", "log_uniform")]
    return {"anyOf": forms}


def _settings(definition: dict[str, Any], kind: str, more: dict[str, Any] | None = None) -> None:
    properties = {name: {"$ref": f"#/$defs/{kind}.{name}"} for name in HYPERPARAMETERS} | (more or {})
    definition["properties"]["set"] = _mapping(properties) | {"minProperties": 1}


def _joint(definition: dict[str, Any]) -> None:
    properties = {name: {"$ref": f"#/$defs/axis.{name}"} for name in HYPERPARAMETERS}
    definition["properties"]["axes"] = _mapping(properties) | {"minProperties": 1}
