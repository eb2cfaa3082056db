"""Agreement with what other tools wrote on the same input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from merging.checkpoint import load_state_dict
from merging.merge import merge_state_dicts

WEIGHTS = (0.4, 0.3, 0.2, 0.1)


@pytest.mark.parametrize(
    ("file", "method", "settings"),
    [
        ("mergekit/linear_normalized", "weighted", {"coefficients": WEIGHTS}),
        ("mergekit/linear_normalized", "weighted", {"coefficients": tuple(10 * w for w in WEIGHTS)}),
        ("mergekit/linear_normalized", "risk_optimal", {"coefficients": WEIGHTS}),
        ("mergekit/task_arithmetic_w", "task_arithmetic", {"coefficient": 1.0, "coefficients": WEIGHTS}),
        ("mergekit/ties_tensor_density0.3", "ties", {"density": 0.3, "scope": "tensor", "rounding": "down"}),
        ("fusionbench/ties_global_keep20_mean_scale0.7", "ties", {"density": 0.2, "coefficient": 0.7}),
        (
            "fusionbench/ties_global_keep20_sum_scale0.7",
            "ties",
            {"density": 0.2, "coefficient": 0.7, "aggregation": "sum"},
        ),
    ],
)
def test_agrees_with_other_tools(golden: Path, file: str, method: str, settings: dict[str, Any]) -> None:
    base = load_state_dict(golden / "base.safetensors")
    experts = {f"expert{i}": load_state_dict(golden / f"expert{i}.safetensors") for i in range(4)}
    expected = load_state_dict(golden / f"{file}.safetensors")
    merged = merge_state_dicts(method, base, experts, **settings)
    assert set(merged) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-4, atol=1e-6)
