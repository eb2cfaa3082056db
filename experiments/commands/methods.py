"""``mergebound methods``: what there is to merge with."""

from __future__ import annotations

import inspect
import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from merging.config_values import shown
from merging.method import Method, Parameter
from merging.registry import builtin_methods, get, methods

_PROPERTIES = (
    "linear",
    "elementwise",
    "tensorwise",
    "permutation_invariant",
    "idempotent",
    "lipschitz",
    "deterministic",
    "merges_buffers",
    "needs_base",
    "needs_data",
)
_WIDTH = 118


def register(app: typer.Typer) -> None:
    """Add ``methods`` to the command line."""
    app.command("methods")(list_methods)


def list_methods(
    name: Annotated[
        str | None, typer.Argument(help="One method, with its full documentation.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the list as a Markdown table.")] = False,
) -> None:
    """List the merging methods with their parameters, properties and papers; `mergebound methods ties` explains one."""
    if name is not None:
        method = get(name)
        if as_json:
            typer.echo(json.dumps(describe_method(method) | {"documentation": documentation(method)}, indent=2))
        else:
            _explain(method, name)
        return
    if as_json:
        typer.echo(json.dumps([describe_method(method) for method in methods().values()], indent=2))
        return
    if as_markdown:
        typer.echo(markdown_table())
        return
    table = Table("method", "what it does, and its parameters (--set name=value)", show_lines=True)
    for method in methods().values():
        lines = [
            f"[bold]{escape(method.summary)}[/]",
            *(escape(f"{p.name}={shown(p.default)}, in {p.domain}: {p.meaning}") for p in method.parameters),
            f"--alpha: {method.coefficients}",
            f"[dim]{', '.join(properties(method))}; {escape(method.paper)}[/]",
        ]
        table.add_row(method.name, "\n".join(lines))
    console = Console()
    console.print(table) if console.is_terminal else Console(width=_WIDTH).print(table)


def markdown_table() -> str:
    """The package's own methods as a Markdown table: name, summary, settings, properties, treatment of files, paper."""
    rows = ["| method | what it does | settings (default first) | declared | files | source |", "|---" * 6 + "|"]
    for method in builtin_methods().values():
        settings = "; ".join(
            f"`{p.name}`={' / '.join([str(p.default), *(c for c in p.choices if c != p.default)])}"
            if p.choices
            else f"`{p.name}`={shown(p.default)}"
            for p in method.parameters
        )
        alpha = {"none": "", "optional": "coefficients", "required": "**coefficients**"}[method.coefficients]
        listed = "; ".join(part for part in (settings, alpha) if part) or "–"
        rows.append(
            f"| `{method.name}` | {method.summary} | {listed} | {', '.join(properties(method))} | {way(method)} "
            f"| {method.paper} |"
        )
    return "\n".join(rows)


def way(method: Method) -> str:
    """How large files are merged: in chunks, tensor by tensor or in memory, and which settings change that."""
    usual = _way(method, {})
    tried: list[dict[str, Any]] = [
        {p.name: choice} for p in method.parameters for choice in p.choices if choice != p.default
    ]
    if any(p.name == "density" and p.default == 1.0 for p in method.parameters):
        tried += [{"density": 0.5}, *({"density": 0.5} | settings for settings in tried if "scope" in settings)]
    others: dict[str, list[str]] = {}
    for settings in tried:
        found = _way(method, settings)
        if found != usual:
            said = (f"{key}<1" if isinstance(value, float) else f"{key}={value}" for key, value in settings.items())
            others.setdefault(found, []).append(f"`{' '.join(said)}`")
    return usual + "".join(f"; {found} with {', '.join(settings)}" for found, settings in others.items())


def _way(method: Method, settings: dict[str, Any]) -> str:
    """The same for one choice of settings, as the engine sees it."""
    from torch import zeros

    from merging.partition import Partition
    from merging.settings import resolve
    from merging.streaming.build import build
    from merging.tensorwise import Stream

    state = {"blocks.0.weight": zeros(2, 2)}
    names = [str(number) for number in range(max(2, method.experts[0]))]
    coefficients = None if method.coefficients == "none" else [1.0] * len(names)
    parts = Partition(tuple(state))
    groups = resolve(method, parts.shared, settings, coefficients, (), names)
    batches = build(Stream(method, state, state, dict.fromkeys(names, state), parts, tuple(groups), 0))
    if batches is None:
        return "in memory"
    return "tensor by tensor" if any(batch.program is None for batch in batches) else "in chunks"


def describe_method(method: Method) -> dict[str, Any]:
    """A method as plain data."""
    least, most = method.experts
    return {
        "name": method.name,
        "summary": method.summary,
        "paper": method.paper,
        "coefficients": method.coefficients,
        "experts": {"least": least, "most": most},
        "properties": properties(method),
        "gives_back_experts": method.localized is not None,
        "statistics": [extra for extra in method.extras if method.needs_data],
        "parameters": [
            {"name": p.name, "default": p.default, "domain": p.domain, "meaning": p.meaning} for p in method.parameters
        ],
        "example": example(method),
    }


def properties(method: Method) -> list[str]:
    """The properties that a method declares, in words."""
    found = {name: bool(getattr(method, name)) for name in _PROPERTIES}
    found["tensorwise"] = method.is_tensorwise({p.name: p.default for p in method.parameters})
    return [name.replace("_", " ") for name, holds in found.items() if holds]


def documentation(method: Method) -> str:
    """The method's docstring."""
    return inspect.getdoc(method.function) or method.summary


def example(method: Method, name: str | None = None) -> str:
    """A command line that runs the method on two experts."""
    if "evaluate" in method.extras:
        return f"from Python: merge_state_dicts('{method.name}', base, experts, scores=[...], evaluate=...)"
    parts = ["mergebound merge", f"--method {name or method.name}", "--base B.safetensors"]
    parts.append(" ".join(f"E{index}.safetensors" for index in range(1, max(2, method.experts[0]) + 1)))
    parts.append("--out O.safetensors")
    if method.coefficients == "required":
        parts.append("--statistics C.safetensors" if method.needs_data else "--alpha 0.6,0.4")
    elif method.needs_data:
        parts.append("--statistics F1.safetensors --statistics F2.safetensors")
    parts += [f"--set {p.name}={shown(p.default)}" for p in _telling(method)]
    if method.localized is not None:
        parts.append("--for-expert E1")
    return " ".join(parts)


def _telling(method: Method) -> list[Parameter]:
    numbers = [p for p in method.parameters if not p.choices and not isinstance(p.default, bool)]
    return (numbers or list(method.parameters))[:2]


def _explain(method: Method, name: str) -> None:
    least, most = method.experts
    wanted = f"{least} experts" if least == most else f"{least} experts or more" if most is None else f"{least}-{most}"
    typer.echo(f"{method.name}: {method.summary}\n{method.paper}\n")
    typer.echo(documentation(method))
    typer.echo(f"\nproperties: {', '.join(properties(method)) or 'none'}; merges {wanted}")
    typer.echo(f"per-expert coefficients (--alpha): {method.coefficients}")
    if method.parameters:
        typer.echo("parameters (--set name=value, or name@REGEX=value for some tensors):")
    for p in method.parameters:
        typer.echo(f"  {p.name}={shown(p.default)}, in {p.domain}: {p.meaning}")
    typer.echo(f"\nexample:\n  {example(method, name)}")
