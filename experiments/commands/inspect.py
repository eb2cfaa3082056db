"""``mergebound inspect``: what is in a checkpoint, without loading it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from merging.checkpoint import Checkpoint, open_checkpoint
from merging.errors import CheckpointError
from merging.fingerprint import HASHES
from merging.layers import layers_of
from merging.partition import DEFAULT_PRIVATE, partition
from merging.remote_path import shown, url_of

_KINDS = ("shared", "private", "buffers", "constants")
_WIDTH = 118


def register(app: typer.Typer) -> None:
    """Add ``inspect`` to the command line."""
    app.command("inspect")(inspect_checkpoint)


def inspect_checkpoint(
    path: Annotated[Path, typer.Argument(help="A checkpoint file, an index of shards, or a folder.")],
    private: Annotated[
        list[str] | None,
        typer.Option(
            "--private",
            help="Glob pattern of private tensors (heads); repeatable; `''` for none. Default: "
            f"{', '.join(f'`{pattern}`' for pattern in DEFAULT_PRIVATE)}.",
        ),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Read all values and count NaN and infinite ones.")] = False,
    verify: Annotated[
        list[Path] | None,
        typer.Option(
            "--verify",
            help="A checkpoint, or a folder of them: are they the sources that a merge records? Repeatable.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
    as_config: Annotated[
        bool, typer.Option("--as-config", help="Print the recorded merge as a file for `mergebound merge --config`.")
    ] = False,
) -> None:
    """Show a checkpoint's tensors, their kinds and layers, and how it was made: `mergebound inspect O.safetensors`.

    Exit code 1 if `--check` finds NaN or infinite values, or if `--verify` finds another file than the recorded one.
    """
    checkpoint = open_checkpoint(path)
    if as_config:
        typer.echo(configuration(checkpoint), nl=False)
        return
    report = inspection(checkpoint, DEFAULT_PRIVATE if private is None else tuple(p for p in private if p), check=check)
    if verify:
        report["sources"] = verify_sources(checkpoint, verify)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _print(report)
    spoiled = check and any(entry["not_finite"] for entry in report["tensors"])
    replaced = any(source["verdict"] == "different" for source in report.get("sources", ()))
    raise typer.Exit(1 if spoiled or replaced else 0)


def configuration(checkpoint: Checkpoint) -> str:
    """The recorded merge as YAML for ``mergebound merge --config``; sources are the recorded file names.

    Raises:
        CheckpointError: the checkpoint records no merge, or one that came from a mergekit file.
    """
    record = checkpoint.metadata
    if "method" not in record or "experts" not in record:
        raise CheckpointError(
            f"{shown(checkpoint.path)}: no merge is recorded in it: only merges of mergebound can be repeated"
        )
    if "mergekit" in record:
        raise CheckpointError(f"{shown(checkpoint.path)}: it was merged from a mergekit file: repeat it with that file")
    kept = {key: record.get(key) for key in ("private", "private_from", "policy", "seed", "dtype", "for_expert")}
    content = {
        "method": record["method"],
        "base": (record.get("base") or {}).get("file"),
        "experts": [{"file": expert["file"], "name": expert["name"]} for expert in record["experts"]],
        "settings": record.get("parameters") or None,
        "alpha": record.get("coefficients"),
        "rules": record.get("rules") or None,
        "statistics": [source["file"] for source in record.get("statistics", ())] or None,
        **kept,
    }
    given = {key: value for key, value in content.items() if value is not None}
    return "# paths are relative to this file; add out:, or --out\n" + yaml.safe_dump(given, sort_keys=False)


def inspection(checkpoint: Checkpoint, private: tuple[str, ...], *, check: bool) -> dict[str, Any]:
    """Everything that ``inspect`` shows, as plain data.

    Raises:
        CheckpointError: the checkpoint cannot be read, or its record is damaged.
    """
    kinds: dict[str, str] = {}
    try:
        parts = partition(checkpoint, private)
        kinds = {name: kind for kind in _KINDS for name in getattr(parts, kind)}
    except CheckpointError:  # nothing to merge, or complex tensors: still worth a look
        pass
    layers = layers_of(checkpoint.names)
    tied = {name: group[0] for group in checkpoint.tied for name in group[1:]}
    tensors = [
        {
            "name": name,
            "shape": list(spec.shape),
            "dtype": str(spec.dtype).removeprefix("torch."),
            "bytes": spec.nbytes,
            "kind": kinds.get(name, "not mergeable"),
            "layer": layers.index[name],
            "tied_to": tied.get(name),
            **({"not_finite": _not_finite(checkpoint, name)} if check else {}),
        }
        for name, spec in checkpoint.specs.items()
    ]
    return {
        "path": shown(checkpoint.path),
        "files": [
            {"file": file.name, "bytes": size} for file, size in zip(checkpoint.files, checkpoint.sizes, strict=True)
        ],
        "tensors": tensors,
        "totals": {
            "tensors": len(tensors),
            "parameters": sum(math.prod(spec.shape) for spec in checkpoint.specs.values()),
            "bytes": checkpoint.nbytes,
            "layers": layers.count,
            "kinds": {kind: sum(entry["kind"] == kind for entry in tensors) for kind in _KINDS},
        },
        "metadata": checkpoint.metadata,
    }


def verify_sources(checkpoint: Checkpoint, candidates: list[Path]) -> list[dict[str, Any]]:
    """Compare the hashes that a merge recorded with files.

    Args:
        checkpoint: a merge.
        candidates: checkpoints, and folders that hold them under their recorded names.

    Returns:
        Per recorded source: its role and file, ``verdict`` (``same``; ``alike``, where headers and samples agree and
        the merge recorded no more; ``different``; ``not found``), and where the file was found.

    Raises:
        CheckpointError: nothing was recorded, or a candidate does not exist.
    """
    for candidate in candidates:
        if url_of(candidate) is not None:
            raise CheckpointError(f"{shown(candidate)}: sources are compared with local files: download it first")
    record = checkpoint.metadata
    sources = [("base", record.get("base")), *(("expert", entry) for entry in record.get("experts") or ())]
    sources += [("statistics", entry) for entry in record.get("statistics") or ()]
    recorded = [
        (role, entry, key)
        for role, entry in sources
        if isinstance(entry, Mapping)
        for key in [next((key for key in HASHES if key in entry), None)]
        if key is not None
    ]
    if not recorded:
        raise CheckpointError(
            f"{shown(checkpoint.path)}: no sources are recorded in it: name a file that mergebound wrote"
        )
    hashes: dict[tuple[Path, str], str] = {}

    def hashed(path: Path, key: str) -> str:
        if (path, key) not in hashes:
            hashes[path, key] = HASHES[key](path)
        return hashes[path, key]

    for candidate in candidates:
        if not candidate.exists():
            raise CheckpointError(f"{candidate}: there is no such file or folder: check the path")
    found = []
    for role, entry, key in recorded:
        places = [c for c in candidates if c.name == entry["file"]]
        places += [c / entry["file"] for c in candidates if c.is_dir() and (c / entry["file"]).exists()]
        same = next((place for place in places if hashed(place, key) == entry[key]), None)
        if same is None:
            files = [c for c in candidates if c.is_file()]
            same = next((place for place in files if hashed(place, key) == entry[key]), None)
        agrees = "same" if key == "sha256" else "alike"
        verdict = agrees if same is not None else "different" if places else "not found"
        place = same if same is not None else places[0] if places else None
        found.append(
            {
                "role": role,
                "name": entry.get("name"),
                "file": entry["file"],
                "verdict": verdict,
                "found": None if place is None else str(place),
            }
        )
    return found


def _not_finite(checkpoint: Checkpoint, name: str) -> int:
    if not checkpoint.specs[name].floating:
        return 0
    tensor = checkpoint[name]
    wide = tensor.to(torch.float32) if tensor.dtype.itemsize == 1 else tensor  # float8 has no isfinite
    return int(torch.isfinite(wide).logical_not().sum())


def _print(report: dict[str, Any]) -> None:
    checked = any("not_finite" in entry for entry in report["tensors"])
    table = Table(box=None, pad_edge=False)
    table.add_column("tensor", overflow="fold")
    for column in ("shape", "type", "size", "kind", "layer", *(("not finite",) if checked else ())):
        table.add_column(column, no_wrap=True)
    for entry in report["tensors"]:
        tied = f" (tied to {entry['tied_to']})" if entry["tied_to"] else ""
        table.add_row(
            escape(entry["name"] + tied),
            "x".join(map(str, entry["shape"])) or "scalar",
            entry["dtype"],
            size(entry["bytes"]),
            entry["kind"],
            "-" if entry["layer"] is None else str(entry["layer"]),
            *((str(entry["not_finite"]) if entry["not_finite"] else "-",) if checked else ()),
        )
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDTH)
    console.print(table)
    totals = report["totals"]
    kinds = ", ".join(f"{count} {kind}" for kind, count in totals["kinds"].items() if count)
    files = f" in {len(report['files'])} files" if len(report["files"]) > 1 else ""
    typer.echo(
        f"{totals['tensors']} tensors ({kinds or 'none that can be merged'}), {totals['parameters']:,} entries, "
        f"{size(totals['bytes'])}{files}, {totals['layers']} layers"
    )
    record = report["metadata"]
    if record:
        _print_record(record)
    for source in report.get("sources", ()):
        where = f" at {source['found']}" if source["found"] else ""
        typer.echo(f"{source['role']} {source['file']}: {source['verdict']}{where}")


def _print_record(record: Mapping[str, Any]) -> None:
    if "method" in record:
        given = ", ".join(f"{key}={value}" for key, value in (record.get("parameters") or {}).items())
        typer.echo(f"made by {record.get('tool', '?')}: {record['method']}{f'({given})' if given else ''}")
        base = record.get("base")
        if isinstance(base, Mapping):
            typer.echo(f"  base {base.get('file')}, {_hash(base)}")
        for entry in record.get("experts") or ():
            weight = (record.get("coefficients") or {}).get(entry.get("name"))
            alpha = "" if weight is None else f", coefficient {weight}"
            typer.echo(f"  expert {entry.get('file')}, {_hash(entry)}{alpha}")
        rest = {k: v for k, v in record.items() if k not in _SHOWN and v not in (None, [], {})}
    else:
        rest = dict(record)
    for key, value in rest.items():
        text = value if isinstance(value, str) else json.dumps(value)
        typer.echo(f"  {key}: {text[:400]}{'...' if len(text) > 400 else ''}")


def _hash(entry: Mapping[str, Any]) -> str:
    if "url" in entry and not any(key in entry for key in HASHES):
        return f"{entry['url']}, {entry.get('size')} bytes"
    key = next((key for key in HASHES if key in entry), "sha256")
    return f"{key} {str(entry.get(key))[:16]}..."


_SHOWN = ("tool", "method", "parameters", "base", "experts", "coefficients")


def size(count: int) -> str:
    """Bytes for people: ``12 B``, ``3.4 MiB``."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} B"
