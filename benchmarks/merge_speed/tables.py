"""From runs to tables: medians, ratios to ours, CSV and Markdown."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from math import isnan
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.merge_speed.agreement import Agreement
from benchmarks.merge_speed.cases import CASES, FLOOR, OURS
from benchmarks.merge_speed.run import Run

Row = dict[str, Any]
_KEY = ("dtype", "parameters", "experts", "case", "threads")


def summarise(runs: Sequence[Run]) -> list[Row]:
    """One row per merge and tool, in the order of the runs.

    Columns: ``cpu``, ``user``, ``system`` (seconds, warm), ``wall_warm``, ``wall_cold`` (seconds), ``rate_warm``,
    ``rate_cold`` (GB/s of inputs and output), ``memory`` (GB of anonymous memory above the level after imports,
    largest of all runs), ``whole_cpu``, ``whole_wall``, ``whole_memory`` (the process from start to end), ``resident``
    (largest share of the inputs that was in the page cache before a cold run), ``resident_warm`` (smallest before a
    warm one), ``cpu_ratio`` (CPU seconds over ours), ``floor_warm`` and
    ``floor_cold`` (wall time over the floor's), ``runs`` and ``error``.  Times are medians; NaN
    where there are none.
    """
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault((*(getattr(run, key) for key in _KEY), run.tool), []).append(run)
    rows = [_row(group) for group in groups.values()]
    index = {(*(row[key] for key in _KEY), row["tool"]): row for row in rows}
    for row in rows:
        place = tuple(row[key] for key in _KEY)
        ours, floor = index.get((*place, OURS)), index.get((*place, FLOOR))
        row["cpu_ratio"] = _ratio(row, ours, "cpu")
        row["floor_warm"] = _ratio(row, floor, "wall_warm")
        row["floor_cold"] = _ratio(row, floor, "wall_cold")
    return rows


def _row(group: Sequence[Run]) -> Row:
    first = group[0]
    good = {
        state: [run for run in group if run.state == state and not run.error] for state in ("warm", "cold", "whole")
    }
    measured = [*good["warm"], *good["cold"]]
    warm = good["warm"] or good["cold"]
    row: Row = {key: getattr(first, key) for key in _KEY} | {"tool": first.tool}
    row["cpu"] = _median([run.cpu for run in warm])
    row["user"] = _median([run.user for run in warm])
    row["system"] = _median([run.system for run in warm])
    row["wall_warm"] = _median([run.wall for run in good["warm"]])
    row["wall_cold"] = _median([run.wall for run in good["cold"]])
    row["rate_warm"] = _median([run.rate / 1e9 for run in good["warm"]])
    row["rate_cold"] = _median([run.rate / 1e9 for run in good["cold"]])
    row["memory"] = max((run.above / 1e9 for run in measured), default=float("nan"))
    row["whole_cpu"] = _median([run.cpu for run in good["whole"]])
    row["whole_wall"] = _median([run.wall for run in good["whole"]])
    row["whole_memory"] = max((run.above / 1e9 for run in good["whole"]), default=float("nan"))
    row["resident"] = max((run.resident for run in good["cold"]), default=float("nan"))
    row["resident_warm"] = min((run.resident for run in good["warm"] if not isnan(run.resident)), default=float("nan"))
    row["runs"] = len(measured)
    row["error"] = next((run.error for run in group if run.error), "")
    return row


def _median(values: Sequence[float]) -> float:
    return median(values) if values else float("nan")


def _ratio(row: Row, other: Row | None, key: str) -> float:
    return float("nan") if other is None or not other[key] else row[key] / other[key]


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with the columns of the first."""
    with open(path, "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: _plain(value) for key, value in row.items()})


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return "" if isnan(value) else f"{value:.6g}"
    return value


def raw_rows(runs: Sequence[Run]) -> list[Row]:
    """Every run with all its fields."""
    return [{field.name: getattr(run, field.name) for field in fields(run)} for run in runs]


def agreement_rows(found: Sequence[Agreement]) -> list[Row]:
    """Agreements with their verdicts."""
    return [asdict(item) | {"agrees": item.agrees} for item in found]


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with aligned columns; numbers to the right."""
    table = [list(headings), *map(list, rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(headings))]
    right = [all(_numeric(row[column]) for row in rows) for column in range(len(headings))]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(cells, widths, right, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    rule = "|".join(
        "-" * (width + 1) + (":" if to_right else "-") for width, to_right in zip(widths, right, strict=True)
    )
    return "\n".join([line(headings), f"|{rule}|", *(line(row) for row in rows)]) + "\n"


def _numeric(cell: str) -> bool:
    return not cell or cell == "–" or cell[0].isdigit() or cell[0] == "-"


def number(value: float, digits: int = 2) -> str:
    """A number for people; a dash where there is none."""
    return "–" if isnan(value) else f"{value:.{digits}f}"


def times_table(rows: Sequence[Row]) -> str:
    """The main table of one set of files."""
    body = []
    for row in rows:
        if row["error"] and not row["runs"]:
            body.append([row["case"], row["tool"], *["–"] * 9, row["error"]])
            continue
        body.append(
            [
                row["case"],
                row["tool"],
                number(row["cpu"]),
                "" if row["tool"] in (OURS, FLOOR) else number(row["cpu_ratio"], 1),
                number(row["wall_warm"]),
                number(row["wall_cold"]),
                number(row["rate_warm"]),
                number(row["rate_cold"]),
                number(row["floor_warm"]),
                number(row["floor_cold"]),
                number(row["memory"], 3),
                row["error"],
            ]
        )
    headings = [
        "merge",
        "tool",
        "CPU s",
        "CPU / ours",
        "wall s, warm",
        "wall s, cold",
        "GB/s, warm",
        "GB/s, cold",
        "wall / floor, warm",
        "wall / floor, cold",
        "memory GB",
        "remark",
    ]
    return markdown(headings, body)


def whole_table(rows: Sequence[Row]) -> str:
    """The whole processes, imports included."""
    body = [
        [row["case"], row["tool"], number(row["whole_cpu"]), number(row["whole_wall"]), number(row["whole_memory"], 3)]
        for row in rows
        if not isnan(row["whole_cpu"])
    ]
    return markdown(["merge", "tool", "CPU s", "wall s", "anonymous memory GB"], body)


def agreement_table(found: Sequence[Agreement]) -> str:
    """Whether the tools merged the same."""
    body = [
        [
            item.case,
            item.tool,
            item.dtype,
            f"{item.difference:.2e}",
            f"{item.change:.2e}",
            f"{item.beyond:.1e}",
            f"{item.spread:.5f}",
            ("in distribution" if item.random else "yes") if item.agrees else "NO",
        ]
        for item in found
    ]
    headings = ["merge", "tool", "type", "max difference", "max change", "share beyond", "spread", "agrees"]
    return markdown(headings, body)


def many_table(rows: Sequence[Row]) -> str:
    """Merges per second in memory."""
    body = [
        [
            row["task"],
            str(row["merges"]),
            number(row["per_second"], 0),
            number(row["per_second_wall"], 0),
            number(row["loop_per_second"], 0),
            number(row["ratio"], 1),
        ]
        for row in rows
    ]
    return markdown(["task", "merges", "per CPU second", "per second", "loop, per CPU second", "ratio"], body)


def report(
    rows: Sequence[Row], found: Sequence[Agreement], machine: Mapping[str, str], many: Sequence[Row] = ()
) -> str:
    """The page: machine, how it was measured, a table per set of files, agreement, whole processes."""
    parts = ["# Merging files: what it costs\n", "".join(f"* {key}: {value}\n" for key, value in machine.items()), HOW]
    sets: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        sets.setdefault((row["dtype"], row["parameters"], row["threads"]), []).append(row)
    for (dtype, parameters, threads), members in sets.items():
        experts = max(row["experts"] for row in members)
        threading = "1 thread" if threads == 1 else f"{threads} threads"
        title = f"{parameters / 1e6:.1f}M parameters x {experts} experts, {dtype}, {threading}"
        parts.append(f"## {title}\n\n{times_table(members)}")
        if any(not isnan(row["whole_cpu"]) for row in members):
            parts.append(f"Whole processes, imports included, files warm:\n\n{whole_table(members)}")
        cold = [row["resident"] for row in members if not isnan(row["resident"])]
        if cold:
            parts.append(f"Before cold runs at most {max(cold):.1%} of the inputs were in the page cache (mincore).\n")
        short = [row["resident_warm"] for row in members if row["resident_warm"] < 0.99]
        if short:
            parts.append(
                f"They do not fit the page cache: before warm runs as little as {min(short):.1%} of the inputs was in "
                "it, so that these times are partly the disk's.\n"
            )
    if found:
        parts.append(f"## Do the tools merge the same thing?\n\n{AGREEMENT}\n{agreement_table(found)}")
    used = dict.fromkeys(row["case"] for row in rows)
    notes = "".join(f"* {name}: {CASES[name].note}\n" for name in used if CASES[name].note)
    if notes:
        parts.append(f"## The merges\n\n{notes}")
    if many:
        parts.append(f"## In memory: 8 experts of 100,000 parameters, float32, one thread\n\n{many_table(many)}")
    return "\n".join(parts)


HOW = """
Each run is a process of its own; the tools take turns (A B A B ...) and times are medians. A run imports its tool,
merges tiny files of the same kind (so that compiled kernels are loaded and libraries initialised), and is measured from
there:

* CPU seconds: user and system time of all threads (getrusage; warm runs).
* Wall time: includes flushing the output to the disk (fsync), for every tool.
* Memory: the largest anonymous memory (resident minus file pages, sampled every 10 ms) during the measured merge above
  the level after imports, so including what the warm-up left (loaded kernels).
* Cold: the inputs were evicted from the page cache (posix_fadvise after fsync) before the process started. Caches below
  the operating system (of a disk, of a virtual machine's host) are not: the floor is what cold files cost here.
* GB/s: each input counts once, and the output.
* Floor: reading every input once, then writing as many bytes as one input has, with fsync.
* Ours does what the command line does with quick hashes in its record, its default above 1 GiB of inputs.
* mergekit is run as mergekit-pytorch runs it (state dicts of any architecture), with float32 arithmetic also on
  bfloat16 files. FusionBench's algorithms get models that are mapped files, and the result is saved. A peer that maps
  more writable memory than the machine has left (`--memory`) is stopped: out of memory.
* A tool that takes more than a minute runs twice in each state.
"""

AGREEMENT = """\
The largest absolute difference between a tool's output and ours; the largest change that our merge makes to the base,
as a scale; the share of entries that differ by more than a thousandth of it (bfloat16: a 256th of it and of the entry);
the ratio of the root mean squares of the changes (spread). Tools agree where one entry in 10,000 at most differs so
(TIES's threshold falls between neighbours). In bfloat16 it is 2 %, with the spread within 1 %: differences of bfloat16
weights take few values, many are equal at the threshold, and the tools keep others of them; FusionBench sums in
bfloat16. Random masks agree in distribution only, spread within 1 %.
"""
