"""A finished grid of tiny experts for tests: random states of a small network, in a store in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from experiments.bases.base import Base, random_base
from experiments.finetune.task_expert import start_from
from experiments.tasks.dataset import DataSet, ImageTask, split
from experiments.tasks.images import ArrayImages

TASKS = ("ants", "bees", "cats", "dogs")
CLASSES = {"ants": 3, "bees": 4, "cats": 5, "dogs": 3}


def tiny_task(name: str, seed: int = 0, *, size: int = 8, images: int = 40) -> ImageTask:
    """Random grey images; opens like :func:`experiments.tasks.named.open_task`."""
    rng = np.random.default_rng([TASKS.index(name), 0x7A5C])
    parts = {}
    for part in ("train", "validation", "test"):
        labels = rng.permutation(np.arange(images) % CLASSES[name])
        pixels = rng.integers(0, 256, (images, size, size, 1), dtype=np.uint8)
        parts[part] = ArrayImages(pixels, labels.astype(np.int64), f"{name} ({part})")
    return split(DataSet(name, tuple(str(k) for k in range(CLASSES[name])), parts), seed=seed)


class FakeStore:
    """What merging needs of a store."""

    def __init__(self, frame: pd.DataFrame, bases: Mapping[str, Base], states: Mapping[tuple[str, int], Any]) -> None:
        self._frame, self._bases, self._states = frame, bases, states
        self.rows: dict[str, dict[str, Any]] = {}
        self.added: list[int] = []

    def frame(self) -> pd.DataFrame:
        return self._frame.copy()

    def base(self, digest: str) -> Base:
        return self._bases[digest]

    def state(self, digest: str, step: int | None = None) -> dict[str, Tensor]:
        found = self._states[digest, step if step is not None else max(s for d, s in self._states if d == digest)]
        return {name: tensor.clone() for name, tensor in found.items()}

    def merges(self) -> pd.DataFrame:
        return pd.DataFrame(list(self.rows.values()))

    def add_merges(self, rows: Iterable[Mapping[str, Any]]) -> int:
        new = [dict(row) for row in rows if row["key"] not in self.rows]
        self.rows.update({row["key"]: row for row in new})
        self.added.append(len(new))
        return len(new)


@cache
def _start(architecture: str, classes: int, options: tuple[tuple[str, Any], ...]) -> dict[str, Tensor]:
    return start_from(random_base(architecture, classes=10, options=dict(options), seed=3), classes, 0)[1]


def expert_state(base: Base, classes: int, seed: int, *, scale: float = 0.05) -> dict[str, Tensor]:
    """x_0 with a new head and noise on everything, positive variances kept positive."""
    rng = torch.Generator().manual_seed(seed)
    out = {}
    for name, tensor in _start(base.architecture, classes, tuple(base.options.items())).items():
        if not tensor.is_floating_point():
            out[name] = tensor + 3
            continue
        noise = scale * torch.randn(tensor.shape, generator=rng)
        out[name] = tensor * noise.exp() if name.endswith("running_var") else tensor + noise
    return out


def finished_grid(
    architecture: str = "mlp_8",
    *,
    rates: Iterable[float] = (0.01, 0.1),
    batch_sizes: Iterable[int] = (8, 16),
    seeds: Iterable[int] = (0, 1),
    steps: Iterable[int] = (5, 10),
    tasks: Iterable[str] = TASKS,
    options: Mapping[str, Any] | None = None,
    with_states: bool = True,
) -> FakeStore:
    """Every combination of the values, with random weights instead of training."""
    base = random_base(architecture, classes=10, options=options or {}, seed=3)
    rows, states = [], {}
    number = 0
    steps = tuple(steps)
    for task in tasks:
        digest = tiny_task(task).digest
        for rate in rates:
            for batch in batch_sizes:
                for seed in seeds:
                    run = f"{number:04d}{task}" + "f" * 56
                    for step in steps:
                        rows.append(
                            {
                                "digest": run, "step": step, "outcome": "finished", "task": task, "base": "{}",
                                "architecture": architecture, "base_kind": "random", "base_digest": base.digest,
                                "split_digest": digest, "split_seed": 0, "seed": seed, "learning_rate": rate,
                                "batch_size": batch, "steps": max(steps), "data_share": 1.0, "momentum": 0.9,
                                "clip_norm": None, "precision": "float32",
                            }
                        )  # fmt: skip
                        if with_states:
                            states[run, step] = expert_state(base, CLASSES[task], 1000 * number + step)
                    number += 1
    return FakeStore(pd.DataFrame(rows), {base.digest: base}, states)
