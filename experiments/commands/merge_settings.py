"""What was typed after ``mergebound merge``, put together with a configuration file, as a merge to make."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from merging.config import (
    ExpertEntry,
    MergeFile,
    MergeSpec,
    ReadConfig,
    build,
    coefficient_rule,
    expert_names,
    per_expert,
    read_alpha_file,
    read_config,
)
from merging.config_values import Coefficient, read_setting, split_list
from merging.errors import MethodError
from merging.method import Method
from merging.registry import get
from merging.settings import Gradient, PerLayer, Rule, Varying


def read_spec(
    given: MergeFile, config: Path | None, settings: Sequence[str], coefficients: Sequence[str], alpha: str | None
) -> MergeSpec:
    """Put command line and configuration file together; what is typed wins, and its rules come first.

    Args:
        given: the options that were typed.
        config: the file, if any.
        settings: as typed after ``--set``.
        coefficients: as typed after ``--coef``.
        alpha: as typed after ``--alpha``.

    Raises:
        MethodError: names the option or the file's key, and the remedy.
    """
    read = ReadConfig(Path(), MergeFile()) if config is None else read_config(config)
    if read.mergekit is not None:
        return _with_mergekit(given, read, [*settings, *coefficients, *([alpha] if alpha is not None else [])])
    content = read.content
    if given.experts and content.experts:
        raise MethodError(f"{config}: experts are listed there and on the command line: name them in one place")
    written_for = content.method
    if given.method and written_for and given.method != written_for and (content.settings or content.rules):
        raise MethodError(
            f"--method {given.method}: {config} sets parameters of '{written_for}': change the method there, or "
            "remove them"
        )
    typed = {key: value for key, value in given if value not in (None, [], {})}
    content = content.model_copy(update=typed)
    if not content.experts:
        raise MethodError(f"{config}: no experts are listed: add 'experts:', or name their checkpoints")
    method = get(content.method or "average")
    count = len(content.experts)
    whole, rules = read_settings_and_rules(method, settings)
    content = content.model_copy(update={"settings": {**content.settings, **whole}})
    scales = [read_coefficient_rule(method, text, content.settings, count) for text in coefficients]
    if alpha is not None:
        entries = [entry.model_copy(update={"alpha": None}) for entry in content.experts]
        content = content.model_copy(update={"experts": entries, "alpha": _alpha(method, alpha, entries)})
    return build(content, source="" if config is None else str(config), rules=(*scales, *rules))


def _with_mergekit(given: MergeFile, read: ReadConfig, typed: Sequence[str]) -> MergeSpec:
    """A mergekit file says what is merged and how; the command line, where it goes and what it is stored in."""
    taken = [name for name in ("method", "base", "experts", "statistics") if getattr(given, name)]
    if taken or typed:
        what = f"--{taken[0]}" if taken else "--set, --coef and --alpha"
        raise MethodError(f"{read.path}: this mergekit file says what is merged and how: leave {what} out, or edit it")
    changes = {key: value for key, value in given if value not in (None, [], {})}
    return build(
        read.content.model_copy(update=changes), source=str(read.path), mergekit=read.mergekit, notes=read.notes
    )


def read_settings_and_rules(method: Method, texts: Sequence[str]) -> tuple[dict[str, Varying], list[Rule]]:
    """Parse ``name=value`` and ``name@REGEX=value`` against a method's parameters.

    Raises:
        MethodError: malformed, unknown, repeated or out of domain.
    """
    whole: dict[str, Varying] = {}
    rules: list[Rule] = []
    for text in texts:
        left, equals, value = text.rpartition("=")
        name, at, pattern = left.partition("@")
        if not equals or not name or (at and not pattern):
            raise MethodError(f"--set {text}: write name=value, or name@REGEX=value for some tensors")
        try:
            read = read_setting(method, name, value)
            if at:
                rules.append(Rule(pattern, {name: read}))
                _ = rules[-1].expression
            elif name in whole:
                raise MethodError(f"'{name}' is set twice: keep one")
            else:
                whole[name] = read
        except MethodError as error:
            raise MethodError(f"--set {text}: {error}") from None
    return whole, rules


def read_coefficient_rule(method: Method, text: str, settings: dict[str, Any], experts: int) -> Rule:
    """Parse ``REGEX=0.3`` or ``REGEX=0.3,0.7``, see :func:`merging.config.coefficient_rule`.

    Raises:
        MethodError: malformed, or the method has no coefficients.
    """
    pattern, equals, values = text.rpartition("=")
    if not equals or not pattern or not values.strip():
        raise MethodError(f"--coef {text}: write REGEX=0.3, or REGEX=0.3,0.7 with one number per expert")
    try:
        rule = coefficient_rule(method, pattern, split_list(values), settings, experts)
        _ = rule.expression
    except MethodError as error:
        raise MethodError(f"--coef {text}: {error}") from None
    return rule


def read_settings(method: Method, pairs: Sequence[str]) -> dict[str, float | str | bool]:
    """Parse ``name=value`` pairs against a method's parameters, for commands where one value holds everywhere.

    Raises:
        MethodError: malformed, unknown, repeated or out of domain.
    """
    whole, rules = read_settings_and_rules(method, pairs)
    plain = {name: value for name, value in whole.items() if not isinstance(value, Gradient | PerLayer)}
    if rules or len(plain) < len(whole):
        raise MethodError(
            "--set: settings that change from tensor to tensor are for `mergebound merge`: give one value"
        )
    return plain


def _alpha(method: Method, text: str, experts: Sequence[ExpertEntry]) -> list[Coefficient]:
    paths = [entry.file for entry in experts]
    if text.startswith("@"):
        names = [entry.name or name for entry, name in zip(experts, expert_names(paths), strict=True)]
        values: Sequence[Any] = read_alpha_file(Path(text[1:]), paths, names)
    else:
        values = split_list(text)
    try:
        return list(per_expert(method, values, len(experts)))
    except MethodError as error:
        raise MethodError(f"--alpha {text}: {error}") from None
