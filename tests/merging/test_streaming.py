"""Merging in chunks by compiled loops gives the bits of the definitions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from merging.merge import merge_state_dicts
from tests.merging.streamed import State, bits, in_chunks, saved

EXACT: list[tuple[str, dict[str, Any], bool]] = [
    ("average", {}, False),
    ("uniform_soup", {}, False),
    ("weighted", {}, True),
    ("weighted", {"normalize": False}, True),
    ("task_arithmetic", {"coefficient": 0.37}, False),
    ("task_arithmetic", {"coefficient": 0.37}, True),
    ("wise_ft", {"alpha": 0.3}, False),
    ("lines", {"alpha": 0.9, "beta": 0.7}, False),
    ("risk_optimal", {}, True),
    ("magmax", {"coefficient": 0.7}, False),
    ("ties", {}, False),
    ("ties", {"density": 0.37, "scope": "tensor"}, False),
    ("ties", {"density": 0.05, "rounding": "down", "aggregation": "sum", "coefficient": 0.4}, False),
    ("ties", {"density": 0.5, "election": "weighted"}, True),
    ("ties", {"density": 0.5, "election": "weighted", "aggregation": "sum", "scope": "tensor"}, True),
    ("ties", {"density": 0.5}, True),
    ("ties", {"density": 1.0}, False),
    ("dare", {"drop": 0.4}, False),
    ("dare", {"drop": 0.4, "rescale": False}, True),
    ("dare", {"drop": 0.0}, False),
    ("dare_ties", {"drop": 0.4}, False),
    ("dare_ties", {"drop": 0.7, "election": "weighted", "aggregation": "sum"}, True),
    ("tsv_m", {}, False),
    ("breadcrumbs", {}, False),
]
SPAN: list[tuple[str, dict[str, Any], bool]] = [
    ("karcher", {}, False),
    ("karcher", {"scope": "global", "on": "task_vectors"}, True),
    ("model_stock", {}, False),
    ("dare", {"drop": 0.4, "rescaling": "l1"}, True),
    ("dare_ties", {"drop": 0.4, "rescaling": "l1", "aggregation": "sum"}, False),
    ("dare_ties", {"drop": 0.4, "rescaling": "l1", "aggregation": "sum", "election": "weighted"}, True),
    ("model_stock", {"scope": "global", "average": "angle"}, False),
]


def family(experts: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[State, dict[str, State]]:
    """Checkpoints with ties, zeros, denormals, odd sizes, an empty tensor and running statistics."""
    rng = np.random.default_rng(seed)
    shapes = {
        "blocks.0.weight": (37, 53),
        "blocks.0.bias": (37,),
        "blocks.1.weight": (3, 5, 7, 11),
        "blocks.1.scale": (),
        "blocks.1.empty": (0, 4),
        "norm.running_mean": (37,),
        "norm.running_var": (37,),
    }

    def draw(shape: tuple[int, ...], scale: float) -> np.ndarray:
        values = rng.standard_normal(shape) * scale
        return np.where(rng.random(shape) < 0.3, np.round(values * 4) / 4 * scale, values)

    base = {name: torch.tensor(draw(shape, 1.0), dtype=dtype) for name, shape in shapes.items()}
    base["norm.running_var"] = base["norm.running_var"].abs()
    if dtype == torch.float32:
        base["blocks.0.bias"] *= 1e-39
    found = {}
    for i in range(experts):
        state = {}
        for name, tensor in base.items():
            moved = torch.tensor(draw(tuple(tensor.shape), 0.05), dtype=torch.float32)
            if name == "blocks.0.bias" and dtype == torch.float32:
                moved *= 1e-39
            state[name] = (tensor.float() + moved).to(dtype)
        state["norm.running_var"] = state["norm.running_var"].abs()
        found[f"expert{(i * 7) % 10}"] = state
    return base, found


@pytest.mark.parametrize(("method", "settings", "weighted"), EXACT)
@pytest.mark.parametrize("experts", [3, 8])
def test_the_bits_of_the_definition(
    method: str, settings: dict[str, Any], weighted: bool, experts: int, tmp_path: Path
) -> None:
    base, states = family(experts)
    coefficients = tuple(0.1 * (i + 1) for i in range(experts)) if weighted else None
    expected = merge_state_dicts(method, base, states, coefficients=coefficients, seed=5, **settings)
    on_disk, opened = saved(tmp_path, base, states)
    variants: list[dict[str, Any]] = [
        {},
        {"chunk": 64, "threads": 2},
        {"chunk": 1000, "mapped": False},
    ]
    for number, variant in enumerate(variants):
        target = tmp_path / f"out{number}.safetensors"
        found = in_chunks(method, on_disk, opened, target, coefficients=coefficients, seed=5, **variant, **settings)
        for name, tensor in found.items():
            assert np.array_equal(bits(tensor), bits(expected[name])), (name, variant)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("method", "settings"), [("average", {}), ("ties", {}), ("ties", {"scope": "tensor"}), ("dare_ties", {})]
)
def test_half_precision(method: str, settings: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    base, states = family(4, dtype=dtype)
    expected = merge_state_dicts(method, base, states, **settings)
    on_disk, opened = saved(tmp_path, base, states)
    for number, variant in enumerate([{}, {"chunk": 128, "threads": 2}, {"mapped": False}]):
        found = in_chunks(method, on_disk, opened, tmp_path / f"out{number}.safetensors", **variant, **settings)
        for name, tensor in found.items():
            assert np.array_equal(bits(tensor), bits(expected[name])), (name, variant)


@pytest.mark.parametrize("method", ["average", "weighted"])
def test_without_a_base(method: str, tmp_path: Path) -> None:
    base, states = family(3)
    coefficients = (0.2, 0.3, 0.4) if method == "weighted" else None
    expected = merge_state_dicts(method, None, states, coefficients=coefficients)
    _, opened = saved(tmp_path, base, states)
    found = in_chunks(method, None, opened, tmp_path / "out.safetensors", coefficients=coefficients)
    for name, tensor in found.items():
        assert np.array_equal(bits(tensor), bits(expected[name])), name


@pytest.mark.parametrize(("method", "settings", "weighted"), SPAN)
def test_span_methods_to_rounding(method: str, settings: dict[str, Any], weighted: bool, tmp_path: Path) -> None:
    """Gram matrices are summed in another order, so coefficients agree to about 1e-15 and weights to a rounding."""
    base, states = family(5)
    coefficients = tuple(0.1 * (i + 1) for i in range(5)) if weighted else None
    expected = merge_state_dicts(method, base, states, coefficients=coefficients, **settings)
    on_disk, opened = saved(tmp_path, base, states)
    first = None
    for number, variant in enumerate([{}, {"chunk": 512, "threads": 2}, {"mapped": False}]):
        found = in_chunks(
            method,
            on_disk,
            opened,
            tmp_path / f"out{number}.safetensors",
            coefficients=coefficients,
            **variant,
            **settings,
        )
        for name, tensor in found.items():
            assert torch.allclose(tensor, expected[name], rtol=1e-6, atol=1e-38), (name, variant)
        first = first or found
        assert all(np.array_equal(bits(found[name]), bits(first[name])) for name in found)
