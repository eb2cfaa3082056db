"""One case: the plan is probed, the two loops take turns, and their final weights are compared.

The plan is that of runs of a usual length (what is probed is limited by the work that there is); few of their steps are
timed, from the start, so that opening and copying count more than they would.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from statistics import median

import numpy as np
import torch
from torch import nn

from benchmarks.cohort_speed.cases import CASES, Case, seeded
from benchmarks.cohort_speed.plain import Expert, plain_loop
from benchmarks.merge_speed.meter import measure
from experiments.bases.spec import BaseSpec
from experiments.finetune.cohort.planner import make_plan
from experiments.finetune.cohort.train import train_cohort
from experiments.finetune.loop import batches
from experiments.grid.result import Cohort
from experiments.grid.run_spec import RunSpec
from experiments.inputs.shares import nested_subset
from experiments.tasks.types import Split

SEED = 0
PLANNED = 500
"""Steps of the runs that the plan is made for, at least: those of a usual grid.  Fewer are timed."""


@dataclass(frozen=True)
class Row:
    """What one case gave.

    Attributes:
        case, device, precision: what was trained, where and how.
        experts, batch, steps: of each expert.
        way, reason: of the planner.
        plain, cohort: seconds of one turn (of the processor on a processor, of the clock on an accelerator), medians;
            ``plain`` is in float32.
        ratio: median of the quotients of neighbouring turns.
        over_same: ratio over the plain loop in the same precision.
        rate: samples per second of the cohort.
        plain_memory, memory: MiB; on a processor the largest growth of anonymous memory in a fresh process for each
            way, above what imports and two steps of two experts leave: images, networks, their starts and results
            included; on an accelerator the largest use above the level before.
        agreement: largest difference of final weights over the largest change of a weight, both in float32.
        target: the ratio that is asked for, 0 for none.
        remark: ``not measured`` and why.
    """

    case: str
    device: str
    precision: str
    experts: int = 0
    batch: int = 0
    steps: int = 0
    way: str = ""
    reason: str = ""
    plain: float = 0.0
    cohort: float = 0.0
    ratio: float = 0.0
    over_same: float = 0.0
    rate: float = 0.0
    plain_memory: float = 0.0
    memory: float = 0.0
    agreement: float = 0.0
    target: float = 0.0
    remark: str = ""


def run_case(case: Case, precision: str, *, device: str = "cpu", rounds: int = 5, probe_seconds: float = 20.0) -> Row:
    """Measure one case in one precision."""
    ready = prepare(case, precision, device)
    runs, starts = ready.runs, ready.starts
    usual = {"steps": max(case.steps, PLANNED), "checkpoints": (max(case.steps, PLANNED),)}
    plan = make_plan(
        {digest: run.model_copy(update=usual) for digest, run in runs.items()},
        open_network=lambda run: (ready.network, starts[0], ready.data),
        device=device,
        probe_seconds=probe_seconds,
    )

    def together() -> dict[str, dict[str, torch.Tensor]]:
        return cohorts(ready, plan.cohorts)

    def plain(half: bool = False) -> list[dict[str, torch.Tensor]]:
        return loop(ready, half)

    agreement = float("nan")
    if precision == "float32":
        found = together()
        agreement = _agreement(plain(), [found[digest] for digest in runs], starts)
    turns = []
    for _ in range(rounds):
        one, other = _timed(plain, device), _timed(together, device)
        same = one if precision == "float32" else _timed(lambda: plain(True), device)
        turns.append((one, other, same))
    chosen = plan.cohorts[0]
    seconds = median(other[0] for _, other, _ in turns)
    return Row(
        case.name,
        device,
        precision,
        len(runs),
        case.batch,
        case.steps,
        " ".join([chosen.way, *(k if v is True else str(v) for k, v in chosen.options.items() if v)]),
        chosen.reason,
        median(one[0] for one, _, _ in turns),
        seconds,
        median(one[0] / other[0] for one, other, _ in turns),
        median(same[0] / other[0] for _, other, same in turns),
        len(runs) * case.batch * case.steps / seconds,
        _memory(case, precision, device, None, [one[1] for one, _, _ in turns]) / 2**20,
        _memory(case, precision, device, plan.cohorts, [other[1] for _, other, _ in turns]) / 2**20,
        agreement,
        _target(case, precision, device),
    )


@dataclass(frozen=True)
class Ready:
    """What both ways are given: runs by name, their network, starts and images."""

    case: Case
    runs: dict[str, RunSpec]
    network: nn.Module
    starts: list[dict[str, torch.Tensor]]
    data: Split
    experts: list[Expert]


def prepare(case: Case, precision: str, device: str) -> Ready:
    """The same for the same case."""
    count = case.experts if device == "cpu" else case.gpu_experts
    images, labels = _data(case, device)
    base = BaseSpec(kind="random", architecture=case.name, classes=10)
    rates = np.geomspace(0.01, 0.05, count)
    values = {"steps": case.steps, "batch_size": case.batch, "momentum": 0.9, "weight_decay": 1e-4}
    runs = {
        f"{m:03d}": RunSpec(
            task="noise", base=base, learning_rate=float(rates[m]), seed=m, **values, precision=precision
        )  # type: ignore[arg-type]
        for m in range(count)
    }
    network = seeded(case, SEED).to(device)
    starts = [{k: v.detach().clone().to(device) for k, v in seeded(case, m).state_dict().items()} for m in range(count)]
    experts = [_expert(run, len(labels), device) for run in runs.values()]
    return Ready(case, runs, network, starts, Split(images, labels, np.arange(len(labels))), experts)


def loop(ready: Ready, half: bool) -> list[dict[str, torch.Tensor]]:
    """Final states of the plain loop."""
    images, labels = ready.data.images, ready.data.labels
    return plain_loop(ready.network, ready.starts, ready.experts, images, labels, bfloat16=half)


def cohorts(ready: Ready, planned: Sequence[Cohort]) -> dict[str, dict[str, torch.Tensor]]:
    """Final states of the cohorts, by name of the run."""
    found = {}
    for cohort in planned:
        rows = [int(digest) for digest in cohort.runs]
        some = [ready.runs[digest] for digest in cohort.runs]
        results = train_cohort(some, ready.network, [ready.starts[m] for m in rows], [ready.data] * len(rows), cohort)
        found.update({d: dict(r.states[ready.case.steps]) for d, r in zip(cohort.runs, results, strict=True)})
    return found


def remeasured(case: Case, row: Row) -> Row:
    """A row with its memory measured again, in the way that it names (as many experts at a time as there are)."""
    way, *options = row.way.split()
    named = {"engine": options[0]} if way == "written" else dict.fromkeys(options, True)
    cohort = Cohort("all", tuple(f"{m:03d}" for m in range(row.experts)), way, row.experts, named)  # type: ignore[arg-type]
    plain = _memory(case, row.precision, row.device, None, []) / 2**20
    return replace(row, plain_memory=plain, memory=_memory(case, row.precision, row.device, (cohort,), []) / 2**20)


def absent(case: Case, precision: str, device: str, why: str) -> Row:
    """A row that says that nothing was measured."""
    return Row(case.name, device, precision, target=_target(case, precision, device), remark=f"not measured: {why}")


def smaller(case: Case) -> Case:
    """The same in seconds: the smallest work that exercises everything."""
    return replace(case, experts=2, batch=4, steps=2, gpu_experts=2)


def _target(case: Case, precision: str, device: str) -> float:
    if device != "cpu":
        return case.gpu_target
    return case.target if precision == case.target_precision else 1.0 if precision == "float32" else 0.0


def _data(case: Case, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng([SEED, 0xC0])
    images = rng.standard_normal((case.images, case.channels, case.size, case.size), dtype=np.float32)
    return torch.from_numpy(images).to(device), torch.from_numpy(rng.integers(0, 10, case.images)).to(device)


def _expert(run: RunSpec, n: int, device: str) -> Expert:
    """The batches of the run, for the plain loop: all of one size, as the images are a multiple of it."""
    rows = nested_subset(n, run.data_share, run.seed)
    rng = np.random.default_rng([run.seed, 0xBA7C])
    order = np.stack(list(batches(n, run.batch_size, run.steps, run.sampling, rng)))
    return Expert(run.learning_rate, run.momentum, run.weight_decay, torch.from_numpy(rows[order]).to(device))


def _timed(work: Callable[[], object], device: str) -> tuple[float, float]:
    """Seconds, and bytes above the level before."""
    if device == "cpu":
        reading = measure(work)
        return reading.user + reading.system, float(reading.above)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    level = torch.cuda.memory_allocated()

    def waited() -> None:
        work()
        torch.cuda.synchronize()

    return measure(waited).wall, float(torch.cuda.max_memory_allocated() - level)


def _memory(case: Case, precision: str, device: str, planned: tuple[Cohort, ...] | None, seen: list[float]) -> float:
    """Bytes that one way takes, see :class:`Row`; the plain loop's without cohorts."""
    if device != "cpu":
        return max(seen)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    sizes = {name: getattr(case, name) for name in ("experts", "batch", "steps", "gpu_experts")}
    child = context.Process(target=_alone, args=(theirs, case.name, sizes, precision, planned))
    child.start()
    theirs.close()
    try:
        return float(ours.recv())
    finally:
        child.join()


def _alone(
    pipe: Connection, name: str, sizes: dict[str, int], precision: str, planned: tuple[Cohort, ...] | None
) -> None:
    """One way in a process of its own; one turn, as later ones reuse what was freed."""
    torch.set_num_threads(1)
    case = replace(CASES[name], **sizes)  # type: ignore[arg-type]

    def work(case: Case, planned: Sequence[Cohort] | None) -> object:
        ready = prepare(case, precision, "cpu")
        return loop(ready, False) if planned is None else cohorts(ready, planned)

    tiny = None if planned is None else [replace(planned[0], runs=("000", "001"), chunk=min(2, planned[0].chunk))]
    work(smaller(case), tiny)  # imports and compiles what it needs
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    pipe.send(measure(lambda: work(case, planned), interval=0.001).above)


def _agreement(
    plain: list[dict[str, torch.Tensor]], ours: list[dict[str, torch.Tensor]], starts: list[dict[str, torch.Tensor]]
) -> float:
    worst = 0.0
    for one, other, start in zip(plain, ours, starts, strict=True):
        names = [name for name, tensor in one.items() if tensor.is_floating_point()]
        change = max(float((one[name] - start[name]).abs().max()) for name in names)
        gap = max(float((one[name].cpu() - other[name].cpu()).abs().max()) for name in names)
        worst = max(worst, gap / change)
    return worst
