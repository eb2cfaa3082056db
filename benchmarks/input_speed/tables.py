"""What is measured, and the tables of it."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path


@dataclass(frozen=True)
class Loading:
    """How fast one way of loading is; ``rate`` in images per second of wall clock time, median of the rounds."""

    inputs: str
    size: int
    views: str
    dtype: str
    workers: str
    rate: float


@dataclass(frozen=True)
class Training:
    """One network on one thread; ``ratio`` is the loader's rate over the training's, ``attached`` see above."""

    network: str
    parameters: int
    size: int
    precision: str
    inputs: str
    loader_rate: float
    training_rate: float
    ratio: float
    attached: float


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    files: int = 384
    arrays: int = 8192
    batch: int = 64
    rounds: int = 5
    seconds: float = 1.0
    processes: bool = True
    networks: tuple[str, ...] = ()


QUICK = Plan(12, 64, 8, 1, 0.0, False, ("mlp", "resnet-1M"))


def bf16_units() -> tuple[str, ...]:
    """The bfloat16 instructions that the processor has, as Linux names them."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ()
    flags = next((line.split(":", 1)[1].split() for line in text.splitlines() if line.startswith("flags")), [])
    return tuple(name for name in ("amx_bf16", "avx512_bf16") if name in flags)


def report(loading: Sequence[Loading], trained: Sequence[Training], facts: dict[str, str]) -> str:
    """The tables in Markdown."""
    lines = ["# Images per second into the network", "", *(f"* {key}: {value}" for key, value in facts.items()), ""]
    lines += ["## Loading", "", "| inputs | size | views | type | workers | images/s |", "|---|---:|---|---|---|---:|"]
    lines += [
        f"| {row.inputs} | {row.size} | {row.views} | {row.dtype} | {row.workers} | {row.rate:,.0f} |"
        for row in loading
    ]
    lines += [
        "",
        "## Training on one thread",
        "",
        "Ratio: the loader's images per second over training's.  Attached: time of training fed by the loader over "
        "time on one repeated batch.",
        "",
        "| network | parameters | size | precision | inputs | loader images/s | training images/s | ratio | attached |",
        "|---|---:|---:|---|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row.network} | {row.parameters:,} | {row.size} | {row.precision} | {row.inputs} | {row.loader_rate:,.0f} "
        f"| {row.training_rate:,.1f} | {row.ratio:.1f} | {row.attached:.3f} |"
        for row in trained
    ]
    slow = [row for row in trained if row.ratio < 1]
    lines += ["", f"{len(trained) - len(slow)} of {len(trained)} trainings consume less than the loader gives."]
    return "\n".join(lines) + "\n"


def write(folder: Path, loading: Sequence[Loading], trained: Sequence[Training], facts: dict[str, str]) -> None:
    """``loading.csv``, ``training.csv`` and ``tables.md``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows, kind in (("loading", loading, Loading), ("training", trained, Training)):
        with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, [field.name for field in fields(kind)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
    (folder / "tables.md").write_text(report(loading, trained, facts), encoding="utf-8")
