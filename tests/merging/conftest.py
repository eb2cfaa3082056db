from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

State = dict[str, Tensor]
SHAPES = {"stem.weight": (4, 3, 3), "block.weight": (7, 5), "block.bias": (7,), "scale": (), "empty": (0, 3)}


@pytest.fixture(scope="session")
def golden() -> Path:
    return Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="session")
def random_state() -> Callable[..., State]:
    """A checkpoint of every tensor kind, seeded."""

    def make(seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> State:
        generator = torch.Generator().manual_seed(seed)
        state = {n: (scale * torch.randn(s, generator=generator)).to(dtype) for n, s in SHAPES.items()}
        state["norm.running_mean"] = scale * torch.randn(6, generator=generator)
        state["norm.running_var"] = torch.rand(6, generator=generator)
        state["norm.num_batches_tracked"] = torch.tensor(seed)
        state["head.weight"] = torch.randn(3, 4, generator=generator)
        return state

    return make


@pytest.fixture(scope="session")
def family(random_state: Callable[..., State]) -> Callable[..., tuple[State, dict[str, State]]]:
    """A base and N experts around it."""

    def make(experts: int = 3, seed: int = 0) -> tuple[State, dict[str, State]]:
        base = random_state(1000 + seed)
        around = {}
        for index in range(experts):
            noise = random_state(2000 + 100 * seed + index, 0.1)
            around[f"expert{index}"] = {
                name: noise[name] if "tracked" in name or "var" in name or "head" in name else tensor + noise[name]
                for name, tensor in base.items()
            }
        return base, around

    return make
