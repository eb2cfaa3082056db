"""Merging in chunks by compiled loops gives the bits of the definitions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from merging.checkpoint import load_state_dict, open_checkpoint, save_state_dict
from merging.merge import merge_state_dicts
from merging.partition import partition
from merging.registry import get
from merging.settings import resolve
from merging.stream import Stream
from merging.streaming.output import OutputFile
from merging.streaming.plan import Plan, plan
from merging.streaming.run import run, stored_specs
from merging.types import StateDict
from merging.writer import outline_of

State = dict[str, Tensor]
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


def in_chunks(
    method: str,
    base: StateDict | None,
    experts: dict[str, StateDict],
    target: Path,
    *,
    coefficients: Any = None,
    chunk: int | None = None,
    threads: int = 1,
    seed: int = 0,
    mapped: bool = True,
    dtypes: dict[str, torch.dtype] | None = None,
    **settings: Any,
) -> dict[str, Tensor]:
    chosen = get(method)
    reference = experts[min(experts)] if base is None else base
    parts = partition(reference)
    covered = parts.coordinates if chosen.linear or chosen.merges_buffers else parts.shared
    groups = resolve(chosen, covered, settings, coefficients, (), tuple(experts))
    stream = Stream(chosen, base, reference, experts, parts, groups, seed, dtypes)
    stored = stored_specs(stream)
    made = plan(stream, stored, threads=threads)
    assert made is not None
    if chunk is not None:
        made = recut(made, chunk)
    run(stream, made, stored, {}, [OutputFile(target, outline_of(stored, {}))], mapped=mapped)
    return load_state_dict(target)


def recut(made: Plan, chunk: int) -> Plan:
    """The same plan with other chunks."""
    from dataclasses import replace

    from merging.streaming.plan import Task

    tasks: list[Task] = []
    for task in made.tasks:
        whole = task.batch is not None and made.batches[task.batch].program is None
        step = task.stop - task.start if whole else chunk
        tasks += [
            Task(task.name, start, min(task.stop, start + step), task.batch)
            for start in range(task.start, task.stop, max(1, step))
        ]
    return replace(made, tasks=tuple(tasks), chunk=chunk)


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


def saved(folder: Path, base: State, experts: dict[str, State]) -> tuple[StateDict, dict[str, StateDict]]:
    for name, state in {"base": base, **experts}.items():
        if not (folder / f"{name}.safetensors").exists():
            save_state_dict(folder / f"{name}.safetensors", state)
    return open_checkpoint(folder / "base.safetensors"), {
        name: open_checkpoint(folder / f"{name}.safetensors") for name in experts
    }


def bits(tensor: Tensor) -> np.ndarray:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy() if tensor.numel() else np.zeros(0, np.uint8)


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


def test_selection_over_large_domains_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Histograms over bit patterns, brackets that miss, and ties across tensors, against a sorted list."""
    from merging.streaming import selection
    from merging.streaming.source import Inputs

    rng = np.random.default_rng(3)
    monkeypatch.setattr(selection, "SMALL", 100)
    for collected in (0, 1 << 24):
        monkeypatch.setattr(selection, "_COLLECTED", collected)
        for case in range(12):
            sizes = [("a", 5000), ("b", 70), ("c", 20011)]
            values = {name: rng.standard_normal(n).astype(np.float32) for name, n in sizes}
            if case % 3 == 1:  # few distinct values
                values = {name: np.round(v * 2) / 2 for name, v in values.items()}
            if case % 3 == 2:  # sizes that differ between tensors, and many zeros
                values = {name: v * 10.0 ** (3 * i) * (v > 0) for i, (name, v) in enumerate(values.items())}
            state = {name: torch.from_numpy(v.astype(np.float32)) for name, v in values.items()}
            flat = np.abs(np.concatenate([state[name].numpy() for name, _ in sizes]))
            inputs = Inputs(None, [state])
            for keep in (1, 17, 5000, 12345, len(flat) - 1):
                threshold = selection.select(inputs, sizes, keep, chunk=512)[0]
                places = np.arange(len(flat))
                chosen = (flat > threshold.value) | ((flat == threshold.value) & (places < threshold.cut))
                order = np.lexsort((places, -flat.astype(np.float64)))
                assert set(order[:keep].tolist()) - set(np.flatnonzero(flat == 0).tolist()) <= set(
                    np.flatnonzero(chosen).tolist()
                )
                assert chosen.sum() == keep
