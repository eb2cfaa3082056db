"""Every case is measured, printed and written."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import nn

from benchmarks.cohort_speed.plain import Expert, plain_loop
from benchmarks.merge_speed.machine import describe
from benchmarks.merge_speed.meter import measure
from experiments.bases.spec import BaseSpec
from experiments.grid.run_spec import RunSpec
from experiments.measure.twins.pairs import couple, draw_pairs
from experiments.measure.twins.train import train_twins
from experiments.models import build_model
from experiments.models.cifar_resnet import CifarResNet
from experiments.tasks.types import Split

SEED = 0


@dataclass(frozen=True)
class Case:
    """A network and the sizes of its runs; ``plain`` twins are timed in the loop, ``target`` is the ratio asked for."""

    name: str
    build: Callable[[], nn.Module]
    size: int
    channels: int
    n: int
    twins: int
    batch: int
    steps: int
    plain: int
    target: float = 0.0


CASES = {
    case.name: case
    for case in (
        Case("logistic", lambda: build_model("logistic", 10), 8, 1, 1024, 512, 32, 200, 4, 50.0),
        Case("mlp-32", lambda: build_model("mlp_32", 10), 8, 1, 1024, 256, 16, 200, 4, 20.0),
        Case("mlp-64", lambda: build_model("mlp_64", 10), 8, 1, 1024, 256, 16, 200, 4, 20.0),
        Case("mlp-64-batch32", lambda: build_model("mlp_64", 10), 8, 1, 1024, 256, 32, 200, 4),
        Case("resnet20", lambda: CifarResNet(20, 10), 32, 3, 256, 16, 16, 32, 2),
        Case("vit_s1", lambda: build_model("vit_s1", 10, img_size=32), 32, 3, 256, 16, 16, 32, 2),
    )
}


@dataclass(frozen=True)
class Row:
    """What one case gave.

    Attributes:
        case, parameters, n, twins, batch, steps, way, chunk: what was run.
        plain, ours: seconds of the processor per twin, medians; ours holds the base run too.
        ratio, low, high: plain over ours in neighbouring turns: median, smallest and largest.
        shared: share of the twins' steps that the common prefix saves.
        bound, memory: bytes stated and taken above the level before.
        agreement: largest difference of a distance from the plain loop's, over the largest distance.
        target: ratio asked for, 0 for none.
    """

    case: str
    parameters: int
    n: int
    twins: int
    batch: int
    steps: int
    way: str
    chunk: int
    plain: float
    ours: float
    ratio: float
    low: float
    high: float
    shared: float
    bound: int
    memory: int
    agreement: float
    target: float


def run_case(case: Case, rounds: int) -> Row:
    """Measure one case."""
    rng = np.random.default_rng([SEED, 0x7D])

    def data(n: int) -> Split:
        pixels = torch.from_numpy(rng.standard_normal((n, case.channels, case.size, case.size), dtype=np.float32))
        return Split(pixels, torch.from_numpy(rng.integers(0, 10, n)), np.arange(n))

    sample, fresh = data(case.n), data(case.n)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        network = case.build()
    start = {n: t.clone() for n, t in network.state_dict().items()}
    run = RunSpec(
        task="noise", base=BaseSpec(kind="random", architecture=case.name, classes=10), learning_rate=0.01,
        momentum=0.9, weight_decay=1e-4, steps=case.steps, batch_size=case.batch,
    )  # fmt: skip
    from experiments.inputs.shares import nested_subset

    used = nested_subset(case.n, 1.0, run.seed)
    pairs = draw_pairs(case.n, case.n, case.twins, SEED)
    order = torch.from_numpy(np.stack([used[rows] for rows in couple(run, case.n, pairs).rows]))
    expert = Expert(run.learning_rate, run.momentum, run.weight_decay, order)

    def loop(twins: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        found = []
        for t in twins:
            j, other = int(used[pairs.samples[t]]), int(pairs.fresh[t])
            kept, label = sample.images[j].clone(), sample.labels[j].clone()
            sample.images[j], sample.labels[j] = fresh.images[other], fresh.labels[other]
            found += plain_loop(network, [start], [expert], sample.images, sample.labels)
            sample.images[j], sample.labels[j] = kept, label
        return found

    together = train_twins(run, network, start, sample, fresh, pairs)
    names = [name for name, _ in network.named_parameters()]
    base = plain_loop(network, [start], [expert], sample.images, sample.labels)[0]
    some = range(case.plain)
    away = [float(sum((x[n] - base[n]).double().square().sum() for n in names)) ** 0.5 for x in loop(some)]
    agreement = float(np.abs(together.distances[: case.plain, -1, 0] - away).max() / max(max(away), 1e-30))
    turns = []
    for _ in range(rounds):
        one = measure(lambda: loop(some))
        other = measure(lambda: train_twins(run, network, start, sample, fresh, pairs))
        turns.append(((one.user + one.system) / case.plain, (other.user + other.system) / case.twins, other.above))
    ratios = [plain / ours for plain, ours, _ in turns]
    return Row(
        case.name,
        sum(p.numel() for p in network.parameters()),
        *(case.n, case.twins, case.batch, case.steps, together.way, together.room.chunk),
        median(plain for plain, _, _ in turns),
        median(ours for _, ours, _ in turns),
        *(median(ratios), min(ratios), max(ratios)),
        1 - together.trained_steps / (case.twins * case.steps),
        together.room.bytes,
        max(memory for _, _, memory in turns),
        agreement,
        case.target,
    )


def report(rows: Sequence[Row], facts: dict[str, str]) -> str:
    """The table in Markdown."""
    lines = ["# Stability twins against a plain loop over twins", "", *(f"* {k}: {v}" for k, v in facts.items()), ""]
    lines += [
        "Ratio: processor time per twin of the plain float32 loop over that of the batch (base run included), one",
        "thread, in turns, median with the smallest and largest turn.  Heavy ball, 0.9.",
        "",
        "| network | parameters | n | twins | batch | steps | way | chunk | ratio | asked | prefix saves "
        "| memory stated | taken | differ |",
        "|---|---:|---:|---:|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row.case} | {row.parameters:,} | {row.n} | {row.twins} | {row.batch} | {row.steps} | {row.way} "
            f"| {row.chunk} | {row.ratio:.1f} ({row.low:.1f} to {row.high:.1f}) | {row.target or '':} "
            f"| {row.shared:.0%} | {row.bound / 2**20:.1f} MiB | {row.memory / 2**20:.1f} MiB | {row.agreement:.1e} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description="Stability twins against a plain loop.")
    parser.add_argument("--quick", action="store_true", help="few twins, few steps, one round")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, help="turns of each; default 5")
    parser.add_argument("--out", type=Path, help="folder for the tables")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    facts = describe("python benchmarks/twins.py" + " --quick" * given.quick, SEED)
    rows = []
    for name in given.cases:
        case = replace(CASES[name], twins=4, steps=4, plain=2) if given.quick else CASES[name]
        rows.append(run_case(case, given.rounds or (1 if given.quick else 5)))
        print(f"{name}: {rows[-1].ratio:.1f}", file=sys.stderr, flush=True)
    print(report(rows, facts))
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        with open(given.out / "twins.csv", "w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, [field.name for field in fields(Row)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
        (given.out / "tables.md").write_text(report(rows, facts), encoding="utf-8")
    return 0
