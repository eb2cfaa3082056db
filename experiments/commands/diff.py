"""``mergebound diff``: what differs between two checkpoints."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from merging.checkpoint import open_checkpoint
from merging.geometry import Difference, diff
from merging.remote_path import shown
from merging.types import StateDict

_WIDTH = 118


def register(app: typer.Typer) -> None:
    """Add ``diff`` to the command line."""
    app.command("diff")(diff_checkpoints)


def diff_checkpoints(
    a: Annotated[Path, typer.Argument(help="A checkpoint: file, index of shards, or folder.")],
    b: Annotated[Path, typer.Argument(help="Another one.")],
    base: Annotated[
        Path | None,
        typer.Option("--base", help="Compare task vectors (A - base, B - base): their cosine and relative difference."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="List identical tensors too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Compare two checkpoints tensor by tensor: `mergebound diff A.safetensors B.safetensors`.

    Exit code 0 if they hold the same tensors bit for bit (metadata, order and files do not count), 1 if not, 2 if
    something is wrong.
    """
    left, right = open_checkpoint(a), open_checkpoint(b)
    found = diff(left, right)
    vectors = {} if base is None else task_vector_cosines(open_checkpoint(base), left, right)
    if as_json:
        typer.echo(json.dumps(_summary(a, b, base, found, vectors), indent=2, allow_nan=False))
    else:
        _print(found, vectors, everything=everything)
    raise typer.Exit(0 if found.identical else 1)


def task_vector_cosines(base: StateDict, a: StateDict, b: StateDict) -> dict[str, tuple[float, float]]:
    """Cosine of the task vectors ``a - base`` and ``b - base``, and ``|b - a| / |a - base|``, by tensor.

    Only tensors that all three have in one shape; ``"*"`` is over all of them.  NaN where a task vector is zero.
    Computed in float64, one tensor in memory at a time.
    """
    sums: dict[str, Tensor] = {}
    for name in a:
        if name not in b or name not in base:
            continue
        tensors = [state[name].detach() for state in (base, a, b)]
        if len({tensor.shape for tensor in tensors}) > 1 or not all(t.is_floating_point() for t in tensors):
            continue
        origin, left, right = (tensor.reshape(-1).to(torch.float64) for tensor in tensors)
        u, v = left - origin, right - origin
        sums[name] = torch.stack([u @ u, v @ v, u @ v, (v - u) @ (v - u)])
    if not sums:
        return {}
    total = torch.stack(list(sums.values())).sum(dim=0)
    return {"*": _cosine(total)} | {name: _cosine(values) for name, values in sums.items()}


def _cosine(sums: Tensor) -> tuple[float, float]:
    uu, vv, uv, gap = (float(value) for value in sums)
    cosine = max(-1.0, min(1.0, uv / math.sqrt(uu) / math.sqrt(vv))) if uu > 0.0 and vv > 0.0 else math.nan
    relative = math.sqrt(gap / uu) if uu > 0.0 else (0.0 if gap == 0.0 else math.nan)
    return cosine, relative


def _summary(
    a: Path, b: Path, base: Path | None, found: Difference, vectors: dict[str, tuple[float, float]]
) -> dict[str, Any]:
    def of_vectors(name: str) -> dict[str, Any]:
        if name not in vectors:
            return {}
        cosine, relative = vectors[name]
        return {"task_vector_cosine": _plain(cosine), "task_vector_relative": _plain(relative)}

    return {
        "a": shown(a),
        "b": shown(b),
        "base": None if base is None else shown(base),
        "identical": found.identical,
        "same_layout": found.same_layout,
        "max_abs": _plain(found.max_abs),
        "relative": _plain(found.relative),
        "cosine": _plain(found.cosine),
        **of_vectors("*"),
        "only_a": list(found.only_a),
        "only_b": list(found.only_b),
        "reshaped": [{"name": n, "shape_a": list(x), "shape_b": list(y)} for n, x, y in found.reshaped],
        "tensors": [
            {key: list(v) if isinstance(v, tuple) else _plain(v) for key, v in vars(entry).items()}
            | of_vectors(entry.name)
            for entry in found.tensors
        ],
    }


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print(found: Difference, vectors: dict[str, tuple[float, float]], *, everything: bool) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("tensor", overflow="fold")
    columns = ("differing", "largest", "relative", "cosine")
    for column in (*columns, *(("task vectors' cosine", "relative to them") if vectors else ())):
        table.add_column(column, no_wrap=True, justify="right")
    shown = [entry for entry in found.tensors if everything or not entry.identical]
    for entry in shown:
        types = "" if entry.dtype_a == entry.dtype_b else f" ({entry.dtype_a}, {entry.dtype_b})"
        size = math.prod(entry.shape)
        cells = ["identical", "", "", ""]
        if not entry.identical:
            cells = [f"{entry.differing} of {size}", _show(entry.max_abs), _show(entry.relative), _show(entry.cosine)]
        table.add_row(
            escape(entry.name + types),
            *cells,
            *(map(_show, vectors.get(entry.name, (math.nan, math.nan))) if vectors else ()),
        )
    if shown:
        console = Console(highlight=False)
        (console if console.is_terminal else Console(highlight=False, width=_WIDTH)).print(table)
    for label, names in (("only in A", found.only_a), ("only in B", found.only_b)):
        for name in names:
            typer.echo(f"{label}: {name}")
    for name, one, other in found.reshaped:
        typer.echo(f"another shape: {name}, {tuple(one)} in A and {tuple(other)} in B")
    same = sum(entry.identical for entry in found.tensors)
    if found.identical:
        typer.echo(f"identical: all {same} tensors, bit for bit")
        return
    typer.echo(
        f"different: {len(found.tensors) - same} of {len(found.tensors)} common tensors, largest difference "
        f"{_show(found.max_abs)}, relative {_show(found.relative)}, cosine {_show(found.cosine)}"
    )
    if vectors:
        cosine, relative = vectors["*"]
        typer.echo(f"task vectors: cosine {_show(cosine)}, difference relative to A's {_show(relative)}")


def _show(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4g}"
