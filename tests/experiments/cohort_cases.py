"""Small runs, starts and data for tests of the cohort engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.bases.spec import BaseSpec
from experiments.finetune.loop import TrainingLog
from experiments.grid.result import Cohort, RunResult
from experiments.grid.run_spec import RunSpec
from experiments.inputs.resident import Resident
from experiments.tasks.form import InputFormat

LOGGED = (
    "batch_size",
    "batch_loss",
    "gradient_norm_shared",
    "gradient_norm_head",
    "clip_factor",
    "used_norm_shared",
    "used_norm_head",
)

DIFFERENT: tuple[dict[str, Any], ...] = (
    {"learning_rate": 0.02, "steps": 20, "momentum": 0.9, "checkpoints": (5, 20)},
    {"learning_rate": 0.05, "steps": 17, "weight_decay": 1e-2, "data_share": 0.8, "schedule": "cosine", "warm_up": 2},
    {"learning_rate": 0.1, "steps": 14, "momentum": 0.5, "clip_norm": 0.5, "label_smoothing": 0.1, "data_share": 0.5},
)
"""Hyperparameters of three experts that share nothing but what a cohort must share."""


def spec(**fields: Any) -> RunSpec:
    """A run of 12 samples a batch in float64, with the given fields changed."""
    given: dict[str, Any] = {
        "task": "digits8:identity",
        "base": BaseSpec(kind="random", architecture="vit", classes=10),
        "learning_rate": 0.05,
        "steps": 4,
        "batch_size": 12,
        "precision": "float64",
    }
    return RunSpec(**{**given, **fields})


def runs(*changes: Mapping[str, Any], **common: Any) -> list[RunSpec]:
    """One run for each of the changes, seeds 0, 1, ..."""
    return [spec(**{"seed": m, **common, **change}) for m, change in enumerate(changes)]


def images(n: int = 56, *, channels: int = 1, size: int = 8, seed: int = 0, augment: Any = None) -> Resident:
    """Random images of ten classes."""
    rng = np.random.default_rng([seed, 0x7E57])
    pixels = torch.from_numpy(rng.integers(0, 256, (n, channels, size, size), dtype=np.uint8))
    labels = torch.from_numpy(rng.integers(0, 10, n))
    form = InputFormat(channels, size, size, (0.5,), (0.5,), "bicubic", 1.0)
    options = {} if augment is None else {"augmentation": augment}
    return Resident(pixels, labels, np.arange(n), form, name=f"images {seed}", **options)


def starts(network: nn.Module, count: int) -> list[dict[str, Tensor]]:
    """Different weights for each expert, near the network's."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        state = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
        for name, _parameter in network.named_parameters():
            state[name] += 0.05 * torch.randn(state[name].shape, generator=generator)
        found.append(state)
    return found


def cohort(way: Any, chunk: int = 8, **options: Any) -> Cohort:
    """A cohort of one way; its names of runs are not looked at."""
    return Cohort("c0", ("a",), way, chunk, options)


def largest_difference(one: RunResult, other: RunResult) -> float:
    """Between the states and logs of two results, which must have the same outcome, checkpoints, names and shapes."""
    assert one.outcome == other.outcome
    assert list(one.states) == list(other.states)
    worst = 0.0
    for step, state in one.states.items():
        assert list(state) == list(other.states[step])
        for name, tensor in state.items():
            found = other.states[step][name]
            assert (found.dtype, found.shape, found.device) == (tensor.dtype, tensor.shape, tensor.device), name
            assert found.is_contiguous()
            worst = max(worst, float((tensor.double() - found.double()).abs().max()))
    return max(worst, difference_of_logs(one.log, other.log))


def difference_of_logs(one: TrainingLog, other: TrainingLog) -> float:
    """Largest difference of any column."""
    assert one.finite == other.finite
    worst = 0.0
    for column in LOGGED:
        mine, others = getattr(one, column), getattr(other, column)
        assert (mine is None) == (others is None), column
        if mine is not None:
            assert mine.shape == others.shape, column
            worst = max(worst, float(np.abs(mine - others).max(initial=0.0)))
    return worst


def bits(state: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two states are equal bit by bit."""
    return all(torch.equal(tensor, other[name]) for name, tensor in state.items())
