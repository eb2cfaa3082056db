"""``mergebound data get --hub``: copies on the Hugging Face hub, fetched into the hub's own cache."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatch

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments.commands.data import NOT_ALL, size_text
from experiments.tasks.vision_data import VisionData
from theory.errors import MergeboundError


def get_from_hub(entries: tuple[VisionData, ...], yes: bool, confirmed: Callable[[bool, str], bool]) -> None:
    """List sizes and licences as the hub states them, ask, and fetch; the hub's library resumes by itself.

    Raises:
        MergeboundError: no network, no such repository, or the extra is not installed.
    """
    from experiments.tasks.hub import fetch, patterns, require
    from experiments.tasks.hub_names import HUB

    require()
    table = Table("data set", "on the hub", "to download", "licence")
    for entry in entries:
        place = HUB[entry.name]
        size, licence = _stated(place.repository, place.revision, patterns((place.train, place.test), place.config))
        table.add_row(entry.name, escape(place.shown), size_text(size), escape(licence))
    console = Console()
    (console if console.is_terminal else Console(width=118)).print(table)
    if not confirmed(yes, "Download into the hub's cache?"):
        raise typer.Exit(NOT_ALL)
    for entry in entries:
        place = HUB[entry.name]
        parts, config = (place.train, place.test), place.config or None
        folder = fetch(place.repository, parts, config, place.revision, None, download=True)
        typer.echo(f"{entry.name}: is in {folder}")


def _stated(repository: str, revision: str | None, wanted: list[str]) -> tuple[int | None, str]:
    """Bytes of the wanted files, None where the hub does not say, and the licence."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().dataset_info(repository, revision=revision, files_metadata=True, timeout=30)
    except Exception as error:  # the hub's library raises a dozen kinds
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
        raise MergeboundError(f"{repository}: the hub does not answer for it ({reason})") from error
    files = [each for each in info.siblings or [] if any(fnmatch(each.rfilename, shape) for shape in wanted)]
    if not files:
        raise MergeboundError(f"{repository}: has no Parquet files of the wanted parts; it may have moved")
    sizes = [each.size for each in files]
    licence = getattr(info.card_data, "license", None) or "not stated"
    return (
        None if None in sizes else sum(size for size in sizes if size is not None),
        ", ".join(licence) if isinstance(licence, list) else str(licence),
    )
