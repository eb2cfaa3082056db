"""How long training takes on this machine: a few timed steps per network, extended to all batch sizes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from experiments.bases.base import build
from experiments.bases.spec import BaseSpec
from experiments.grid.cost import NetworkFacts

FIRST_FLOPS = 1e10
"""The first timed step may cost about so many operations; larger batches follow where time allows."""
STEPS = 7


@dataclass(frozen=True)
class Timing:
    """Seconds of a step: ``fixed`` + ``per_sample`` x batch size, from measured steps.

    Attributes:
        fixed, per_sample: seconds.
        low, high: factors; the true time of a step lies between low and high times the estimate, as far as the tenth
            and ninetieth percentiles of the timed steps tell (a tenth at least; a factor of two where no batch of the
            grid's size was timed).
        batches: batch sizes that were timed.
        steps: how many steps were timed.
    """

    fixed: float
    per_sample: float
    low: float
    high: float
    batches: tuple[int, ...]
    steps: int

    def seconds(self, steps: float, samples: float) -> float:
        """Of so many steps with so many samples together."""
        return self.fixed * steps + self.per_sample * samples


def calibrate(
    base: BaseSpec,
    facts: NetworkFacts,
    batch_sizes: Iterable[int],
    *,
    device: str = "cpu",
    precision: str = "float32",
    seconds: float = 4.0,
    classes: int = 10,
    seed: int = 0,
) -> Timing:
    """Time training steps (forward, backward, SGD) of a network on random images, on one CPU thread or on a GPU.

    Only the network's arithmetic is timed: gathering batches and keeping the log come on top, which is felt where a
    step takes less than a few milliseconds.

    Args:
        base: whose network is timed, with random weights.
        facts: of the network.
        batch_sizes: of the grid.
        device, precision: as the grid is run.
        seconds: about so long, a first step of a large network may take longer.
        classes: outputs of the head.
        seed: of the images.
    """
    sizes = sorted(set(batch_sizes))
    kind = torch.float64 if precision == "float64" else torch.float32
    with _one_thread(device):
        network = build(base.architecture, classes, base.options, base.seed).to(device, kind).train()
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-6, momentum=0.9)
        first = max(1, min(sizes[0], int(FIRST_FLOPS / max(3.0 * facts.at(classes)[2], 1.0))))
        ends = time.perf_counter() + seconds

        def timed(batch: int, until: float) -> list[float]:
            rng = np.random.default_rng([seed, 0xCA1B])
            shape = (batch, facts.form.channels, facts.form.height, facts.form.width)
            images = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)).to(device, kind)
            labels = torch.from_numpy(rng.integers(0, classes, batch)).to(device)
            _step(network, optimizer, images, labels, precision)  # warm-up
            found: list[float] = []
            while not found or (len(found) < STEPS and time.perf_counter() < until):
                started = time.perf_counter()
                _step(network, optimizer, images, labels, precision)
                found.append(time.perf_counter() - started)
            return found

        small = timed(first, time.perf_counter() + seconds / 3)
        measured = {first: small}
        room = ends - time.perf_counter()
        per_sample = float(np.median(small)) / first
        largest = max((b for b in sizes if b > first and 2 * per_sample * b <= room), default=None)
        if largest is not None:
            measured[largest] = timed(largest, ends)
    return _fitted(measured, sizes)


def _fitted(measured: dict[int, list[float]], sizes: list[int]) -> Timing:
    medians = {batch: float(np.median(times)) for batch, times in measured.items()}
    batches = sorted(medians)
    fixed, slope = 0.0, medians[batches[-1]] / batches[-1]
    if len(batches) == 2:
        a, b = batches
        rise = (medians[b] - medians[a]) / (b - a)
        if 0 < rise <= slope:
            fixed, slope = medians[a] - rise * a, rise
    spread = [t / medians[batch] for batch, times in measured.items() for t in times]
    tenth, ninth = (float(q) for q in np.quantile(spread, (0.1, 0.9)))
    low, high = min(0.9, tenth), max(1.1, ninth)
    if not set(batches) & set(sizes):
        low, high = min(low, 0.5), max(high, 2.0)
    return Timing(fixed, slope, low, high, tuple(batches), len(spread))


def _step(
    network: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor, precision: str
) -> None:
    optimizer.zero_grad()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        logits = network(images)
    F.cross_entropy(logits if precision == "float64" else logits.float(), labels).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    if images.device.type == "cuda":
        torch.cuda.synchronize()


@contextmanager
def _one_thread(device: str) -> Iterator[None]:
    """One CPU thread, as workers have; the number is set back afterwards."""
    before = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
