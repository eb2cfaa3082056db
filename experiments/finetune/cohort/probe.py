"""How fast each way trains a few steps, measured; and how much memory an expert takes, estimated."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from experiments.grid.result import Cohort, Way
from experiments.grid.run_spec import RunSpec
from experiments.inputs.training_data import TrainingData
from theory.errors import MergeboundError

Opened = tuple[nn.Module, Mapping[str, Tensor], TrainingData]
"""Of one run: the network, x_0 and the training images, on the device."""

STEPS, ROUNDS = 5, 2
_ENOUGH = 0.02
"""Seconds that a timed piece should take; small networks make more steps."""
_MOST_STEPS = 320
_SLOW = 5.0
"""Where one step of all takes longer, a second step says nothing new."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """A way to be tried: ``chunk`` experts at a time, with its options by name."""

    way: Way
    chunk: int
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        chosen = [name if value is True else str(value) for name, value in self.options if value]
        return " ".join([self.way, *chosen])


@dataclass(frozen=True)
class Timing:
    """Seconds per step and expert, over so many steps; ``None`` with the reason where a way does not work."""

    seconds: float | None
    steps: int = 0
    reason: str = ""


Probe = Callable[[Sequence[Candidate], RunSpec, Opened], Mapping[Candidate, Timing]]
"""Times some candidates side by side."""


def measure(
    candidates: Sequence[Candidate],
    run: RunSpec,
    opened: Opened,
    *,
    seed: int = 0,
    clock: Callable[[], float] | None = None,
    rounds: int = ROUNDS,
) -> dict[Candidate, Timing]:
    """Train a few steps in each way, in turns; the quickest of each counts.

    What comes before the first step is taken out: the time is that of 1 + s steps less that of 1 step.

    Args:
        candidates: what to try.
        run: whose network, batch size and update are timed.
        opened: of that run.
        seed: of the first expert; the others count on.
        clock: in seconds; default: of this process on a processor, so that its neighbours do not count, else wall.
    """
    on_cpu = opened[2].labels.device.type == "cpu"
    now = clock or (time.process_time if on_cpu else time.perf_counter)
    clocks = {each: _Clock() for each in candidates}
    with one_thread(on_cpu):
        for turn in range(rounds):
            for each, mine in clocks.items():
                try:
                    if turn == 0:
                        _begin(mine, each, run, opened, seed, now)
                    elif not mine.reason and not mine.slow:
                        mine.add(*(_time(each, run, opened, seed, 1 + steps, now) for steps in (0, mine.steps)))
                except (MergeboundError, RuntimeError, NotImplementedError, ValueError) as error:
                    mine.reason = str(error).strip().partition("\n")[0] or type(error).__name__
                    _log.info("%s does not work for %s: %s", each, run.architecture, mine.reason)
    return {each: mine.timing(each.chunk) for each, mine in clocks.items()}


@dataclass
class _Clock:
    """Of one candidate: quickest turns of 1 and of 1 + ``steps`` steps, in seconds."""

    short: float = math.inf
    long: float = math.inf
    steps: int = STEPS
    slow: bool = False
    reason: str = ""

    def add(self, short: float, long: float) -> None:
        self.short, self.long = min(self.short, short), min(self.long, long)

    def timing(self, chunk: int) -> Timing:
        if self.reason:
            return Timing(None, 0, self.reason)
        if self.slow:
            return Timing(self.short / chunk, 1)
        return Timing(max(self.long - self.short, self.long * 1e-3) / self.steps / chunk, self.steps)


def _begin(mine: _Clock, each: Candidate, run: RunSpec, opened: Opened, seed: int, now: Callable[[], float]) -> None:
    """Warm up, and find how many steps take long enough to be timed; a step that takes very long is enough itself."""
    _time(each, run, opened, seed, 1, now)
    mine.short = _time(each, run, opened, seed, 1, now)
    if mine.short > _SLOW:
        mine.slow = True
        return
    while True:
        mine.long = _time(each, run, opened, seed, 1 + mine.steps, now)
        if mine.long - mine.short >= _ENOUGH or mine.steps >= _MOST_STEPS:
            return
        mine.steps = min(4 * mine.steps, _MOST_STEPS)


def _time(each: Candidate, run: RunSpec, opened: Opened, seed: int, steps: int, now: Callable[[], float]) -> float:
    begin = now()
    _train(each, run, opened, seed, steps)
    return now() - begin


def _train(each: Candidate, run: RunSpec, opened: Opened, seed: int, steps: int) -> None:
    from experiments.finetune.cohort.train import train_cohort

    network, start, data = opened
    few = {"steps": steps, "checkpoints": (steps,), "warm_up": 0}
    runs = [run.model_copy(update=few | {"seed": seed + m}) for m in range(each.chunk)]
    cohort = Cohort("probe", tuple(str(m) for m in range(each.chunk)), each.way, each.chunk, dict(each.options))
    train_cohort(runs, network, [start] * each.chunk, [data] * each.chunk, cohort)


@contextmanager
def one_thread(wanted: bool) -> Iterator[None]:
    """PyTorch with one thread, as workers have."""
    before = torch.get_num_threads()
    if wanted:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def expert_bytes(run: RunSpec, opened: Opened) -> int:
    """About how many bytes one expert takes while it is trained.

    Weights, gradient, two buffers, what is kept to undo a step and the checkpoints; and every layer's output twice (for
    the backward pass and its gradient) for a batch.  Attention and the like take more than their outputs.
    """
    network, start, data = opened
    size = 8 if run.precision == "float64" else 4
    weights = sum(tensor.numel() for tensor in start.values())
    outputs = 0

    def count(module: nn.Module, given: Any, out: Any) -> None:
        nonlocal outputs
        if isinstance(out, Tensor) and not list(module.children()):
            outputs += out.numel()

    hooks = [module.register_forward_hook(count) for module in network.modules()]
    was_training = network.training
    try:
        import numpy as np

        network.eval()
        images, _ = data.batch(np.zeros(1, dtype=np.int64), 0)
        first = next(network.parameters())
        with torch.no_grad():
            network(images.to(first.device, first.dtype))
    finally:
        network.train(was_training)
        for hook in hooks:
            hook.remove()
    return size * (weights * (6 + len(run.checkpoints)) + 2 * run.batch_size * (outputs + images.numel()))
