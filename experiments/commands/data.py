"""``mergebound data``: which data sets there are, getting them, and checking what lies on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments.tasks.getting import Standing, check_room, find_root, get, standing
from experiments.tasks.vision_data import Archive, VisionData
from theory.errors import MergeboundError

Names = Annotated[list[str] | None, typer.Argument(help="Data sets, in any usual spelling.", show_default=False)]
Benchmark = Annotated[
    str | None, typer.Option("--benchmark", help="All data sets of a benchmark: 8, 14, 20 or npz8.", show_default=False)
]
Root = Annotated[
    Path | None,
    typer.Option("--root", help="Folder of the data sets. Default: MERGEBOUND_DATA.", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print as JSON.")]

_WIDTH = 118
NOT_ALL = 1
"""Exit code of ``data get`` where something has to be done by hand, or was declined."""


def register(app: typer.Typer) -> None:
    """Add ``data list``, ``data get``, ``data check`` and ``data split`` to the command line."""
    from experiments.commands.data_check import check_command, split_command

    group = typer.Typer(
        name="data",
        help="Data sets: what there is, getting it, checking it.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
    )
    group.command("list")(list_command)
    group.command("get")(get_command)
    group.command("check")(check_command)
    group.command("split")(split_command)
    app.add_typer(group)


def list_command(
    names: Names = None,
    benchmark: Benchmark = None,
    root: Root = None,
    hub: Annotated[bool, typer.Option("--hub", help="Show where each lies on the Hugging Face hub.")] = False,
    as_json: AsJson = False,
) -> None:
    """List data sets: classes, images, bytes to download, licence, and what lies on disk. Nothing is downloaded.

    Names are shown with all that is known. Without `--root` and MERGEBOUND_DATA, the column "on disk" is empty.
    """
    if benchmark == "npz8":
        from experiments.commands.data_check import list_npz8

        list_npz8(names, root, as_json)
        return
    entries = chosen(names, benchmark, default="20")
    folder = _root_or_none(root)
    if as_json:
        typer.echo(json.dumps([described(entry, folder) for entry in entries], indent=2, ensure_ascii=False))
        return
    console = _console()
    console.print(_hub_table(entries) if hub else _table(entries, folder))
    for entry in entries if names else ():
        console.print(_details(entry), soft_wrap=True, highlight=False)


def get_command(
    names: Names = None,
    benchmark: Benchmark = None,
    root: Root = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Download without asking.")] = False,
    keep_archives: Annotated[
        bool, typer.Option("--keep-archives", help="Keep what was downloaded in ROOT/.mergebound/NAME.")
    ] = False,
    hub: Annotated[
        bool, typer.Option("--hub", help="From the Hugging Face hub into its own cache (needs the extra hub).")
    ] = False,
) -> None:
    """Download data sets, after listing what would come, its size and its licence, and asking.

    Interrupted at any moment, the same command goes on where it stopped. Exit code 0: all is there; 1: something has
    to be placed by hand (the instructions are printed) or the answer was no; 2: an error.
    """
    entries = chosen(names, benchmark, default=None)
    if hub:
        from experiments.commands.data_hub import get_from_hub

        get_from_hub(entries, yes, confirmed)
        return
    folder = find_root(root)
    found = [standing(entry, folder) for entry in entries]
    wanted = [each for each in found if not each.complete and each.entry.archives]
    manual = [each for each in found if not each.complete and not each.entry.archives]
    console = _console()
    if wanted:
        console.print(_to_come(wanted))
        check_room(wanted)
        if not confirmed(yes, f"Download into {folder}?"):
            raise typer.Exit(NOT_ALL)
    failed = sum(not _get_one(each, keep_archives) for each in wanted)
    for each in found:
        if each.complete:
            typer.echo(f"{each.entry.name}: is in {folder}")
    for each in manual:
        typer.echo(f"{each.entry.name}: place it by hand in {folder}: {' '.join(each.entry.manual.split())}")
    if failed:
        raise typer.Exit(2)
    if manual:
        raise typer.Exit(NOT_ALL)


def chosen(names: list[str] | None, benchmark: str | None, default: str | None) -> tuple[VisionData, ...]:
    """Entries of the catalogue by name or benchmark.

    Raises:
        MergeboundError: unknown, both or neither.
    """
    from experiments.tasks.catalogue import BENCHMARKS, find, vision

    if names and benchmark:
        raise MergeboundError("give names of data sets or --benchmark, not both")
    if names:
        return tuple({entry.name: entry for entry in map(find, names)}.values())
    benchmark = benchmark or default
    if benchmark is None:
        raise MergeboundError("name data sets or give --benchmark 8, 14 or 20; mergebound data list shows the names")
    if benchmark == "npz8":
        raise MergeboundError("npz8: its files are not downloaded; put them into the folder that MERGEBOUND_DATA names")
    if benchmark not in {str(count) for count in BENCHMARKS}:
        raise MergeboundError(f"--benchmark {benchmark}: choose one of {', '.join(map(str, BENCHMARKS))}, npz8")
    return vision(int(benchmark))


def confirmed(yes: bool, question: str) -> bool:
    """Whether to go on: ``--yes``, or the answer at a terminal.

    Raises:
        MergeboundError: there is nobody to ask.
    """
    import sys

    if yes:
        return True
    if not sys.stdin.isatty():
        raise MergeboundError("nothing was downloaded: give --yes where nobody can answer")
    return typer.confirm(question)


def described(entry: VisionData, root: Path | None) -> dict[str, Any]:
    """An entry as plain data, with what lies on disk if there is a root."""
    record: dict[str, Any] = {
        "name": entry.name,
        "title": entry.title,
        "classes": entry.classes,
        "class_names": list(entry.class_names),
        "counts": dict(entry.counts),
        "form": entry.form,
        "licence": entry.licence,
        "citation": entry.citation,
        "homepage": entry.homepage,
        "note": entry.note,
        "bytes": entry.size,
        "archives": [
            {"url": a.url, "mirrors": list(a.mirrors), "bytes": a.size, "md5": a.md5, "sha256": a.sha256}
            for a in entry.archives
        ],
        "manual": entry.manual,
        "hub": _hub_name(entry),
    }
    if root is not None:
        found = standing(entry, root)
        record["on_disk"] = {"root": str(root), "complete": found.complete, "missing": list(found.missing)}
    return record


def size_text(size: int | None) -> str:
    """Bytes for people.

    >>> size_text(39_077_296_924), size_text(512), size_text(None)
    ('39.1 GB', '512 B', 'unknown')
    """
    if size is None:
        return "unknown"
    value, unit = float(size), "B"
    for bigger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, bigger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"


def _root_or_none(root: Path | None) -> Path | None:
    try:
        return find_root(root)
    except MergeboundError:
        return None


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH)


def _on_disk(found: Standing) -> str:
    return "yes" if found.complete else "partly" if found.begun else "no"


def _counts(entry: VisionData) -> str:
    return " / ".join(f"{entry.counts[part]:,}" for part in ("train", "validation", "test") if part in entry.counts)


def _table(entries: tuple[VisionData, ...], root: Path | None) -> Table:
    table = Table("data set", "classes", "train / validation / test", "download", "on disk", "licence")
    for number in (1, 2, 3):
        table.columns[number].justify = "right"
    for entry in entries:
        size = size_text(entry.size) if entry.archives else "by hand"
        disk = "" if root is None else _on_disk(standing(entry, root))
        table.add_row(entry.name, str(entry.classes), _counts(entry), size, disk, escape(entry.licence))
    return table


def _hub_table(entries: tuple[VisionData, ...]) -> Table:
    from experiments.tasks.hub_names import HUB

    table = Table("data set", "on the hub", "image", "label", "train / test", "note")
    for entry in entries:
        place = HUB[entry.name]
        parts = f"{place.train} / {place.test}"
        table.add_row(entry.name, escape(place.shown), place.image, place.label, parts, place.note)
    return table


def _hub_name(entry: VisionData) -> str:
    from experiments.tasks.hub_names import HUB

    return HUB[entry.name].shown if entry.name in HUB else ""


def _details(entry: VisionData) -> str:
    lines = [f"[bold]{escape(entry.title)}[/]: {entry.classes} classes; {escape(entry.form)}"]
    lines += [f"  cite: {escape(entry.citation)}", f"  source: {escape(entry.homepage)}"]
    lines += [f"  note: {escape(' '.join(entry.note.split()))}"] if entry.note else []
    lines += [f"  by hand: {escape(' '.join(entry.manual.split()))}"] if entry.manual else []
    lines += [f"  file: {escape(a.url)} ({size_text(a.size)})" for a in entry.archives]
    lines += ["  classes: " + escape(", ".join(entry.class_names))] if entry.class_names else []
    return "\n".join(lines)


def _to_come(wanted: list[Standing]) -> Table:
    table = Table("data set", "files", "to download", "licence", title="To download", title_justify="left")
    total = 0
    for each in wanted:
        total += each.to_download or 0
        files = str(len(each.wanted))
        table.add_row(each.entry.name, files, size_text(each.to_download), escape(each.entry.licence))
    if len(wanted) > 1:
        more = " and more" if any(each.to_download is None for each in wanted) else ""
        table.add_row("together", "", size_text(total) + more, "", style="bold")
    return table


def _get_one(each: Standing, keep: bool) -> bool:
    """Get one data set; an error is told in one line, so that the others can follow."""
    errors = Console(stderr=True)
    try:
        if errors.is_terminal:
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
            with Progress(*columns, console=errors, transient=True) as shown:
                bars: dict[Archive, Any] = {}

                def tell(archive: Archive, now: Any) -> None:
                    if archive not in bars:
                        bars[archive] = shown.add_task(archive.filename, total=now.total)
                    shown.update(bars[archive], completed=now.done, total=now.total)

                get(each.entry, each.root, keep_archives=keep, progress=tell)
        else:
            get(each.entry, each.root, keep_archives=keep)
    except MergeboundError as error:
        errors.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return False
    typer.echo(f"{each.entry.name}: is in {each.root}")
    return True
