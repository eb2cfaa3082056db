"""Tiny networks and data for the reference loop, and its batches recomputed from the documented streams."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.bases.spec import BaseSpec
from experiments.finetune.loop import batches
from experiments.grid.run_spec import RunSpec
from experiments.inputs.shares import nested_subset
from experiments.tasks.types import Split

CLASSES = 3
BASE = BaseSpec(kind="random", architecture="vit", classes=CLASSES)


class Net(nn.Module):
    """Convolution, BatchNorm, linear layer, and a head, for (1, 4, 4) images."""

    def __init__(self, drop: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(1, 4, 3, bias=False)
            self.bn = nn.BatchNorm2d(4)
            self.body = nn.Linear(16, 6)
            self.drop = nn.Dropout(drop)
            self.head = nn.Linear(6, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        maps = torch.tanh(self.bn(self.conv(images)))
        logits: Tensor = self.head(self.drop(torch.tanh(self.body(maps.flatten(1)))))
        return logits

    def get_classifier(self) -> nn.Module:
        return self.head


def sample(n: int = 23, seed: int = 0) -> Split:
    rng = np.random.default_rng([seed, 1])
    images = torch.from_numpy(rng.standard_normal((n, 1, 4, 4), dtype=np.float32))
    return Split(images, torch.from_numpy(rng.integers(0, CLASSES, n)), np.arange(n))


def spec(**changes: Any) -> RunSpec:
    usual = {
        "task": "t",
        "base": BASE,
        "learning_rate": 0.1,
        "steps": 30,
        "batch_size": 5,
        "data_share": 0.8,
        "seed": 4,
    }
    return RunSpec.model_validate({**usual, **changes})


def start_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def recorded(run: RunSpec, data: Split) -> list[tuple[Tensor, Tensor]]:
    """The batches of a run, in float64."""
    rows = nested_subset(len(data), run.data_share, run.seed)
    drawn = batches(len(rows), run.batch_size, run.steps, run.sampling, np.random.default_rng([run.seed, 0xBA7C]))
    return [(data.images[rows[batch]].double(), data.labels[rows[batch]]) for batch in drawn]


def assert_same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], tolerance: float = 0.0) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(
            tensor, theirs[name], rtol=tolerance, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )


def length(tensors: list[Tensor]) -> float:
    return float(torch.cat([t.detach().reshape(-1) for t in tensors]).norm()) if tensors else 0.0
