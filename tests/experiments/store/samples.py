"""Tiny runs for tests of the store."""

from __future__ import annotations

import numpy as np
import torch

from experiments.bases.base import Base, Provenance, make_base
from experiments.bases.spec import BaseSpec
from experiments.finetune.loop import TrainingLog
from experiments.grid.result import RunResult
from experiments.grid.run_spec import RunSpec


def tiny_base() -> Base:
    generator = torch.Generator().manual_seed(0)
    state = {
        "a.weight": torch.randn(4, 3, generator=generator),
        "bn.running_var": torch.ones(4),
        "bn.num_batches_tracked": torch.tensor(0),
        "head.weight": torch.randn(2, 4, generator=generator),
    }
    return make_base(state, "mlp", 2, {}, Provenance("random", "test"))


BASE = tiny_base()


def spec(seed: int, **changes: object) -> RunSpec:
    content = dict(task="digits:0", learning_rate=0.1, steps=4, batch_size=2, checkpoints=(2, 4), seed=seed)
    return RunSpec(base=BaseSpec(kind="random", architecture="mlp", classes=2), **{**content, **changes})


def digest(run: RunSpec) -> str:
    return run.digest(base=BASE.digest, split="s")


def specs(count: int) -> dict[str, RunSpec]:
    return {digest(run): run for run in map(spec, range(count))}


def result(seed: int, *, bits: int = 0, outcome: str = "finished", value: float = 0.5) -> RunResult:
    generator = torch.Generator().manual_seed(1000 * bits + seed)
    states = {
        step: {
            "a.weight": BASE.state["a.weight"] + 0.01 * torch.randn(4, 3, generator=generator),
            "bn.running_var": torch.rand(4, generator=generator),
            "bn.num_batches_tracked": torch.tensor(step),
            "head.weight": torch.randn(3, 4, generator=generator),
        }
        for step in ((2,) if outcome == "diverged" else (2, 4))
    }
    log = TrainingLog(np.full(4, 2.0), np.arange(4.0) + seed, np.ones(4), np.ones(4), 0.1, outcome == "finished")
    rows = tuple({"step": s, "part": "test", "name": "accuracy", "value": value, "n": 9} for s in states)
    return RunResult(outcome, states, log, rows, 0.1)  # type: ignore[arg-type]
