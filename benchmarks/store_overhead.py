"""What the store costs beside training: for runs of a second, and for runs of a usual length.

    python benchmarks/store_overhead.py [--runs 200] [--quick]

``digits-small``: runs spread over the preset (each is trained for 20 to 40 steps of networks with 650 to 39,000
weights, most of them for milliseconds), trained in cohorts of a fixed plan, measured, and committed as the engines do
it.  ``cifar_resnet20``: a usual run, 200 steps of batches of 32 images of 32x32 pixels, one at a time; training time is
that of 20 steps, times ten.  The store's part is everything that is asked of it and every commit; shares are of
training time (measuring checkpoints counts as neither), by wall time, waiting for the disk included, and by processor
time, which a busy machine stretches less.  ``floor``: the same bytes, in as many files, hashed twice (the name of the
file, the digest of the weights), written and waited for, by themselves: what no store does without.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the packages first, not `merging.py` beside this file
    here, root = Path(__file__).resolve().parent, Path(__file__).resolve().parents[1]
    sys.path[:] = [str(root), *(entry for entry in sys.path if not entry or Path(entry).resolve() != here)]

import torch

from experiments.engines.cohort_job import TOGETHER, Together, known_runs, measured, pieces
from experiments.engines.prepare import prepare, spread
from experiments.engines.workplace import Workplace
from experiments.finetune.cohort.train import train_cohort
from experiments.grid.result import Cohort, Plan
from experiments.grid.run_spec import RunSpec
from experiments.grid.yaml_source import read_grid, read_runs
from experiments.store import Store
from experiments.store.blobs import blob_path

WRITTEN = ("logistic", "mlp")
CHUNK, COHORT = 16, 64


@dataclass
class Clock:
    """Wall and processor seconds of some parts of the work."""

    wall: float = 0.0
    processor: float = 0.0

    def __enter__(self) -> Clock:
        self._began = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall += time.perf_counter() - self._began[0]
        self.processor += time.process_time() - self._began[1]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--quick", action="store_true", help="a few runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        runs = spread(read_runs(read_grid("digits-small")).runs, 25 if options.quick else options.runs)
        training, store = work(Path(folder) / "short", runs)
        least = floor(Path(folder) / "short", Path(folder) / "floor")
        report(f"digits-small, {len(runs)} runs", len(runs), training, store, 1)
        report(f"digits-small, {len(runs)} runs, floor", len(runs), training, least, 1)
        steps, factor, count = (2, 100, 1) if options.quick else (20, 10, 3)
        usual = [resnet(seed, steps) for seed in range(count)]
        training, store = work(Path(folder) / "usual", usual)
        report("cifar_resnet20, 200 steps", count, training, store, factor)
    print("  wanted: under 5 ms a run, under 2 % of training")


def resnet(seed: int, steps: int) -> RunSpec:
    """A usual run, cut short."""
    base: Any = {"kind": "random", "architecture": "cifar_resnet20", "classes": 10}
    return RunSpec(task="digits8:identity", base=base, learning_rate=0.01, steps=steps, batch_size=32, seed=seed)


def planner(runs: Mapping[str, RunSpec], **_: Any) -> Plan:
    """A plan without a probe: cohorts of runs that agree in architecture and batch size."""
    alike: dict[tuple[str, int], list[str]] = {}
    for digest, run in runs.items():
        alike.setdefault((run.architecture, run.batch_size), []).append(digest)
    cohorts = []
    for (name, _size), digests in alike.items():
        way = "loop" if name.startswith("cifar") else "written" if name.startswith(WRITTEN) else "folded"
        parts = [tuple(digests[k : k + COHORT]) for k in range(0, len(digests), COHORT)]
        chunk = 1 if way == "loop" else CHUNK
        cohorts += [Cohort(f"c{len(cohorts) + k}", part, way, chunk) for k, part in enumerate(parts)]  # type: ignore[arg-type]
    return Plan(tuple(cohorts))


def work(folder: Path, runs: Sequence[RunSpec]) -> tuple[Clock, Clock]:
    """Do all runs as a worker does them; the clocks of training and of the store."""
    prepare(folder, runs, {"grid": {"name": "overhead"}, "digest": "overhead"}, planner=planner)
    training, stored = Clock(), Clock()
    with Store.open(folder) as store:
        place = Workplace(store.base)
        plan = store.plan()
        assert plan is not None
        first = known_runs(store, plan.cohorts[0].runs[:1])
        for digest, known in first.items():  # what is imported and opened once is no overhead of a run
            train(place, Cohort("warm", (digest,), plan.cohorts[0].way), [known])
        for cohort in plan.cohorts:
            with stored:
                waiting = Together(store, "benchmark", TOGETHER)
            for piece in pieces(cohort):
                with stored:
                    assert store.missing(piece)
                    known = known_runs(store, piece.runs)
                with training:
                    jobs, results = train(place, piece, [known[digest] for digest in piece.runs])
                for digest, job, result in zip(piece.runs, jobs, results, strict=True):
                    whole = measured(job, result)
                    with stored:
                        waiting.add(digest, whole)
                        if waiting.due():
                            waiting.commit()
            with stored:
                waiting.commit()
        assert not store.missing()
    return training, stored


def floor(store: Path, folder: Path) -> Clock:
    """Hash and write the weights of a store again, without anything else."""
    with Store.open(store, "r") as opened:
        names = [row[0] for row in opened._database.read("SELECT DISTINCT blob FROM results")]
    contents = [blob_path(store, name).read_bytes() for name in names]
    folder.mkdir()
    clock = Clock()
    with clock:
        for number, data in enumerate(contents):
            hashlib.sha256(data).digest()
            hashlib.sha256(data).digest()
            with open(folder / f"{number}.tmp", "xb") as handle:
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(folder / f"{number}.tmp", folder / str(number))
    return clock


def train(place: Workplace, piece: Cohort, known: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Train one piece."""
    jobs = [place.job(each.run, each.base, each.split) for each in known]
    results = train_cohort(
        [j.run for j in jobs], jobs[0].network, [j.start for j in jobs], [j.train for j in jobs], piece
    )
    return jobs, results


def report(name: str, runs: int, training: Clock, store: Clock, factor: int) -> None:
    """Print a line."""
    for kind in ("wall", "processor"):
        trained, kept = factor * getattr(training, kind) / runs, getattr(store, kind) / runs
        print(
            f"  {name}: training {1e3 * trained:9.1f} ms a run, store {1e3 * kept:6.2f} ms a run, "
            f"{100 * kept / trained:6.3f} % ({kind})"
        )


if __name__ == "__main__":
    main()
