"""``mergebound base``: the weights that experts are fine-tuned from: list, get and show them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

_WIDTH = 118
_MOST = 60
CLIP_PREFIX = "clip:"


def register(app: typer.Typer) -> None:
    """Add ``base list``, ``base get`` and ``base show`` to the command line."""
    group = typer.Typer(
        no_args_is_help=True, help="List, download and show bases: the weights that experts are fine-tuned from."
    )
    group.command("list")(list_bases)
    group.command("get")(get_base)
    group.command("show")(show_base)
    app.add_typer(group, name="base")


def list_bases(
    pattern: Annotated[
        str | None,
        typer.Argument(help="Names to list, with * (resnet18*, clip:ViT-B-32*); default: what was used here before."),
    ] = None,
    record: Annotated[Path | None, typer.Option(help="The file of recorded hashes.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """List published weights by name with their licence and whether they are on this machine; nothing is downloaded."""
    from experiments.bases.known_hashes import default_record, read_record

    known = read_record(record or default_record())
    rows = [_recorded(name, entry) for name, entry in known.items()] if pattern is None else _published(pattern, known)
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    if not rows:
        typer.echo(
            "No weights were used on this machine yet; list names with: mergebound base list 'resnet18*'"
            if pattern is None
            else f"timm knows no weights named {pattern!r}; try a shorter pattern with *"
        )
        return
    table = Table("name", "input", "licence", "here", "source", title="Published weights")
    for row in rows[:_MOST]:
        cells = (row["name"], row["input"], row["licence"], row["here"], row["source"])
        table.add_row(*(escape(str(cell)) for cell in cells))
    console = Console()
    (console if console.is_terminal else Console(width=_WIDTH)).print(table)
    if len(rows) > _MOST:
        typer.echo(f"... and {len(rows) - _MOST} more; --json gives them all")


def get_base(
    name: Annotated[str, typer.Argument(help="timm's name (resnet18.a1_in1k), or clip:MODEL:TAG of open_clip.")],
    sha256: Annotated[str | None, typer.Option(help="Expected SHA-256 of the file (its beginning is enough).")] = None,
    cache: Annotated[Path | None, typer.Option(help="Where to keep it (default: the usual caches).")] = None,
    record: Annotated[Path | None, typer.Option(help="The file that its hash is recorded in.")] = None,
) -> None:
    """Download published weights once, check them, and record their hash; later uses compare with it.

    Without a published or given SHA-256 the first use is trusted.
    """
    from experiments.bases import pretrained

    if name.startswith(CLIP_PREFIX):
        from experiments.bases.clip import load_clip

        model, _, tag = name.removeprefix(CLIP_PREFIX).partition(":")
        clip = load_clip(model, tag=tag or None, download=True, sha256=sha256, cache=cache, record=record)
        _say_got(name, clip.provenance.sha256 or "", clip.provenance.notes[0] if clip.provenance.notes else "", "")
        return
    cfg = pretrained.known(name)
    typer.echo(f"{name}: from {cfg.hf_hub_id or cfg.url}, licence: {cfg.license or 'not stated'}", err=True)
    path, published = pretrained.locate(name, cfg, download=True, cache=cache)
    found, said = pretrained.verified(path, name, sha256, published, record)
    _say_got(name, found, said, str(path))


def show_base(
    file: Annotated[Path, typer.Argument(help="A base that was saved or cached, or any file of weights.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Show where a base comes from and how good it was measured to be; of other files, what they hold."""
    content = describe(file)
    if as_json:
        typer.echo(json.dumps(content, indent=2))
        return
    console = Console()
    table = Table.grid(padding=(0, 2))
    for key, value in _flat(content):
        table.add_row(escape(key), escape(value))
    (console if console.is_terminal else Console(width=_WIDTH)).print(table)


def describe(file: Path) -> dict[str, Any]:
    """What ``base show`` prints.

    Raises:
        MergeboundError: the file cannot be read, or a base whose tensors were changed.
    """
    from experiments.bases.base import read_base
    from merging.checkpoint import file_hash, open_checkpoint

    checkpoint = open_checkpoint(file)
    content: dict[str, Any] = {
        "file": str(file),
        "bytes": sum(checkpoint.sizes),
        "sha256": file_hash(file),
        "tensors": len(checkpoint),
        "parameters": sum(spec.numel for spec in checkpoint.specs.values() if spec.floating),
    }
    if "base" in checkpoint.metadata:
        base = read_base(file)
        said = base.describe()
        said.pop("names")
        content["base"] = said
    else:
        content["base"] = None
    return content


def _flat(content: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            rows += _flat(value, f"{name}.")
        elif name == "base" and value is None:
            rows.append((name, "no record: read it as a checkpoint, with the architecture that it belongs to"))
        elif isinstance(value, list | tuple):
            rows.append((name, "; ".join(map(str, value)) or "none"))
        else:
            rows.append((name, "not known" if value is None else str(value)))
    return rows


def _say_got(name: str, sha256: str, said: str, path: str) -> None:
    for line in (f"{name} is here" + (f": {path}" if path else ""), f"sha256 {sha256}", said):
        if line:
            typer.echo(line)


def _recorded(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "input": "",
        "licence": "",
        "here": "yes" if Path(str(entry.get("source", ""))).exists() else "no",
        "source": entry.get("source", ""),
        "sha256": entry["sha256"],
        "date": entry.get("date", ""),
    }


def _published(pattern: str, known: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    if pattern.startswith(CLIP_PREFIX):
        return _published_clip(pattern.removeprefix(CLIP_PREFIX), known)
    import timm

    from experiments.bases.base import BaseError
    from experiments.bases.pretrained import locate

    rows = []
    for name in timm.list_models(pattern, pretrained=True):
        cfg = timm.get_pretrained_cfg(name)
        try:
            here = str(locate(name, cfg, download=False)[0])
        except BaseError:
            here = ""
        rows.append(
            {
                "name": name,
                "input": "x".join(map(str, cfg.input_size)),
                "licence": cfg.license or "not stated",
                "here": "yes" if here else "no",
                "source": cfg.hf_hub_id or cfg.url or "",
                "sha256": known.get(name, {}).get("sha256", ""),
            }
        )
    return rows


def _published_clip(pattern: str, known: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    from fnmatch import fnmatch

    from experiments.bases.clip import library

    open_clip = library()
    rows = []
    for model, tag in open_clip.list_pretrained():
        name = f"{model}:{tag}"
        if fnmatch(name, pattern) or fnmatch(model, pattern):
            cfg = open_clip.get_pretrained_cfg(model, tag)
            entry = known.get(name, {})
            rows.append(
                {
                    "name": f"{CLIP_PREFIX}{name}",
                    "input": "",
                    "licence": "see the source",
                    "here": "yes" if Path(str(entry.get("source", "-"))).exists() else "no",
                    "source": cfg.get("hf_hub") or cfg.get("url") or "",
                    "sha256": entry.get("sha256", ""),
                }
            )
    return rows
