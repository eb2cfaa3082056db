"""What ``mergebound merge`` prints: progress, the plan, a report, a summary as plain data."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from experiments.merge_job import (
    Job,
    group_settings,
)
from merging.config_values import shown, written
from merging.remote_path import shown as shown_path

_LISTED = 4


def progress_line() -> Progress:
    console = Console(stderr=True)
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[moved]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


@dataclass
class Bar:
    """A line that says what is done, and, of merges in chunks, how far and how fast.

    Attributes:
        begun: the share of the merge that an interrupted one had done.
    """

    progress: Progress
    begun: float = 0.0
    task: Any = None

    def stage(self, what: str) -> None:
        """Say what is done now."""
        if self.task is None:
            self.task = self.progress.add_task(what, total=None, moved="")
        self.progress.update(self.task, description=what)

    def counter(self, total: int) -> Callable[[int, int], None]:
        """What :func:`~experiments.merge_job.execute` is given; ``total``: bytes read and written."""
        start: float | None = None

        def count(done: int, of: int) -> None:
            nonlocal start
            share = done / of if of else 1.0
            if start is None:
                self.begun, start = share, time.perf_counter()
            if self.task is not None:
                speed = (share - self.begun) * total / 1e9 / max(time.perf_counter() - start, 1e-3)
                text = f"{share:.0%} of {_bytes(total)}, {speed:.2f} GB/s"
                self.progress.update(self.task, moved=text)

        return count


def speed_of(plan: Mapping[str, Any], seconds: float, begun: float) -> dict[str, Any]:
    """Time and speed of a merge, of which an interrupted one had done the share ``begun``."""
    moved = (plan["read"] + plan["written"]) * (1.0 - begun)
    return {"seconds": seconds, "gigabytes_per_second": moved / 1e9 / max(seconds, 1e-9), "resumed_at": begun or None}


def speed_in_words(speed: Mapping[str, Any]) -> str:
    begun = "" if speed["resumed_at"] is None else f", gone on from {speed['resumed_at']:.0%}"
    return f"{speed['seconds']:.2f} s, {speed['gigabytes_per_second']:.2f} GB/s{begun}"


def print_plan(plan: Mapping[str, Any], left: Sequence[Path]) -> None:
    where = f" of {plan['chunk']:,} entries, {_count(plan['threads'], 'thread')}" if "chunk" in plan else ""
    if plan["device"] != "cpu":
        where += f", whole tensors on {plan['device']}"
    typer.echo(f"merged {plan['how']}{where}:")
    for entry in plan["programs"]:
        passes = f", {_count(entry['passes'], 'pass', 'es')}"
        typer.echo(f"  {entry['program']}: {_count(entry['tensors'], 'tensor')}, {entry['entries']:,} entries{passes}")
    after = "" if plan["seconds"] is None else f", about {plan['seconds']:.2g} s if reading keeps up"
    bound = "up to" if "chunk" in plan else "at least"
    typer.echo(
        f"  {_bytes(plan['read'])} read, {_bytes(plan['written'])} written, {bound} {_bytes(plan['memory'])} of "
        f"memory{after}"
    )
    if left:
        names = _few([path.name for path in left])
        typer.echo(f"left by interrupted merges, to go on from, or removed when a merge is complete: {names}")


def _count(number: int, what: str, plural: str = "s") -> str:
    return f"{number} {what}" + ("" if number == 1 else plural)


def _bytes(count: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count} B"


def summary_of(job: Job, record: dict[str, Any], *, dry_run: bool) -> dict[str, Any]:
    return {
        "out": None if job.spec.out is None else shown_path(job.spec.out),
        "written": not dry_run,
        "bytes": sum(spec.nbytes for spec in job.specs.values()),
        "tensors": {kind: len(getattr(job.parts, kind)) for kind in ("shared", "private", "buffers", "constants")},
        "notes": list(job.spec.notes),
        "groups": group_settings(job),
        **record,
    }


def print_report(job: Job, record: dict[str, Any]) -> None:
    spec, parts = job.spec, job.parts
    size = sum(entry.nbytes for entry in job.specs.values())
    given = "" if spec.mergekit is not None else ", ".join(f"{k}={shown(v)}" for k, v in record["parameters"].items())
    alpha = "".join(f", {name} {_number(value)}" for name, value in (record["coefficients"] or {}).items())
    stored = f"{size / 2**20:.1f} MiB" + (f", {spec.dtype}" if spec.dtype else "")
    experts = "1 expert" if len(spec.experts) == 1 else f"{len(spec.experts)} experts"
    typer.echo(f"{record['method']}{f'({given})' if given else ''} of {experts}{alpha}, {stored}")
    groups = group_settings(job)
    if len(groups) > 1:
        for group in groups:
            _print_group(group, groups)
    typer.echo(f"merged: {len(parts.shared)} shared tensors and {len(parts.buffers)} running statistics")
    if parts.private or parts.constants:
        private = f" ({_few(parts.private)})" if parts.private else ""
        kept = spec.for_expert or spec.private_from or ("the base" if spec.base is not None else min(spec.names))
        typer.echo(f"not merged: {len(parts.private)} private from {kept}{private}, {len(parts.constants)} constants")
    for line in _key_lines(job):
        typer.echo(line)
    for note in spec.notes:
        typer.echo(f"note: {note}")


def _print_group(group: dict[str, Any], groups: list[dict[str, Any]]) -> None:
    first = groups[0]["settings"]
    varying = [key for key in first if any(other["settings"].get(key) != first[key] for other in groups)]
    parts = [f"{key}={shown(group['settings'][key])}" for key in varying]
    parts += [f"{name} {_number(value)}" for name, value in (group["coefficients"] or {}).items()]
    count = len(group["tensors"])
    settings = ", ".join(parts) or "no coefficients"
    typer.echo(f"  {count} tensor{'s' if count > 1 else ''} with {settings}: {_few(group['tensors'])}")


def _key_lines(job: Job) -> list[str]:
    report = job.states.report
    lines = []
    if report.kept:
        lines.append(f"kept as the base has them: {len(report.kept)} ({_few(report.kept)})")
    if report.added:
        lines.append(f"added, since the base lacks them: {len(report.added)} ({_few(tuple(report.added))})")
    lines += [f"left out of {who}: {len(names)} ({_few(names)})" for who, names in report.dropped.items()]
    lines += [f"not in {who}, taken as unmoved: {len(names)} ({_few(names)})" for who, names in report.unmoved.items()]
    if job.aliases:
        lines.append(f"tied: {', '.join(f'{a} = {b}' for a, b in list(job.aliases.items())[:_LISTED])}")
    return lines


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else str(written(value))
