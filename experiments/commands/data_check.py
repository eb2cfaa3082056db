"""``mergebound data check`` and ``data split``: what lies on disk, and the tasks that a seed makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments.commands.data import AsJson, Benchmark, Names, Root, _console, chosen, size_text
from experiments.tasks.dataset import VALIDATION_SHARE, DataSet, ImageTask, split
from experiments.tasks.getting import find_root
from experiments.tasks.images import Images, class_counts
from theory.errors import MergeboundError, nearest

IMAGES = 32
"""Images of each part that ``data check`` reads."""

Hub = Annotated[bool, typer.Option("--hub", help="What `data get --hub` brought, in place of a folder.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Names the split, and the images that are read.")]


@dataclass(frozen=True)
class Source:
    """A data set that was asked for, and how to load it."""

    name: str
    load: Callable[[], DataSet]
    findings: Callable[[DataSet], list[tuple[str, str]]]


def check_command(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Data sets by name, npz8:NAME, or .npz files and folders of your own.", show_default=False),
    ] = None,
    benchmark: Benchmark = None,
    root: Root = None,
    images: Annotated[int, typer.Option("--images", min=0, help="Images of each part to read.")] = IMAGES,
    seed: Seed = 0,
    hub: Hub = False,
    as_json: AsJson = False,
) -> None:
    """Load data sets, compare class names and counts with the source's, read some images, show each split's digest.

    Exit code 0: all is as published (a count that differs is a warning); 2: something is missing, damaged or of other
    classes, told in one line each.
    """
    records, failed = [], 0
    for source in sources(names, benchmark, root, hub):
        try:
            records.append(checked(source, images, seed))
        except MergeboundError as error:
            failed += 1
            _tell("error", f"{source.name}: {error}" if source.name not in str(error) else str(error))
            records.append({"name": source.name, "error": str(error)})
    if as_json:
        typer.echo(json.dumps(records, indent=2, ensure_ascii=False))
    else:
        _show(records)
        for record in records:
            for level, message in record.get("findings", ()):
                _tell(level, message)
    if failed:
        raise typer.Exit(2)


def split_command(
    names: Names = None,
    benchmark: Benchmark = None,
    root: Root = None,
    seed: Seed = 0,
    validation: Annotated[
        float, typer.Option("--validation", help="Share of the training part, or a number of images from 1 on.")
    ] = VALIDATION_SHARE,
    hub: Hub = False,
    as_json: AsJson = False,
) -> None:
    """Show the training, validation and test images that a seed makes of data sets, with their digest."""
    share: float | int = int(validation) if validation >= 1 and validation == int(validation) else validation
    records = [
        described(split(source.load(), seed=seed, validation=share)) for source in sources(names, benchmark, root, hub)
    ]
    if as_json:
        typer.echo(json.dumps(records, indent=2, ensure_ascii=False))
        return
    _show(records)


def sources(names: list[str] | None, benchmark: str | None, root: Path | None, hub: bool = False) -> list[Source]:
    """What was asked for: a benchmark, names of the catalogue, or paths.

    Raises:
        MergeboundError: unknown name, no root, neither or both given.
    """
    if hub:
        return [_on_the_hub(entry.name) for entry in chosen(names, benchmark, default=None)]
    if benchmark == "npz8":
        if names:
            raise MergeboundError("give names of data sets or --benchmark, not both")
        return _npz8(root)
    if not names:
        return [_published(entry.name, find_root(root)) for entry in chosen(None, benchmark, default=None)]
    found = []
    for name in names:
        if name.startswith(("npz8:", "digits8:")):
            found.append(_of_a_family(name, root))
            continue
        path = Path(name).expanduser()
        own = path.suffix == ".npz" or "/" in name or path.is_dir()
        found.append(_own(path) if own else _published(chosen([name], None, None)[0].name, find_root(root)))
    return found


def checked(source: Source, images: int, seed: int) -> dict[str, Any]:
    """Load one data set, read some images of each part, split it, and say what is found.

    Raises:
        MergeboundError: missing or damaged; names the file.
    """
    data = source.load()
    findings = source.findings(data)
    for level, message in findings:
        if level == "error":
            raise MergeboundError(message)
    read = {}
    for number, (part, whole) in enumerate(sorted(data.parts.items())):
        rng = np.random.default_rng([seed, 0xC4EC, number])
        rows = np.sort(rng.choice(len(whole), size=min(images, len(whole)), replace=False))
        shapes = [_read(whole, int(row)).shape for row in rows]
        read[part] = {"images": len(whole), "read": len(rows), "sizes": _sizes(shapes)}
    return described(split(data, seed=seed)) | {
        "parts": read,
        "class_counts": class_counts(data.parts["train"].labels, data.class_names),
        "findings": findings,
    }


def described(task: ImageTask) -> dict[str, Any]:
    """A split task as plain data."""
    return {
        "name": task.name,
        "classes": task.classes,
        "class_names": list(task.class_names),
        "train": len(task.train),
        "validation": len(task.validation),
        "test": len(task.test),
        "seed": task.seed,
        "digest": task.digest,
    }


def list_npz8(names: list[str] | None, root: Path | None, as_json: bool) -> None:
    """``data list --benchmark npz8``."""
    from experiments.tasks.npz8 import FILES

    try:
        folder: Path | None = find_root(root)
    except MergeboundError:
        folder = None
    records = []
    for file in FILES:
        if names and file.name not in names:
            continue
        path = None if folder is None else folder / f"{file.name}.npz"
        there = path is not None and path.is_file()
        records.append(
            asdict(file) | {"on_disk": there, "bytes": path.stat().st_size if path is not None and there else None}
        )
    if as_json:
        typer.echo(json.dumps(records, indent=2, ensure_ascii=False))
        return
    table = Table("data set", "what", "classes", "train / test", "on disk", "licence", title="npz8: put by hand")
    for record in records:
        disk = "" if folder is None else size_text(record["bytes"]) if record["on_disk"] else "no"
        counts = f"{record['train']:,} / {record['test']:,}"
        cells = (record["title"], str(record["classes"]), counts, disk, record["licence"])
        table.add_row(record["name"], *map(escape, cells))
    _console().print(table)


def _npz8(root: Path | None) -> list[Source]:
    from experiments.tasks.npz8 import FILES

    folder = find_root(root)
    return [_npz8_one(file.name, folder) for file in FILES]


def _npz8_one(name: str, folder: Path) -> Source:
    from experiments.tasks.npz8 import load_one

    return Source(name, lambda: load_one(folder, name), lambda data: [])


def _of_a_family(name: str, root: Path | None) -> Source:
    from experiments.tasks.npz8 import NAMES

    family, _, one = name.partition(":")
    if family == "digits8":
        raise MergeboundError(f"{name}: is made in memory by mergebound, so there is nothing on disk to check")
    if one not in NAMES:
        raise MergeboundError(f"npz8 has no data set {one!r}; {nearest(one, NAMES)}")
    return _npz8_one(one, find_root(root))


def _published(name: str, root: Path) -> Source:
    from experiments.tasks.loading import check, load

    return Source(name, lambda: load(name, root), lambda data: [(each.level, each.message) for each in check(data)])


def _on_the_hub(name: str) -> Source:
    from experiments.tasks.hub import load_published
    from experiments.tasks.loading import check

    def findings(data: DataSet) -> list[tuple[str, str]]:
        """Names are spelt otherwise there, so that only numbers are errors."""
        found = [(each.level, each.message) for each in check(data)]
        return [("warning" if ": class " in message else level, message) for level, message in found]

    return Source(name, lambda: load_published(name), findings)


def _own(path: Path) -> Source:
    from experiments.tasks.local import load_local

    return Source(str(path), lambda: load_local(path), lambda data: [])


def _read(images: Images, row: int) -> np.ndarray:
    array = images.read(row)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] not in (1, 3) or not array.size:
        raise MergeboundError(f"{images.place(row)}: reads as {array.dtype} of shape {array.shape}; get it again")
    return array


def _sizes(shapes: list[tuple[int, ...]]) -> str:
    if not shapes:
        return ""
    low, high = np.min(shapes, axis=0), np.max(shapes, axis=0)
    one = "x".join(str(value) for value in low)
    return one if (low == high).all() else f"{one} to {'x'.join(str(value) for value in high)}"


def _show(records: list[dict[str, Any]]) -> None:
    table = Table("data set", "classes", "train / validation / test", "sizes of images", "digest of the split")
    for record in records:
        if "error" in record:
            table.add_row(record["name"], "", "", "", "[bold]not usable[/]")
            continue
        counts = f"{record['train']:,} / {record['validation']:,} / {record['test']:,}"
        sizes = record.get("parts", {}).get("train", {}).get("sizes", "")
        table.add_row(record["name"], str(record["classes"]), counts, sizes, record["digest"][:16])
    _console().print(table)


def _tell(level: str, message: str) -> None:
    colour = "bold red" if level == "error" else "bold"
    Console(stderr=True).print(f"[{colour}]{level}:[/] {escape(message)}", highlight=False, soft_wrap=True)
