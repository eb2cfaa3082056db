"""Logistic regression and multilayer perceptrons with backward passes written out: M experts at a time.

There are two engines with one meaning.  ``compiled`` (processors): whole blocks of steps, one expert after the other in
the processor's own memory (:mod:`experiments.finetune.cohort.kernels`).  ``batched`` (any device): one step of all
experts as batched matrix products in buffers made once (:mod:`experiments.finetune.cohort.batched`).  The option
``engine`` of a cohort chooses; by default processors take ``compiled``.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from experiments.finetune.cohort.chain import Chain, read_chain
from experiments.finetune.cohort.feeding import Block, Feed
from experiments.finetune.cohort.kernels import ADAMW, ENTRIES, NESTEROV, NUMBERS, SGD
from experiments.finetune.loop import TrainingLog
from experiments.finetune.schedules import schedule
from experiments.grid.result import Cohort, RunResult
from experiments.grid.run_spec import RunSpec
from experiments.inputs.training_data import TrainingData
from theory.errors import MergeboundError

DTYPES = {"float32": torch.float32, "float64": torch.float64}
ENGINES = ("compiled", "batched")


class Engine(Protocol):
    """Trains a block of steps of the first A experts that it holds.

    Attributes:
        x: (M, size) weights.
    """

    x: Tensor

    def run(
        self, block: Block, rates: np.ndarray, powers: np.ndarray, numbers: np.ndarray, alive: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Train.

        Args:
            block: samples of A experts.
            rates: (A, steps) learning rates; ``powers``: (A, steps, 2), of AdamW.
            numbers: (A, NUMBERS), see :mod:`experiments.finetune.cohort.kernels`.
            alive: (A,) whether an expert is trained.

        Returns:
            Log (A, steps, ENTRIES) and steps that count (A,); an expert's weights are those after its last one.
        """


def supports_written(runs: Sequence[RunSpec], network: nn.Module) -> str | None:
    """Why runs cannot be trained in this way; ``None`` if they can."""
    for run in runs:
        if run.precision not in DTYPES:
            return f"precision {run.precision} is not written out"
        if run.trained == "low_rank":
            return "low-rank updates are not written out"
    chain = read_chain(network)
    return chain if isinstance(chain, str) else None


def train_written(
    runs: Sequence[RunSpec],
    network: nn.Module,
    starts: Sequence[Mapping[str, Tensor]],
    data: Sequence[TrainingData],
    cohort: Cohort,
) -> list[RunResult]:
    """Train a cohort; see :func:`experiments.finetune.cohort.train.train_cohort`.

    Args:
        cohort: ``chunk`` experts at a time; option ``engine``: ``compiled`` or ``batched``.

    Raises:
        MergeboundError: the network is no chain of linear layers, or the runs ask for what is not written out.
    """
    chain = read_chain(network)
    reason = chain if isinstance(chain, str) else supports_written(runs, network)
    if isinstance(chain, str) or reason:
        raise MergeboundError(f"cohort {cohort.name}: way 'written' does not fit ({reason}); take 'loop'")
    results: list[RunResult] = []
    for begin in range(0, len(runs), max(1, cohort.chunk)):
        part = slice(begin, begin + max(1, cohort.chunk))
        results += _train(runs[part], chain, starts[part], data[part], cohort)
    return results


@dataclass
class _Progress:
    """Of one expert."""

    states: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    log: list[np.ndarray] = field(default_factory=list)
    sizes: list[np.ndarray] = field(default_factory=list)
    finite: bool = True


def _train(
    runs: Sequence[RunSpec],
    chain: Chain,
    starts: Sequence[Mapping[str, Tensor]],
    data: Sequence[TrainingData],
    cohort: Cohort,
) -> list[RunResult]:
    began = time.perf_counter()
    order = sorted(range(len(runs)), key=lambda m: -runs[m].steps)  # those that end first lie last
    runs, starts, data = [runs[m] for m in order], [starts[m] for m in order], [data[m] for m in order]
    dtype, trained = DTYPES[runs[0].precision], runs[0].trained
    shared = ("precision", "trained", "optimizer", "nesterov")
    for name in shared:
        if len({getattr(run, name) for run in runs}) > 1:
            raise MergeboundError(f"cohort {cohort.name}: its runs differ in {name}; make a cohort of each")
    lo, hi = chain.trained(trained)
    if lo == hi:
        raise MergeboundError(f"cohort {cohort.name}: trained = {trained} leaves nothing to train in this network")
    feed = Feed(runs, data, sorted({step for run in runs for step in run.checkpoints}), dtype)
    rule = ADAMW if runs[0].optimizer == "adamw" else NESTEROV if runs[0].nesterov else SGD
    engine = _engine(cohort, chain, chain.rows(starts, dtype, feed.labels_device), rule, lo, hi)
    numbers, rates = np.stack([_numbers(run) for run in runs]), [_rates(run) for run in runs]
    found = [_Progress() for _ in runs]
    done = 0
    for block in feed:
        active, length = block.counts.shape
        alive = np.array([each.finite for each in found[:active]])
        if not alive.any():
            break
        pace = np.stack([rate[done : done + length] for rate in rates[:active]])
        powers = _powers(runs[:active], done, length)
        log, good = engine.run(block, pace, powers, numbers[:active], alive)
        for m in np.flatnonzero(alive):
            each, count = found[m], int(good[m])
            each.log.append(log[m, :count])
            each.sizes.append(block.counts[m, :count])
            each.finite = count == length
            if not each.finite or done + length in runs[m].checkpoints:
                each.states[done + count] = chain.state(engine.x[m], starts[m])
        done += length
    seconds = time.perf_counter() - began
    samples = np.array([sum(float(sizes.sum()) for sizes in each.sizes) for each in found])
    shares = samples / samples.sum() if samples.sum() else np.full(len(runs), 1 / len(runs))
    results = [_result(*each) for each in zip(runs, found, seconds * shares, strict=True)]
    return [results[order.index(m)] for m in range(len(runs))]


def _engine(cohort: Cohort, chain: Chain, x: Tensor, rule: int, lo: int, hi: int) -> Engine:
    on_cpu = x.device.type == "cpu"
    name = cohort.options.get("engine", "compiled" if on_cpu else "batched")
    if name not in ENGINES or (name == "compiled" and not on_cpu):
        raise MergeboundError(
            f"cohort {cohort.name}: engine {name!r} is not there on {x.device.type}; choose from {', '.join(ENGINES)}"
        )
    if name == "compiled":
        from experiments.finetune.cohort.compiled import Compiled

        return Compiled(chain, x, rule, lo, hi)
    from experiments.finetune.cohort.batched import Batched

    return Batched(chain, x, rule, lo, hi)


def _numbers(run: RunSpec) -> np.ndarray:
    numbers = np.zeros(NUMBERS)
    adamw = run.optimizer == "adamw"
    numbers[0] = run.momentum
    numbers[1] = 0.0 if adamw else run.weight_decay
    numbers[2] = run.label_smoothing
    numbers[3] = run.clip_norm or 0.0
    numbers[4], numbers[5] = run.beta2, run.epsilon
    numbers[6] = run.weight_decay if adamw else 0.0
    numbers[7] = run.sam_radius if run.optimizer == "sam" else 0.0
    return numbers


def _rates(run: RunSpec) -> np.ndarray:
    factor = schedule(run.schedule, run.steps, warm_up=run.warm_up)
    return run.learning_rate * np.array([factor(step) for step in range(run.steps)])


def _powers(runs: Sequence[RunSpec], done: int, length: int) -> np.ndarray:
    """(M, length, 2): 1 - beta1^t and sqrt(1 - beta2^t)."""
    if runs[0].optimizer != "adamw":
        return np.ones((len(runs), length, 2))
    t = np.arange(done + 1, done + length + 1)
    first = np.array([[run.momentum] for run in runs])
    second = np.array([[run.beta2] for run in runs])
    return np.stack([1.0 - first**t, np.sqrt(1.0 - second**t)], axis=2)


def _result(run: RunSpec, found: _Progress, seconds: float) -> RunResult:
    log = np.concatenate(found.log) if found.log else np.empty((0, ENTRIES))
    sizes = np.concatenate(found.sizes).astype(np.float64) if found.sizes else np.empty(0)
    loss, shared, head, clip, used_shared, used_head = (column.copy() for column in log.T)
    clipped = (clip, used_shared, used_head) if run.clip_norm is not None else ()
    kept = TrainingLog(sizes, loss, shared, head, seconds, found.finite, *clipped)
    return RunResult("finished" if found.finite else "diverged", found.states, kept, seconds=seconds)
