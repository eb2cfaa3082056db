"""``mergebound merge`` and ``mergebound methods``."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from merging.checkpoint import LEGACY_SUFFIXES, file_hash, load_state_dict, save_state_dict
from merging.compatible import check_compatible, check_finite
from merging.errors import CheckpointError, MethodError
from merging.merge import merge_state_dicts
from merging.method import Method
from merging.partition import DEFAULT_PRIVATE, Partition, partition
from merging.registry import get, methods

_SHOW_PROGRESS_FROM = 400 * 2**20  # bytes of input; below, a merge takes less than about two seconds


def register(app: typer.Typer) -> None:
    """Add ``merge`` and ``methods`` to the command line."""
    app.command("merge")(merge)
    app.command("methods")(list_methods)


def merge(
    experts: Annotated[list[Path], typer.Argument(help="Fine-tuned checkpoints of one base.", show_default=False)],
    base: Annotated[Path, typer.Option("--base", help="The checkpoint they were fine-tuned from.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="Where to write the merge (.safetensors).", show_default=False)],
    method: Annotated[str, typer.Option("--method", help="See `mergebound methods`.")] = "average",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A parameter of the method, as `name=value`; repeatable.")
    ] = None,
    alpha: Annotated[
        str | None, typer.Option("--alpha", help="One coefficient per expert, in their order, as `0.3,0.7`.")
    ] = None,
    private: Annotated[
        list[str] | None,
        typer.Option(
            "--private",
            help="Glob pattern of tensors that are not merged but taken from the base (heads); repeatable; `''` for "
            f"none. Default: {', '.join(f'`{pattern}`' for pattern in DEFAULT_PRIVATE)}.",
        ),
    ] = None,
    private_from: Annotated[
        Path | None, typer.Option("--private-from", help="The expert whose private tensors the merge carries.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="For methods that draw random numbers.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and write nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was done as JSON.")] = False,
) -> None:
    """Merge checkpoints: `mergebound merge --method ties --base B.safetensors E1.safetensors E2.safetensors
    --out O.safetensors --set density=0.2`.

    Reads .safetensors, sharded .safetensors.index.json, and .pt/.pth/.bin (plain tensors only). The result
    appears under its name only when it is complete.
    """
    chosen = get(method)
    names = expert_names(experts)
    parameters = read_settings(chosen, settings or [])
    coefficients = None if alpha is None else read_coefficients(alpha, len(experts))
    if chosen.coefficients == "required" and coefficients is None:
        raise MethodError(
            f"method '{method}' needs coefficients: add --alpha with {len(experts)} comma-separated numbers"
        )
    donor = None
    if private_from is not None:
        if private_from not in experts:
            raise MethodError(f"--private-from {private_from} is not among the experts: name one of them")
        donor = names[experts.index(private_from)]
    check_output(out, [base, *experts])
    patterns = DEFAULT_PRIVATE if private is None else tuple(pattern for pattern in private if pattern)

    with _progress([base, *experts]) as progress:
        task = progress.add_task("reading", total=2 * len(experts) + 4)
        states: list[dict[str, Tensor]] = []
        for path in (base, *experts):
            progress.update(task, description=f"reading {path.name}")
            states.append(load_state_dict(path))
            progress.advance(task)
        origin, *loaded = states
        try:
            parts = partition(origin, patterns)
        except CheckpointError as error:
            raise CheckpointError(f"{base}: {error}") from None
        by_path = {str(path): state for path, state in zip(experts, loaded, strict=True)}
        check_compatible(origin, by_path, parts)
        check_finite(origin, by_path, parts, base_name=str(base))
        progress.update(task, description=f"merging with {method}")
        merged = merge_state_dicts(
            chosen,
            origin,
            dict(zip(names, loaded, strict=True)),
            partition=parts,
            coefficients=coefficients,
            seed=seed,
            private_from=donor,
            **parameters,
        )
        progress.advance(task)
        hashes = []
        for path in (base, *experts):
            progress.update(task, description=f"hashing {path.name}")
            hashes.append(file_hash(path))
            progress.advance(task)
        record: dict[str, Any] = {
            "tool": f"mergebound {_version()}",
            "method": chosen.name,
            "parameters": chosen.settings(parameters),
            "coefficients": None if coefficients is None else dict(zip(names, coefficients, strict=True)),
            "seed": None if chosen.deterministic else seed,
            "private": list(patterns),
            "private_from": donor,
            "base": {"file": base.name, "sha256": hashes[0]},
            "experts": [
                {"name": name, "file": path.name, "sha256": digest}
                for name, path, digest in zip(names, experts, hashes[1:], strict=True)
            ],
        }
        if not dry_run:
            progress.update(task, description=f"writing {out.name}")
            save_state_dict(out, merged, record)
        progress.advance(task)
    _report(out, merged, parts, record, dry_run=dry_run, as_json=as_json)


def list_methods(as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False) -> None:
    """List the merging methods with their parameters, properties and papers."""
    if as_json:
        typer.echo(json.dumps([_describe(method) for method in methods().values()], indent=2))
        return
    table = Table("method", "what it does, and its parameters (--set name=value)", show_lines=True)
    for method in methods().values():
        lines = [
            f"[bold]{escape(method.summary)}[/]",
            *(escape(f"{p.name}={_show(p.default)}, in {p.domain}: {p.meaning}") for p in method.parameters),
            f"--alpha: {method.coefficients}",
            f"[dim]{', '.join(_properties(method))}; {escape(method.paper)}[/]",
        ]
        table.add_row(method.name, "\n".join(lines))
    Console().print(table)


def expert_names(paths: Sequence[Path]) -> tuple[str, ...]:
    """A name per expert: the file's stem, with as many folders as it takes to tell them apart.

    Raises:
        MethodError: the same file twice.
    """
    resolved = [path.resolve() for path in paths]
    for path, count in Counter(resolved).items():
        if count > 1:
            raise MethodError(f"{path.name} is given {count} times: name each expert once, and weight it with --alpha")
    depth = 1
    while True:
        names = tuple("/".join((*path.parts[-depth:-1], _stem(path))) for path in resolved)
        if len(set(names)) == len(names):
            return names
        if depth > max(len(path.parts) for path in resolved):
            return tuple(str(path) for path in resolved)
        depth += 1


def _stem(path: Path) -> str:
    return path.stem if path.suffix in LEGACY_SUFFIXES else path.name.split(".safetensors")[0]


def read_settings(method: Method, pairs: Sequence[str]) -> dict[str, float | str | bool]:
    """Parse ``name=value`` pairs against a method's parameters.

    Raises:
        MethodError: malformed, unknown, repeated or out of domain.
    """
    known = {parameter.name: parameter for parameter in method.parameters}
    read: dict[str, float | str | bool] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise MethodError(f"--set {pair}: write name=value")
        if name not in known:
            options = ", ".join(known) or "it takes none"
            raise MethodError(f"--set {pair}: method '{method.name}' has no parameter '{name}': choose among {options}")
        if name in read:
            raise MethodError(f"--set {pair}: '{name}' is set twice: keep one")
        try:
            read[name] = known[name].parse(text)
        except MethodError as error:
            raise MethodError(f"--set {pair}: {error}") from None
    return read


def read_coefficients(text: str, experts: int) -> tuple[float, ...]:
    """Parse ``0.3,0.7``.

    Raises:
        MethodError: not numbers, not finite, or not one per expert.
    """
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise MethodError(f"--alpha {text}: write comma-separated numbers, as 0.3,0.7") from None
    if len(values) != experts or not all(math.isfinite(value) for value in values):
        raise MethodError(f"--alpha {text}: give one finite number for each of the {experts} experts")
    return values


def check_output(out: Path, inputs: Sequence[Path]) -> None:
    """Refuse a target that cannot be written, or that is one of the inputs, before anything is read.

    Raises:
        CheckpointError: names the target and the remedy.
    """
    if out.suffix != ".safetensors":
        raise CheckpointError(f"{out}: merges are written as .safetensors only: change the suffix of --out")
    if not out.parent.is_dir():
        raise CheckpointError(f"{out}: the folder '{out.parent}' does not exist: create it first")
    if any(path.resolve() == out.resolve() for path in inputs):
        raise CheckpointError(f"{out}: the target is one of the inputs, which are never changed: choose another --out")


def _progress(paths: Sequence[Path]) -> Progress:
    console = Console(stderr=True)
    size = sum(path.stat().st_size for path in paths if path.is_file())
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=size < _SHOW_PROGRESS_FROM or not console.is_terminal,
    )


def _report(
    out: Path, merged: dict[str, Tensor], parts: Partition, record: dict[str, Any], *, dry_run: bool, as_json: bool
) -> None:
    counts = {kind: len(getattr(parts, kind)) for kind in ("shared", "private", "buffers", "constants")}
    size = sum(tensor.numel() * tensor.element_size() for tensor in merged.values())
    if as_json:
        typer.echo(
            json.dumps({"out": None if dry_run else str(out), "bytes": size, "tensors": counts, **record}, indent=2)
        )
        return
    kept = f"{record['private_from'] or 'the base'}"
    settings = ", ".join(f"{name}={_show(value)}" for name, value in record["parameters"].items())
    given = record["coefficients"] or {}
    alpha = "".join(f", {name} {value:.4g}" for name, value in given.items())
    shown = f"({settings})" if settings else ""
    typer.echo(f"{record['method']}{shown} of {len(record['experts'])} experts{alpha}, {size / 2**20:.1f} MiB")
    typer.echo(f"merged: {counts['shared']} shared tensors and {counts['buffers']} running statistics")
    if parts.private or parts.constants:
        listed = ", ".join(parts.private[:4]) + (", ..." if len(parts.private) > 4 else "")
        private = f" ({listed})" if listed else ""
        typer.echo(f"not merged: {counts['private']} private from {kept}{private}, {counts['constants']} constants")
    typer.echo("dry run: nothing was written" if dry_run else f"written: {out}")


def _describe(method: Method) -> dict[str, Any]:
    return {
        "name": method.name,
        "summary": method.summary,
        "paper": method.paper,
        "coefficients": method.coefficients,
        "properties": _properties(method),
        "parameters": [
            {"name": p.name, "default": p.default, "domain": p.domain, "meaning": p.meaning} for p in method.parameters
        ],
    }


def _properties(method: Method) -> list[str]:
    names = ("linear", "elementwise", "deterministic", "permutation_invariant", "needs_data")
    return [name.replace("_", " ") for name in names if getattr(method, name)]


def _show(value: float | str | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _version() -> str:
    try:
        return version("mergebound")
    except PackageNotFoundError:
        return "(not installed)"
