"""Merge specifications: everything that ``mergebound merge`` does, as one object, and as a YAML file.

``docs/examples/merge.yaml`` shows every key.  The keys are the command line's options; paths are relative to the file.
Two other kinds of file are understood where a specification is: what ``mergebound predict --out-coefficients`` writes,
and mergekit's YAML (see :mod:`merging.mergekit_config`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from merging.config_values import Coefficient, read_coefficient, read_setting
from merging.errors import CheckpointError, MethodError
from merging.folder import INDEX_SUFFIXES
from merging.keys import KeyPolicy
from merging.legacy import LEGACY_SUFFIXES
from merging.mergekit_config import MergekitConfig, is_mergekit, read_mergekit
from merging.method import Method
from merging.registry import get
from merging.remote_path import last_name, shown, url_of
from merging.settings import Rule, Varying
from merging.shards import parse_size

Alpha = Sequence[Coefficient] | Mapping[str, Coefficient]
"""One coefficient per expert: in their order, or by their names."""


@dataclass(frozen=True)
class MergeSpec:
    """One merge of files.

    Attributes:
        method: a name that :func:`merging.registry.get` knows; with ``mergekit`` the name in that file.
        base: the checkpoint that the experts were fine-tuned from; ``None`` for methods that do without.
        experts: their checkpoints.
        names: one distinct name per expert.
        settings: the method's parameters (checked values), and extras.
        coefficients: one per expert, or ``None``.
        rules: settings and coefficients of some tensors; the first that sets a parameter wins.
        private: glob patterns of tensors that are not merged; ``None`` for the default.
        private_from: the expert whose private tensors the result carries; ``None`` for the base.
        policy: what happens to tensors that not every checkpoint has.
        seed: for methods that draw random numbers.
        out: the target, a ``.safetensors`` file or a folder.
        overwrite: replace an existing target.
        max_shard_size: in bytes; ``None`` for one file.
        dtype: floating type to store in, as ``float16``; ``None`` for the base's types.
        copy_files_from: folder whose configuration and tokenizer are carried along; ``None`` for the base's.
        for_expert: write this expert's reconstruction instead of the merged vector.
        statistics: files of data statistics, one per expert.
        mergekit: the mergekit file that this came from.
        notes: what the reader of the file should know.
    """

    method: str
    base: Path | None
    experts: tuple[Path, ...]
    names: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    coefficients: Alpha | None = None
    rules: tuple[Rule, ...] = ()
    private: tuple[str, ...] | None = None
    private_from: str | None = None
    policy: KeyPolicy = "strict"
    seed: int = 0
    out: Path | None = None
    overwrite: bool = False
    max_shard_size: int | None = None
    dtype: str | None = None
    copy_files_from: Path | None = None
    for_expert: str | None = None
    statistics: tuple[Path, ...] = ()
    mergekit: MergekitConfig | None = None
    notes: tuple[str, ...] = ()


class ExpertEntry(BaseModel):
    """One expert as written in the file; a path alone will do."""

    model_config = ConfigDict(extra="forbid")

    file: Path
    name: str | None = None
    alpha: Any = None
    statistics: Path | None = None


class RuleEntry(BaseModel):
    """Settings of the tensors whose whole name matches a regular expression, as written in the file."""

    model_config = ConfigDict(extra="forbid")

    tensors: str
    settings: dict[str, Any] = Field(default_factory=dict)
    alpha: list[Any] | dict[str, Any] | None = None


class MergeFile(BaseModel):
    """The whole file; every key is optional, since the command line can supply the rest."""

    model_config = ConfigDict(extra="forbid")

    method: str | None = None
    base: Path | None = None
    experts: list[ExpertEntry] = Field(default_factory=list)
    out: Path | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    alpha: list[Any] | dict[str, Any] | str | None = None
    rules: list[RuleEntry] = Field(default_factory=list)
    private: list[str] | None = None
    private_from: str | None = None
    policy: KeyPolicy | None = None
    seed: int | None = None
    overwrite: bool | None = None
    max_shard_size: int | str | None = None
    dtype: str | None = None
    copy_files_from: Path | None = None
    for_expert: str | None = None
    statistics: list[Path] = Field(default_factory=list)


@dataclass(frozen=True)
class ReadConfig:
    """What a configuration file says, before the command line completes it.

    Attributes:
        path: the file.
        content: its keys, with paths resolved.
        mergekit: set where it is mergekit's.
        notes: keys that were read and do nothing here.
    """

    path: Path
    content: MergeFile
    mergekit: MergekitConfig | None = None
    notes: tuple[str, ...] = ()


def read_config(path: Path) -> ReadConfig:
    """Read a merge specification: this project's own YAML, coefficients that ``predict`` wrote, or mergekit's YAML.

    Raises:
        MethodError: not readable, not YAML, an unknown key or a value of the wrong kind; names file and key.
    """
    content = read_yaml(path)
    try:
        if is_mergekit(content):
            config, notes = read_mergekit(content, path.parent)
            experts = [ExpertEntry(file=expert) for expert in config.experts]
            found = MergeFile(
                method=config.merge_method,
                base=config.base,
                experts=experts,
                dtype=config.out_dtype,
                private=[],
                copy_files_from=config.tokenizer,
            )
            return ReadConfig(path, found, config, notes)
        if is_prediction(content):
            content = _from_prediction(content)
        if isinstance(content.get("experts"), Sequence):
            content["experts"] = [{"file": e} if isinstance(e, str) else e for e in content["experts"]]
        model = MergeFile.model_validate(content)
    except ValidationError as error:
        raise MethodError(f"{path}: {_problem(error, MergeFile)}") from None
    except MethodError as error:
        raise MethodError(f"{path}: {error}") from None
    return ReadConfig(path, _resolved(model, path.parent))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file (safe types only).

    Raises:
        MethodError: names file, line and remedy.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MethodError(f"{path}: cannot be read ({error.strerror}): give the path of a YAML file") from None
    except UnicodeDecodeError:
        raise MethodError(f"{path}: is not a text file: give the path of a YAML file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "the text" if mark is None else f"line {mark.line + 1}"
        raise MethodError(f"{path}: {where} is not valid YAML: check indentation, colons and brackets") from None
    except RecursionError:
        raise MethodError(f"{path}: the YAML is nested too deeply: write it flat") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise MethodError(f"{path}: holds no mapping of keys to values: start with 'method:', 'base:' and 'experts:'")
    return content


def is_prediction(content: Mapping[str, Any]) -> bool:
    """Whether this is what ``mergebound predict --out-coefficients`` writes."""
    entries = content.get("coefficients")
    return isinstance(entries, list) and all(isinstance(e, dict) and {"expert", "alpha"} <= set(e) for e in entries)


def read_alpha_file(path: Path, experts: Sequence[Path], names: Sequence[str]) -> tuple[Coefficient, ...]:
    """Per-expert coefficients from a YAML file, in the order of ``experts``.

    The file is what ``predict`` wrote, or a mapping of expert (its name, or its path) to coefficient.

    Raises:
        MethodError: it names other experts, or some twice.
    """
    content = read_yaml(path)
    if is_prediction(content):
        pairs = [(str(entry["expert"]), entry["alpha"]) for entry in content["coefficients"]]
    else:
        pairs = [(key, value) for key, value in content.items() if not isinstance(value, list)]
    found: dict[str, Any] = {}
    for key, value in pairs:
        matching = [
            name
            for name, expert in zip(names, experts, strict=True)
            if key == name or (path.parent / key).resolve() == expert.resolve() or Path(key) == expert
        ]
        if len(matching) != 1 or matching[0] in found:
            raise MethodError(f"{path}: '{key}' is not one of the experts, {', '.join(names)}: name each of them once")
        found[matching[0]] = value
    missing = [name for name in names if name not in found]
    if missing:
        raise MethodError(f"{path}: there is no coefficient for {', '.join(missing)}: add one")
    return tuple(_labelled(f"{path}: {name}", read_coefficient, found[name]) for name in names)


def expert_names(paths: Sequence[Path]) -> tuple[str, ...]:
    """A name per expert: the file's stem, with as many folders as it takes to tell them (and the base) apart.

    Raises:
        MethodError: the same file twice.
    """
    resolved = [path.resolve() if url_of(path) is None else Path(shown(path)) for path in paths]
    for path, count in Counter(resolved).items():
        if count > 1:
            raise MethodError(
                f"{last_name(path)} is given {count} times: name each expert once, and weight it with --alpha"
            )
    depth = 1
    while True:
        names = tuple("/".join((*path.parts[-depth:-1], _stem(path))) for path in resolved)
        if len(set(names)) == len(names) and "base" not in names:
            return names
        if depth > max(len(path.parts) for path in resolved):
            return tuple(str(path) for path in resolved)
        depth += 1


def build(
    content: MergeFile,
    *,
    source: str,
    rules: Sequence[Rule] = (),
    mergekit: MergekitConfig | None = None,
    notes: tuple[str, ...] = (),
) -> MergeSpec:
    """Check a specification and complete it with defaults.

    Args:
        content: the keys of file and command line.
        source: what to call it in errors, as ``merge.yaml`` (empty for the command line alone).
        rules: rules that come before those of ``content``.
        mergekit: where the file was mergekit's.
        notes: carried over.

    Raises:
        MethodError: something is missing, unknown or outside its domain.
    """
    label = f"{source}: " if source else ""
    if not content.experts:
        raise MethodError(f"{label}there are no experts: name their checkpoints (or list 'experts:' in the file)")
    paths = tuple(entry.file for entry in content.experts)
    derived = expert_names(paths)
    names = tuple(entry.name or name for entry, name in zip(content.experts, derived, strict=True))
    if len(set(names)) < len(names):
        raise MethodError(f"{label}two experts have the same name among {', '.join(names)}: give each its own")
    method = None if mergekit is not None else get(content.method or "average")
    settings: Mapping[str, Any] = content.settings
    own: tuple[Rule, ...] = ()
    if method is not None:
        settings = read_settings(method, content.settings, f"{label}settings.")
        own = tuple(_rule(method, entry, names, f"{label}rule '{entry.tensors}': ") for entry in content.rules)
    return MergeSpec(
        method=content.method or "average",
        base=content.base,
        experts=paths,
        names=names,
        settings=settings,
        coefficients=_alpha(content, paths, names, label),
        rules=(*rules, *own),
        private=None if content.private is None else tuple(pattern for pattern in content.private if pattern),
        private_from=_expert(content.private_from, paths, names, "private_from", label),
        policy=content.policy or "strict",
        seed=content.seed or 0,
        out=content.out,
        overwrite=bool(content.overwrite),
        max_shard_size=None
        if content.max_shard_size is None
        else _labelled(f"{label}max_shard_size", parse_size, content.max_shard_size),
        dtype=content.dtype,
        copy_files_from=content.copy_files_from,
        for_expert=_expert(content.for_expert, paths, names, "for_expert", label),
        statistics=_statistics(content, label),
        mergekit=mergekit,
        notes=notes,
    )


def read_settings(method: Method, given: Mapping[str, Any], label: str = "") -> dict[str, Varying]:
    """Check settings as written against a method's parameters; its extras are passed on as they are.

    Raises:
        MethodError: an unknown parameter, or a value outside its domain.
    """
    return {
        name: value if name in method.extras else _labelled(f"{label}{name}", read_setting, method, name, value)
        for name, value in given.items()
    }


def per_expert(method: Method, values: Sequence[Any], experts: int) -> tuple[Coefficient, ...]:
    """Check that a method takes coefficients and that there is one per expert.

    Raises:
        MethodError: it takes none, or their number is another.
    """
    if method.coefficients == "none":
        raise MethodError(f"method '{method.name}' takes no coefficients: leave them out, or use 'weighted'")
    if len(values) != experts:
        raise MethodError(f"give one finite number for each of the {experts} experts")
    return tuple(read_coefficient(value) for value in values)


def coefficient_rule(
    method: Method, pattern: str, values: Sequence[Any], settings: Mapping[str, Any], experts: int
) -> Rule:
    """The rule of ``--coef 'REGEX=0.3'`` (one value) or ``--coef 'REGEX=0.3,0.7'`` (one per expert).

    One value is the method's scale, its parameter ``coefficient``, on those tensors; where a method has no such
    parameter but takes per-expert coefficients, it is the coefficient of every expert.  Several values are per-expert
    coefficients.

    Args:
        method: the method.
        pattern: regular expression on whole tensor names.
        values: as typed.
        settings: the method's settings; with ``normalize`` one value for all experts would cancel.
        experts: their number.

    Raises:
        MethodError: the method has nothing that this could set.
    """
    has_scale = any(parameter.name == "coefficient" for parameter in method.parameters)
    if len(values) == 1 and has_scale:
        return Rule(pattern, {"coefficient": read_setting(method, "coefficient", values[0])})
    if method.coefficients == "none":
        reason = (
            "no per-expert coefficients: give one number" if has_scale else "no coefficients at all: leave this out"
        )
        raise MethodError(f"method '{method.name}' takes {reason}")
    if len(values) == 1:
        defaults = {parameter.name: parameter.default for parameter in method.parameters}
        if settings.get("normalize", defaults.get("normalize")) is True:
            raise MethodError(
                f"one coefficient for all experts cancels in method '{method.name}', which divides by their sum: give "
                "one per expert, as 0.3,0.7"
            )
        return Rule(pattern, {}, (read_coefficient(values[0]),) * experts)
    return Rule(pattern, {}, per_expert(method, values, experts))


def _rule(method: Method, entry: RuleEntry, names: Sequence[str], label: str) -> Rule:
    if not entry.settings and entry.alpha is None:
        raise MethodError(f"{label}it sets nothing: add 'settings:' or 'alpha:'")
    settings = read_settings(method, entry.settings, f"{label}settings.")
    alpha = None
    if entry.alpha is not None:
        alpha = _labelled(f"{label}alpha", per_expert, method, _by_order(entry.alpha, names, label), len(names))
    rule = Rule(entry.tensors, settings, alpha)
    _labelled(label.removesuffix(": "), lambda: rule.expression)
    return rule


def _alpha(content: MergeFile, paths: Sequence[Path], names: Sequence[str], label: str) -> Alpha | None:
    single = [entry.alpha for entry in content.experts]
    if any(value is not None for value in single):
        if content.alpha is not None:
            raise MethodError(f"{label}'alpha' is given both for all experts and for single ones: keep one")
        if any(value is None for value in single):
            raise MethodError(f"{label}some experts have an 'alpha' and some have none: give all or none")
        return tuple(_labelled(f"{label}alpha", read_coefficient, value) for value in single)
    if content.alpha is None:
        return None
    if isinstance(content.alpha, str):
        if not content.alpha.startswith("@"):
            raise MethodError(f"{label}alpha '{content.alpha}': write a list of numbers, or @file.yaml")
        return read_alpha_file(Path(content.alpha[1:]), paths, names)
    values = _by_order(content.alpha, names, label)
    if len(values) != len(names):
        raise MethodError(f"{label}alpha {values}: give one finite number for each of the {len(names)} experts")
    return tuple(_labelled(f"{label}alpha", read_coefficient, value) for value in values)


def _by_order(values: list[Any] | dict[str, Any], names: Sequence[str], label: str) -> list[Any]:
    if isinstance(values, dict):
        if set(values) != set(names):
            raise MethodError(
                f"{label}alpha names {', '.join(map(str, values))} but the experts are {', '.join(names)}: name each "
                "once"
            )
        return [values[name] for name in names]
    return values


def _expert(given: str | None, paths: Sequence[Path], names: Sequence[str], key: str, label: str) -> str | None:
    """An expert's name, from its name or its path."""
    if given is None or given in names:
        return given
    for path, name in zip(paths, names, strict=True):
        if Path(given) == path or Path(given).resolve() == path.resolve():
            return name
    option = f"--{key.replace('_', '-')}"
    raise MethodError(f"{label}{option} {given} is not among the experts: name one of {', '.join(names)}")


def _statistics(content: MergeFile, label: str) -> tuple[Path, ...]:
    single = [entry.statistics for entry in content.experts]
    given = [path for path in single if path is not None]
    if given and content.statistics:
        raise MethodError(f"{label}'statistics' is given both for all experts and for single ones: keep one")
    if given and len(given) < len(single):
        raise MethodError(f"{label}some experts have 'statistics' and some have none: give all or none")
    return tuple(given or content.statistics)


def _stem(path: Path) -> str:
    for suffix in (*INDEX_SUFFIXES, ".safetensors", *LEGACY_SUFFIXES):
        if path.name.endswith(suffix):
            return path.name.removesuffix(suffix)
    return path.name


def _from_prediction(content: Mapping[str, Any]) -> dict[str, Any]:
    """Coefficients of ``predict``; those of methods that need none only restate what the settings say."""
    found = {key: content[key] for key in ("method", "base", "settings", "private", "seed") if key in content}
    entries = content["coefficients"]
    required = get(str(content.get("method"))).coefficients == "required"
    found["experts"] = [
        {"file": e["expert"], "alpha": e["alpha"]} if required else {"file": e["expert"]} for e in entries
    ]
    return found


def _resolved(model: MergeFile, folder: Path) -> MergeFile:
    """Paths relative to the file's folder."""

    def place(path: Path | None) -> Path | None:
        return path if path is None or url_of(path) is not None else folder / path.expanduser()

    changes: dict[str, Any] = {key: place(getattr(model, key)) for key in ("base", "out", "copy_files_from")}
    changes["experts"] = [
        entry.model_copy(update={"file": place(entry.file), "statistics": place(entry.statistics)})
        for entry in model.experts
    ]
    changes["statistics"] = [place(path) for path in model.statistics]
    for key in ("private_from", "for_expert"):  # a name or a path
        value = getattr(model, key)
        named = {entry.name for entry in model.experts}
        if value is not None and value not in named and (folder / value) in [e.file for e in changes["experts"]]:
            changes[key] = str(folder / value)
    if isinstance(model.alpha, str) and model.alpha.startswith("@"):
        changes["alpha"] = f"@{folder / model.alpha[1:]}"
    if model.method is not None and ".py:" in model.method:
        changes["method"] = str(folder / model.method)
    return model.model_copy(update=changes)


def _problem(error: ValidationError, model: type[BaseModel]) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"there is no key '{where}': choose among {', '.join(model.model_fields)}"
    return f"'{where}' is {first['input']!r}, {first['msg'].lower()}: correct it"[:400]


def _labelled(label: str, function: Any, *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except (MethodError, CheckpointError) as error:
        raise type(error)(f"{label}: {error}") from None


__all__ = [
    "Alpha",
    "MergeFile",
    "MergeSpec",
    "ReadConfig",
    "build",
    "coefficient_rule",
    "expert_names",
    "per_expert",
    "read_alpha_file",
    "read_config",
    "read_settings",
    "read_yaml",
]
