"""The store: what a commit costs, what packing saves, and how long questions to 100,000 runs take.

    python benchmarks/store.py [--runs 100000] [--quick]

Commits: results of a 64-64-10 network, one and four checkpoints, logs of 200 steps, eight metrics; medians of wall and
processor time, each run in a transaction of its own and 32 together, with and without waiting for the disk.  Questions:
rows without files are put into the tables of a store directly, then every hyperparameter is asked for through
``Store.query``; processor time of the best of five (the machine may be
shared, and all is in memory) with the rows that came back.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the packages first, not `merging.py` beside this file
    here, root = Path(__file__).resolve().parent, Path(__file__).resolve().parents[1]
    sys.path[:] = [str(root), *(entry for entry in sys.path if not entry or Path(entry).resolve() != here)]

import numpy as np
import torch
from torch import Tensor

from experiments.bases.base import Base, Provenance, make_base, tensors_digest
from experiments.bases.spec import BaseSpec
from experiments.finetune.loop import TrainingLog
from experiments.grid.result import Cohort, Plan, RunResult
from experiments.grid.run_spec import RunSpec
from experiments.store import Store
from experiments.store.codec import decode, encode

QUESTIONS = (
    "learning_rate < 0.00105",
    "steps == 4000 and batch_size == 64 and seed == 7",
    "data_share == 0.8 and seed == 7",
    "momentum > 0.98",
    "nesterov and seed == 3",
    "weight_decay == 0.0005 and task == 'npz8:mnist' and seed < 5",
    "optimizer == 'sam' and seed == 11",
    "beta2 == 0.95",
    "epsilon == 1e-6",
    "sam_radius == 0.1",
    "schedule == 'linear' and warm_up == 50",
    "warm_up == 77",
    "label_smoothing == 0.15",
    "clip_norm is not None and clip_norm < 0.2",
    "augment == 'flip_shift' and seed == 2",
    "sampling == 'with_replacement'",
    "precision == 'float64'",
    "trained == 'low_rank'",
    "rank == 4",
    "checkpoints == '[1, 500]' and seed == 9",
    "seed == 123",
    "split_seed == 3",
    "architecture == 'mlp' and task == 'npz8:gtsrb' and seed == 1",
    "base_kind == 'random' and seed == 5",
    "outcome == 'diverged'",
    "learning_rate < 0.01 and task == 'npz8:mnist' and seed < 3",
    "test_accuracy > 0.9995",
    "isnan(test_loss)",
)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--quick", action="store_true", help="a tenth of everything")
    parser.add_argument("--experts", type=Path, nargs="*", default=(), help="BASE.safetensors EXPERT.safetensors ...")
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = options.runs // 10 if options.quick else options.runs
    with tempfile.TemporaryDirectory() as folder:
        print(f"one file written and flushed to this disk: {1e3 * flush(Path(folder)):.2f} ms")
        print("commit of a small run (64-64-10 network):")
        worst = max(commits(Path(folder), 32 if options.quick else 128))
        packing(options.experts)
        print(f"\nquestions to {runs:,} runs with 2 checkpoints each:")
        slowest = questions(Path(folder) / "large", runs)
    print(f"\nslowest question {1e3 * slowest:.1f} ms (wanted < 100)")
    print(f"dearest commit of 32 runs together {1e3 * worst:.2f} ms a run (wanted < 5)")
    sys.exit(slowest > 0.1 or worst > 0.005)


def commits(folder: Path, count: int) -> list[float]:
    """Print seconds per run (medians); returns the wall time, waiting for the disk included, of 32 together."""
    base = small_base()
    found = []
    for checkpoints in (1, 4):
        for durable in (True, False):
            for together in (1, 32):
                store = Store.create(folder / f"c{checkpoints}{durable}{together}", durable=durable)
                store.add_base(base)
                specs = [small_spec(k, checkpoints) for k in range(count)]
                runs = {spec.digest(base=base.digest, split="s"): spec for spec in specs}
                store.add_runs(runs, base.digest, "s")
                store.freeze(Plan((Cohort("all", tuple(runs)),)))
                results = {digest: small_result(base.state, spec) for digest, spec in runs.items()}
                names = list(results)
                wall, busy = [], []
                for start in range(0, count, together):
                    part = {name: results[name] for name in names[start : start + together]}
                    t, c = time.perf_counter(), time.process_time()
                    store.commit_many(part, owner="benchmark")
                    wall.append((time.perf_counter() - t) / len(part))
                    busy.append((time.process_time() - c) / len(part))
                store.close()
                median = statistics.median(wall)
                if together > 1:
                    found.append(median)
                safety = "durable" if durable else "not durable"
                how = f"{checkpoints} checkpoint(s), {together:2d} together, {safety:11s}"
                print(f"  {how} {1e3 * median:6.2f} ms wall, {1e3 * statistics.median(busy):6.2f} ms processor")
    return found


def flush(folder: Path) -> float:
    """Seconds for a new file of 16 KiB to be on the disk (median)."""
    found = []
    for number in range(15):
        start = time.perf_counter()
        with open(folder / f"flush{number}", "wb") as handle:
            handle.write(bytes(16384))
            handle.flush()
            os.fsync(handle.fileno())
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def packing(paths: tuple[Path, ...]) -> None:
    """Print size and speed of the lossless task vectors of real experts."""
    from safetensors.torch import load_file

    if len(paths) < 2:
        return
    base = load_file(paths[0])
    print("\nlossless task vectors:")
    for path in paths[1:]:
        state = load_file(path)
        size = sum(tensor.nbytes for tensor in state.values())
        packed, header = encode(state, base, "0")
        again = decode(packed, header, base, "0")
        assert tensors_digest(again) == tensors_digest(state)
        write = best(lambda state=state: encode(state, base, "0"), time.process_time)
        read = best(lambda packed=packed, header=header: decode(packed, header, base, "0"), time.process_time)
        part = sum(tensor.nbytes for tensor in packed.values()) / size
        speeds = f"{size / write / 1e6:.0f} MB/s in, {size / read / 1e6:.0f} out"
        print(f"  {path.name}: {part:.3f} of {size:,} bytes; {speeds}")


def questions(folder: Path, count: int) -> float:
    """Print the time of each question; returns the slowest."""
    t = time.perf_counter()
    store = Store.create(folder)
    fill(store, count)
    size = (folder / "store.sqlite").stat().st_size
    print(f"  (filled in {time.perf_counter() - t:.0f} s, {size / count:.0f} bytes a run)")
    slowest = 0.0
    for text in QUESTIONS:
        rows = len(store.query(text, final=True))
        seconds = best(lambda text=text: store.query(text, final=True), time.process_time, 5)
        slowest = max(slowest, seconds)
        print(f"  {1e3 * seconds:7.2f} ms {rows:6d} rows  {text}")
    seconds = best(store.status, time.perf_counter, 3)
    print(f"  {1e3 * seconds:7.2f} ms              status")
    t = time.perf_counter()
    rows = len(store.frame())
    print(f"  {time.perf_counter() - t:7.2f} s  {rows:6d} rows  the whole table")
    store.close()
    return slowest


def fill(store: Store, count: int) -> None:
    """Rows of runs that were never done."""
    rng = np.random.default_rng([0, 0xF111])
    tasks = [f"npz8:{name}" for name in ("mnist", "gtsrb", "cifar10", "fashion_mnist", "notmnist", "chars74k")]
    for start in range(0, count, 10_000):
        specs = [varied(rng, k, tasks) for k in range(start, min(start + 10_000, count))]
        store.add_runs({s.digest(base="b", split="s"): s for s in specs}, "b", "s")
    with store._database.writing() as connection:
        runs = connection.execute("SELECT id, steps, checkpoints FROM runs ORDER BY id").fetchall()
        results, points, measured = [], [], []
        for number, row in enumerate(runs):
            outcome = "diverged" if rng.random() < 0.005 else "finished"
            results.append((row["id"], outcome, f"{number:064x}", 1, "c", 1.0, "{}", "b", 1e9 + number))
            for index, step in enumerate((1, row["steps"])):
                key = 2 * number + index + 1
                points.append((key, row["id"], step, "d", index))
                nan = outcome == "diverged" and index == 1
                measured.append((key, "test", "accuracy", rng.random(), 0.1, 0.9, 0, 100, "measured"))
                measured.append(
                    (key, "test", "loss", None if nan else rng.random(), None, None, int(nan), 100, "measured")
                )
        columns = "run, outcome, blob, bytes, content, seconds, log, owner, committed"
        connection.executemany(f"INSERT INTO results ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", results)
        connection.executemany("INSERT INTO checkpoints VALUES (?, ?, ?, ?, ?)", points)
        connection.executemany("INSERT INTO measures VALUES (?, ?)", [("test", "accuracy"), ("test", "loss")])
        connection.executemany("INSERT INTO metrics VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", measured)


def varied(rng: np.random.Generator, number: int, tasks: list[str]) -> RunSpec:
    """A run with every hyperparameter drawn."""
    rare = rng.random() < 0.01
    optimizer = str(rng.choice(["sgd", "adamw", "sam"]))
    steps = int(rng.choice([500, 1000, 2000, 4000]))
    rank = 4 if rare else None
    return RunSpec(
        task=tasks[int(rng.integers(len(tasks)))],
        base=BaseSpec(kind="random", architecture=str(rng.choice(["mlp", "cifar_resnet20"])), classes=10),
        learning_rate=float(10 ** rng.uniform(-3, -0.5)),
        steps=steps,
        batch_size=int(rng.choice([16, 64, 256])),
        data_share=float(rng.choice([0.5, 0.8, 1.0])),
        momentum=float(rng.uniform(0.01, 0.99)),
        nesterov=optimizer == "sgd" and bool(rng.random() < 0.5),
        weight_decay=float(rng.choice([0, 1e-4, 5e-4])),
        optimizer=optimizer,  # type: ignore[arg-type]
        beta2=0.95 if rare else 0.999,
        epsilon=1e-6 if rare else 1e-8,
        sam_radius=0.1 if rare else 0.05,
        schedule=str(rng.choice(["constant", "cosine", "linear"])),  # type: ignore[arg-type]
        warm_up=int(rng.integers(0, 100)),
        label_smoothing=0.15 if rare else 0.0,
        clip_norm=float(rng.uniform(0, 1)) + 1e-6 if rare else None,
        augment=str(rng.choice(["none", "light", "flip_shift"])),
        sampling="with_replacement" if rare else "reshuffle",
        precision="float64" if rare else "float32",
        trained="low_rank" if rank else "full",
        rank=rank,
        checkpoints=(1, steps),
        seed=number % 200,
        split_seed=3 if rare else 0,
    )


def small_base() -> Base:
    """A 64-64-10 network."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"1.weight": (64, 64), "1.bias": (64,), "head.weight": (10, 64), "head.bias": (10,)}
    state = {name: torch.randn(shape, generator=generator) / 8 for name, shape in shapes.items()}
    return make_base(state, "mlp", 10, {}, Provenance("random", "benchmark"))


def small_spec(number: int, checkpoints: int) -> RunSpec:
    """One of many runs."""
    return RunSpec(
        task="digits:0",
        base=BaseSpec(kind="random", architecture="mlp", classes=10),
        learning_rate=0.1,
        steps=200,
        batch_size=16,
        checkpoints=tuple(200 * (k + 1) // checkpoints for k in range(checkpoints)),
        seed=number,
    )


def small_result(base: dict[str, Tensor] | Any, spec: RunSpec) -> RunResult:
    """What such a run could leave."""
    rng = np.random.default_rng([spec.seed, 0xE57])
    generator = torch.Generator().manual_seed(spec.seed)
    states = {
        step: {name: t + 0.01 * torch.randn(t.shape, generator=generator) for name, t in base.items()}
        for step in spec.checkpoints
    }
    log = TrainingLog(np.full(200, 16.0), rng.random(200), rng.random(200), rng.random(200), 0.5, True)
    names = ("accuracy", "loss", "brier", "ece", "confidence", "balanced_accuracy", "nonfinite", "bins")
    row = {"part": "test", "low": 0.1, "high": 0.9, "n": 400, "tier": "measured"}
    metrics = tuple(
        {**row, "step": step, "name": name, "value": float(rng.random())} for step in states for name in names
    )
    return RunResult("finished", states, log, metrics, 0.5)


def best(action: Callable[[], object], clock: Callable[[], float], turns: int = 3) -> float:
    """Seconds of the fastest turn."""
    found = []
    for _ in range(turns):
        start = clock()
        action()
        found.append(clock() - start)
    return min(found)


if __name__ == "__main__":
    main()
