"""How long runs take in cohorts on this machine: the planner's own probe, on random images, and timed evaluations."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from experiments.bases.base import build
from experiments.grid.calibrate import Timing
from experiments.grid.cost import PASSES, NetworkFacts
from experiments.grid.run_spec import RunSpec

if TYPE_CHECKING:
    from experiments.inputs.resident_data import Resident

_STEPS = 20
"""About so many steps of the loop a probe trains at least."""
_EVALUATION = 0.5
"""Seconds that one timed evaluation may take, about."""
_FEW, _MOST = 64, 1024


@dataclass(frozen=True)
class CohortTiming:
    """Seconds of runs of one network, each one expert of a cohort in the way that the planner chooses.

    Attributes:
        fixed, per_sample: of one expert's step: ``fixed`` + ``per_sample`` x batch size; bookkeeping included.
        passes: forward passes that the timed update is worth (:data:`~experiments.grid.cost.PASSES`).
        way, chunk: that the planner chose at the larger of the timed batch sizes.
        speed_up: over the loop, there.
        validation, test: (a, b) of a + b x images: evaluating one checkpoint, without intervals and with them.
        opening: of a network and its head.
        choosing: of the planner's probe, for one kind of runs.
    """

    fixed: float
    per_sample: float
    passes: float
    way: str
    chunk: int
    speed_up: float
    validation: tuple[float, float]
    test: tuple[float, float]
    opening: float
    choosing: float

    def training(self, steps: float, samples: float) -> float:
        """Of so many steps with so many samples together."""
        return self.fixed * steps + self.per_sample * samples

    def evaluation(self, checkpoints: float, validation: float, test: float) -> float:
        """Of so many checkpoints with so many validation and test images together."""
        (a, b), (c, d) = self.validation, self.test
        return (a + c) * checkpoints + b * validation + d * test


def calibrate_cohorts(
    runs: Sequence[RunSpec],
    facts: NetworkFacts,
    plain: Timing,
    *,
    device: str = "cpu",
    seconds: float = 4.0,
    classes: int = 10,
    resamples: int = 200,
    seed: int = 0,
) -> CohortTiming | None:
    """Let the planner choose a way for the smallest and the largest batch size of some runs, and time an evaluation.

    Args:
        runs: of one base.
        facts: of its network.
        plain: steps as :func:`~experiments.grid.calibrate.calibrate` timed them.
        device: where the grid will run.
        seconds: for all of it, about.
        classes: of the largest task.
        resamples: of the bootstrap over test images.
        seed: of the images and of the probe.

    Returns:
        ``None`` where steps take so long that there is no time for a probe.
    """
    from experiments.finetune.cohort.choosing import choose, probe_limit
    from experiments.finetune.cohort.planner import kind_of, memory_of, most_together
    from experiments.finetune.cohort.probe import one_thread

    sizes = sorted({run.batch_size for run in runs})
    sizes = sizes if len(sizes) == 1 else [sizes[0], sizes[-1]]
    each = seconds / (len(sizes) + 1)
    if plain.seconds(1, sizes[-1]) * _STEPS > each:
        return None
    on_cpu = torch.device(device).type == "cpu"
    with one_thread(on_cpu):
        began = _now(on_cpu)
        base = runs[0].base
        network = build(base.architecture, classes, base.options, base.seed).to(device)
        opening = _now(on_cpu) - began
        found, spent = {}, 0.0
        for size in sizes:
            run = typical([one for one in runs if one.batch_size == size])
            opened = (network, network.state_dict(), random_images(facts, size, run, classes, device, seed))
            began = _now(on_cpu)
            found[size] = choose(
                run, opened, most_together(run, runs), memory=memory_of(device), budget=each, seed=seed
            )
            took = _now(on_cpu) - began
            work = found[size].loop_seconds * sum(one.steps for one in runs if kind_of(one) == kind_of(run))
            spent += min(3.0 * took, max(took, probe_limit(work))) if took > each else took  # the planner may take more
        validation = _evaluation(network, facts, plain, classes, device, 0, seed)
        test = _evaluation(network, facts, plain, classes, device, resamples, seed)
    last = found[sizes[-1]]
    a, b = sizes[0], sizes[-1]
    rise = (found[b].seconds - found[a].seconds) / (b - a) if b > a else 0.0
    fixed, per_sample = (found[a].seconds - rise * a, rise) if rise > 0 else (0.0, last.seconds / b)
    if fixed < 0:
        fixed, per_sample = 0.0, last.seconds / b
    run = typical([one for one in runs if one.batch_size == b])
    return CohortTiming(
        fixed, per_sample, passes_of(run), last.candidate.way, last.candidate.chunk, last.speed_up, validation, test,
        opening, spent / len(sizes),
    )  # fmt: skip


def passes_of(run: RunSpec) -> float:
    """Forward passes that one step of a run is worth."""
    return PASSES[run.trained] * (2.0 if run.optimizer == "sam" else 1.0)


def typical(runs: Sequence[RunSpec]) -> RunSpec:
    """The first run of the commonest kind, with a step that leads nowhere, so that random images do not diverge."""
    from experiments.finetune.cohort.planner import kind_of

    kinds = [kind_of(run) for run in runs]
    commonest = Counter(kinds).most_common(1)[0][0]
    return runs[kinds.index(commonest)].model_copy(update={"learning_rate": 1e-6, "data_share": 1.0})


def _now(on_cpu: bool) -> float:
    """Of this process on a processor, so that its neighbours do not count."""
    return time.process_time() if on_cpu else time.perf_counter()


def random_images(
    facts: NetworkFacts, size: int, run: RunSpec | None, classes: int, device: str, seed: int
) -> Resident:
    """Noise for a network, two batches or more, resident on the device; augmented and in the precision of a run."""
    from experiments.inputs.augment import NOTHING, augmentation
    from experiments.inputs.resident_data import Resident

    form, count = facts.form, max(2 * size, _FEW)
    rng = np.random.default_rng([seed, 0xCA1C])
    pixels = rng.integers(0, 256, (count, form.channels, form.height, form.width), dtype=np.uint8)
    labels = np.arange(count) % classes
    return Resident(
        torch.from_numpy(pixels).to(device),
        torch.from_numpy(labels).to(device),
        np.arange(count),
        form,
        augmentation=NOTHING if run is None else augmentation(run.augment),
        dtype=torch.float64 if run is not None and run.precision == "float64" else torch.float32,
    )


def _evaluation(
    network: nn.Module, facts: NetworkFacts, plain: Timing, classes: int, device: str, resamples: int, seed: int
) -> tuple[float, float]:
    """(a, b) of a + b x images, from a small and a larger evaluation, the quicker of two each."""
    from experiments.evaluate.evaluate import evaluate
    from experiments.evaluate.results import EvaluationSet

    on_cpu = torch.device(device).type == "cpu"
    few = int(np.clip(_EVALUATION / max(plain.per_sample, 1e-12), 2, _FEW))
    many = int(np.clip(_EVALUATION / max(plain.per_sample, 1e-12), few, _MOST))
    times = {}
    network = network.float()
    for count in dict.fromkeys((few, many)):
        data = EvaluationSet(
            "random", random_images(facts, count, None, classes, device, seed).take(np.arange(count)), "", 0
        )
        tries = []
        for _ in range(2):
            began = _now(on_cpu)
            evaluate(network, data, resamples=resamples)
            tries.append(_now(on_cpu) - began)
        times[count] = min(tries)
    rise = (times[many] - times[few]) / (many - few) if many > few else 0.0
    return (times[few] - rise * few, rise) if rise > 0 and times[few] > rise * few else (0.0, times[many] / many)
