"""The run: everything is measured, printed and written."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.input_speed.loading import SEED, form_of, make_arrays, rate, sources, write_photographs
from benchmarks.input_speed.tables import QUICK, Loading, Plan, Training, bf16_units, report, write
from benchmarks.input_speed.training import networks, training
from benchmarks.merge_speed.machine import describe
from experiments.inputs.opening import open_inputs
from experiments.inputs.resident import load_resident
from experiments.inputs.streamed import stream


def run(plan: Plan, say: Callable[[str], None]) -> tuple[list[Loading], list[Training]]:
    """Measure everything; ``say`` is told each line as it comes."""
    torch.set_num_threads(1)
    loading: list[Loading] = []
    trained: list[Training] = []
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "photographs").mkdir()
        photographs = write_photographs(Path(scratch) / "photographs", plan.files)
        for inputs, size, views, dtype, workers, opened in sources(photographs, Path(scratch) / "cache", plan):
            loading.append(Loading(inputs, size, views, dtype, workers, rate(opened(), plan)))
            say(str(loading[-1]))
        small = load_resident(make_arrays(plan.arrays, 32), replace(form_of(32), crop=1.0), augment="flip_shift")
        large = {
            "streamed, 1 thread, crop_flip": stream(photographs, form_of(224), views="crop_flip", workers=1),
            "cached, flip_shift": open_inputs(
                photographs, form_of(224), memory_limit=0, cache=Path(scratch) / "cache", augment="flip_shift"
            ),
        }
        speeds = {(row.inputs, row.size, row.views, row.dtype, row.workers): row.rate for row in loading}
        known = {
            "resident, flip_shift": speeds["resident", 32, "flip_shift", "float32", "0"],
            "streamed, 1 thread, crop_flip": speeds["streamed", 224, "crop_flip", "float32", "1 threads"],
            "cached, flip_shift": speeds["cached", 224, "flip_shift", "float32", "0"],
        }
        for name, (size, build) in networks().items():
            if plan.networks and name not in plan.networks:
                continue
            torch.manual_seed(SEED)
            model = build()
            for precision in ("float32", "bfloat16") if bf16_units() else ("float32",):
                for inputs, data in {"resident, flip_shift": small}.items() if size == 32 else large.items():
                    trained.append(training(name, size, model, precision, inputs, data, known[inputs], plan))
                    say(str(trained[-1]))
    return loading, trained


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description="Images per second into the network.")
    parser.add_argument("--quick", action="store_true", help="few images and networks, one round, no processes")
    parser.add_argument("--out", type=Path, help="folder for the tables")
    given = parser.parse_args(arguments)
    facts = describe("python benchmarks/inputs.py" + " --quick" * given.quick, SEED)
    facts["bfloat16 units"] = ", ".join(bf16_units()) or "none"
    loading, trained = run(QUICK if given.quick else Plan(), lambda line: print(line, file=sys.stderr, flush=True))
    print(report(loading, trained, facts))
    if given.out is not None:
        write(given.out, loading, trained, facts)
    return 0
