"""The run: every case is measured, printed and written."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

import torch

from benchmarks.cohort_speed.cases import CASES
from benchmarks.cohort_speed.measuring import SEED, Row, absent, remeasured, run_case, smaller
from benchmarks.merge_speed.machine import describe
from experiments.evaluate.cpu import cpu

QUICK = ("logistic", "mlp", "resnet8-gn")


def report(rows: Sequence[Row], facts: dict[str, str]) -> str:
    """The table in Markdown, and why each way was chosen."""
    lines = ["# Cohorts against a plain loop", "", *(f"* {key}: {value}" for key, value in facts.items()), ""]
    lines += [
        "Ratio: time of the plain float32 loop over that of the cohort, the same steps of the same experts from the",
        "same starts, in turns, median of the turns' quotients; the cohort's time holds all of it (gathering, logs,",
        "copies of the final weights).  Seconds are the processor's, of one thread, on a processor, and the clock's on",
        "a GPU.",
        "Differ: largest difference of final weights from the plain loop's, over the largest change of a weight.",
        "",
        "| network | device | precision | experts | batch | steps | way | ratio | asked | over the same precision "
        "| samples/s | memory, plain | memory, cohort | differ |",
        "|---|---|---|---:|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        asked = f"{row.target:g}" if row.target else ""
        if row.remark:
            lines.append(f"| {row.case} | {row.device} | {row.precision} | | | | {row.remark} | | {asked} | | | | | |")
            continue
        differ = f"{row.agreement:.1e}" if row.agreement == row.agreement else ""
        lines.append(
            f"| {row.case} | {row.device} | {row.precision} | {row.experts} | {row.batch} | {row.steps} | {row.way} "
            f"| {row.ratio:.2f} | {asked} | {row.over_same:.2f} | {row.rate:,.0f} | {_memory(row.plain_memory)} "
            f"| {_memory(row.memory)} | {differ} |"
        )
    lines += ["", "Why these ways, from the planner's probe:", ""]
    lines += [f"* {row.case}, {row.device}, {row.precision}: {row.reason}" for row in rows if not row.remark]
    return "\n".join(lines) + "\n"


def _memory(size: float) -> str:
    """MiB for people; nothing where it was not measured."""
    return "" if size != size else f"{size:,.1f} MiB" if size < 100 else f"{size:,.0f} MiB"


def kept(folder: Path, rows: Sequence[Row]) -> list[Row]:
    """The rows that a folder has, those that were measured now in their places (or at the end)."""
    file = folder / "cohort.csv"
    if not file.is_file():
        return list(rows)
    texts = {field.name for field in fields(Row) if field.type == "str"}
    whole = {field.name for field in fields(Row) if field.type == "int"}
    found = {}
    with open(file, newline="", encoding="utf-8") as handle:
        for line in csv.DictReader(handle):
            values = {k: v if k in texts else int(v) if k in whole else float(v) for k, v in line.items()}
            found[line["case"], line["device"], line["precision"]] = Row(**values)  # type: ignore[arg-type]
    return list((found | {(row.case, row.device, row.precision): row for row in rows}).values())


def write(folder: Path, rows: Sequence[Row], facts: dict[str, str]) -> None:
    """``cohort.csv`` and ``tables.md``."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = kept(folder, rows)
    with open(folder / "cohort.csv", "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    (folder / "tables.md").write_text(report(rows, facts), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description="Cohorts of experts against a plain loop.")
    parser.add_argument("--quick", action="store_true", help="two experts, two steps, one round, few networks")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), help="default: all of them")
    parser.add_argument("--precisions", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, help="turns of each; default 5")
    parser.add_argument("--probe-seconds", type=float, help="of each case; default 20")
    parser.add_argument("--out", type=Path, help="folder for the tables")
    parser.add_argument("--memory", action="store_true", help="of the cases in --out, measure the memory alone again")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    facts = describe("python benchmarks/cohort.py" + " --quick" * given.quick, SEED)
    facts["processor"] = str(cpu())
    rounds = given.rounds or (1 if given.quick else 5)
    budget = given.probe_seconds or (1.0 if given.quick else 20.0)
    names = given.cases or (QUICK if given.quick else list(CASES))
    rows: list[Row] = []
    if given.memory and given.out is not None:
        stored = [row for row in kept(given.out, ()) if row.device == "cpu" and row.case in names and not row.remark]
        rows = [remeasured(CASES[row.case], row) for row in stored]
        write(given.out, rows, facts)
        return 0
    for device in ("cpu", "cuda"):
        for name in names:
            case = smaller(CASES[name]) if given.quick else CASES[name]
            for precision in given.precisions:
                if precision == "bfloat16" and case.size == 8:
                    continue  # half precision is for networks that are slow enough
                if device == "cuda" and not torch.cuda.is_available():
                    row = absent(case, precision, device, "no GPU here")
                else:
                    row = run_case(case, precision, device=device, rounds=rounds, probe_seconds=budget)
                rows.append(row)
                print(f"{name}, {device}, {precision}: {row.remark or f'{row.ratio:.2f}'}", file=sys.stderr, flush=True)
    print(report(rows, facts))
    if given.out is not None:
        write(given.out, rows, facts)
    return 0
