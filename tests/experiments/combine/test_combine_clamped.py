"""Merges whose BatchNorm variances become negative are counted, told of once for each method, and shown."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
import pandas as pd
import pytest
import torch

from experiments.combine.api import combine
from experiments.combine.clamped import clamped_counts
from experiments.combine.designs import random_groups
from experiments.combine.recipe import Evaluate, MergeMethod
from experiments.store import Store
from merging.merge import flat_space
from merging.partition import is_variance, partition
from merging.variances import zero_share, zero_shares
from tests.experiments.combine.grids import FakeStore, finished_grid, tiny_task


def shrunk() -> FakeStore:
    """Experts whose running variances fell to 0.2 to 0.9 of the base's 1: some of x_0 + d_1 + d_2 are negative."""
    store = finished_grid("resnet_bn", batch_sizes=(8,), seeds=(0,), steps=(10,), rates=(0.1,))
    rng = np.random.default_rng([0, 0xC1A3])
    for state in store._states.values():
        for name, tensor in state.items():
            if is_variance(name):
                tensor.copy_(torch.from_numpy(rng.uniform(0.2, 0.9, tensor.shape)))
    return store


def by_hand(store: FakeStore, experts: str, base: Mapping[str, torch.Tensor]) -> float:
    """Share of the variances below 0 in x_0 + d_1 + d_2, tensor by tensor, in float64."""
    states = [store.state(*one.split("@")[:1]) for one in experts.split(";")]
    sums = [
        (base[name].double() + sum(state[name].double() - base[name].double() for state in states)).flatten()
        for name in base
        if is_variance(name)
    ]
    return float((torch.cat(sums) < 0).double().mean())


def test_task_arithmetic_at_one_is_counted_and_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    store = shrunk()
    groups = list(random_groups(store.frame(), sizes=(2,), groups=3))
    methods = [MergeMethod("task_arithmetic", {"coefficient": 1.0}), MergeMethod("average")]
    with caplog.at_level(logging.WARNING, logger="experiments.combine"):
        table = combine(store, groups, methods, open_task=tiny_task)
    [warning] = [record.getMessage() for record in caplog.records]
    assert warning.startswith("task_arithmetic")
    assert "in 3 of 3 merges" in warning
    assert "--batchnorm reestimated" in warning
    base = store.base(groups[0].base).state
    wanted = {True: 0.0}
    for row in table.to_dict("records"):
        share = by_hand(store, row["experts"], base) if row["method"] == "task_arithmetic" else 0.0
        assert row["clamped"] == pytest.approx(share, abs=1e-12)
        wanted[row["method"] == "average"] = max(share, wanted.get(row["method"] == "average", 0.0))
    assert 0.05 < wanted[False] < 0.95
    first, second = clamped_counts(table)
    assert (first.merges, first.of, first.not_recorded, first.largest) == (3, 3, 0, table["clamped"].max())
    assert second.merges == 0
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="experiments.combine"):  # a second call tells of what is there
        combine(store, groups, methods[:1], open_task=tiny_task)
        combine(store, groups[:1], methods[:1], open_task=tiny_task, evaluate=Evaluate(batchnorm="reestimated"))
    assert len(caplog.records) == 1


def test_rows_of_older_versions_are_not_recorded() -> None:
    table = pd.DataFrame({"label": ["a", "a", "b"], "clamped": [0.5, float("nan"), 0.0]})
    first, second = clamped_counts(table)
    assert (first.merges, first.of, first.not_recorded) == (1, 1, 1)
    assert (second.merges, second.of) == (0, 1)
    [both] = clamped_counts(table.drop(columns="clamped").assign(label="a"))
    assert (both.merges, both.of, both.not_recorded) == (0, 0, 3)
    assert clamped_counts(table[:0]) == ()


def test_a_block_has_the_shares_of_its_merges() -> None:
    rng = torch.Generator().manual_seed(0)
    base = {"w": torch.ones(3), "a.running_var": torch.tensor([1.0, 0.0]), "b.running_var": torch.ones(3)}
    space = flat_space(base, partition(base, private=[]), None)
    origin = space.flatten(base)
    block = torch.randn(20, space.size, generator=rng).clamp_(min=0.0)
    deltas = torch.zeros(2, space.size)
    assert zero_shares(space, origin, block, deltas) == [zero_share(space, origin, row, deltas) for row in block]
    assert max(zero_shares(space, origin, block, deltas)) > 0
    plain = flat_space({"w": torch.ones(3)}, partition({"w": torch.ones(3)}, private=[]), None)
    assert zero_shares(plain, torch.ones(3), torch.zeros(2, 3), torch.zeros(1, 3)) == [0.0, 0.0]


def test_status_counts_them(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with Store.create(tmp_path / "s", durable=False) as store:
        rows = [{"key": str(k), "clamped": share, "loss": float("nan")} for k, share in enumerate((0.0, 0.01, 0.5))]
        store.add_merges([*rows, {"key": "old", "loss": 1.0}])
        assert (store.status().merges, store.status().clamped) == (4, 2)
