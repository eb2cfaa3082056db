"""Merging many groups against merging and evaluating them one by one, by the definitions."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from experiments.combine.api import Progress, combine
from experiments.combine.designs import all_groups, by_factor, random_groups
from experiments.combine.effects import factor_differences
from experiments.combine.groups import Group
from experiments.combine.recipe import Evaluate, MergeMethod
from experiments.combine.rows import results
from experiments.evaluate.evaluate import evaluate
from experiments.evaluate.normalised import normalised
from experiments.evaluate.results import EvaluationSet
from experiments.finetune.task_expert import start_from
from experiments.inputs.resident import residents
from experiments.models import head_prefix, input_format
from merging.batchnorm import reestimate_batchnorm
from merging.merge import merge_state_dicts
from merging.partition import partition
from tests.experiments.combine.grids import CLASSES, FakeStore, finished_grid, tiny_task
from theory.errors import MergeboundError

METHODS = (
    MergeMethod("average"),
    MergeMethod("task_arithmetic", {"coefficient": 0.4}),
    MergeMethod("ties", {"density": 0.3}),
    MergeMethod("dare_ties", {"drop": 0.5}, seed=7),
    MergeMethod("weighted", coefficients=0.5),
    MergeMethod("tsv_m"),
)


def literal(
    store: FakeStore, group: Group, method: MergeMethod, spec: Evaluate, *, keep: bool = False
) -> dict[str, Any]:
    """Load, merge, load into a network, evaluate: one group, task by task, each with its own expert's head."""
    base = store.base(group.base)
    states = {member.name: store.state(member.run, member.step) for member in group.members}
    prefix = head_prefix(base.model())
    own = {k: v for k, v in base.state.items() if k.startswith(prefix)}
    merged = merge_state_dicts(
        method.name,
        dict(base.state),
        {name: {**state, **own} for name, state in states.items()},
        partition=partition(base.state, private=[f"{prefix}*"]),
        coefficients=None if method.coefficients is None else list(method.for_size(len(states)) or ()),
        seed=method.seed,
        **method.settings,
    )  # fmt: skip
    form = input_format(base.model())
    if spec.batchnorm == "reestimated":
        parts = [residents(tiny_task(member.task), form)[1] for member in group.members]
        merged = reestimate_batchnorm(base.model(), merged, [p.batch(np.arange(len(p)), 0)[0] for p in parts])
    found = {}
    for member in group.members:
        network, _ = start_from(base, CLASSES[member.task], 0)
        head = {name: tensor for name, tensor in states[member.name].items() if name.startswith(prefix)}
        network.load_state_dict({**merged, **head})
        test = residents(tiny_task(member.task), form)[2]
        data = EvaluationSet(member.task, test, member.split, 0)
        found[member.task] = evaluate(network, data, batch_size=spec.batch_size, resamples=0)
    if keep:
        return found
    row: dict[str, Any] = {f"accuracy/{task}": one.metrics.accuracy for task, one in found.items()}
    row |= {f"loss/{task}": one.metrics.loss for task, one in found.items()}
    for name in ("accuracy", "loss", "brier", "ece"):
        row[name] = sum(1.0 / len(found) * getattr(one.metrics, name) for one in found.values())
    return row


def assert_literal(store: FakeStore, groups: list[Group], method: MergeMethod, table: pd.DataFrame, spec: Evaluate):
    rows = table[table["label"] == method.label].to_dict("records")
    assert len(rows) == len(groups)
    for group, row in zip(groups, rows, strict=True):
        wanted = literal(store, group, method, spec)
        assert {name: row[name] for name in wanted} == wanted


@pytest.mark.parametrize("architecture", ["mlp_8", "resnet_bn", "vit"])
def test_every_metric_has_the_bits_of_the_literal_way(architecture: str) -> None:
    options = {"img_size": 8, "in_chans": 1} if architecture == "mlp_8" else None
    store = finished_grid(architecture, batch_sizes=(8,), seeds=(0,), steps=(10,), options=options)
    methods = METHODS if architecture == "mlp_8" else METHODS[:1] + METHODS[2:3]
    groups = list(random_groups(store.frame(), sizes=(2, 3), groups=3))
    spec = Evaluate(batch_size=16)
    table = combine(store, groups, methods, evaluate=spec, open_task=tiny_task, job=4)
    for method in methods:
        assert_literal(store, groups, method, table, spec)


def test_reestimated_statistics_are_those_of_the_groups_calibration_images() -> None:
    store = finished_grid("resnet_bn", batch_sizes=(8,), seeds=(0,), steps=(10,), rates=(0.1,))
    groups, spec = list(random_groups(store.frame(), sizes=(2,), groups=2)), Evaluate(batchnorm="reestimated")
    table = combine(store, groups, ["average"], evaluate=spec, open_task=tiny_task)
    assert_literal(store, groups, MergeMethod("average"), table, spec)
    merged = combine(store, groups, ["average"], open_task=tiny_task)
    assert (merged["loss"] != table["loss"]).all()
    assert list(merged["expert_loss"]) == list(table["expert_loss"])


def test_references_are_the_experts_and_the_base_through_their_heads() -> None:
    store = finished_grid("mlp_8", batch_sizes=(8,), seeds=(0,), steps=(10,), options={"img_size": 8, "in_chans": 1})
    [group] = random_groups(store.frame(), sizes=(3,), groups=1)
    spec = Evaluate()
    row = combine(store, [group], ["average"], open_task=tiny_task).iloc[0]
    own = {}
    for member in group.members:
        alone = Group((member,), group.base)
        own |= literal(store, alone, MergeMethod("average"), spec, keep=True)
    assert row["expert_accuracy"] == np.mean([one.metrics.accuracy for one in own.values()])
    at_base = []
    for member in group.members:
        state = store.state(member.run, member.step)
        network, _ = start_from(store.base(group.base), CLASSES[member.task], 0)
        prefix = head_prefix(network)
        head = {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
        network.load_state_dict({**network.state_dict(), **head})
        test = residents(tiny_task(member.task), input_format(network))[2]
        at_base.append(evaluate(network, test, resamples=0).metrics.loss)
    assert row["base_loss"] == np.mean(at_base)
    merged = literal(store, group, MergeMethod("average"), spec, keep=True)
    comparison = {c.task: c.ratio.value for c in normalised(list(merged.values()), experts=own, resamples=0)}
    assert row["normalised"] == pytest.approx(comparison["mean_of_ratios"], rel=1e-12)
    assert row["normalised_of_means"] == pytest.approx(comparison["ratio_of_means"], rel=1e-12)


def small() -> FakeStore:
    return finished_grid("mlp_8", seeds=(0,), options={"img_size": 8, "in_chans": 1})


def test_what_was_measured_is_not_measured_again() -> None:
    store, seen = small(), []
    design = by_factor(store.frame(), "learning_rate", sizes=(2,), groups=3)
    first = combine(store, design, ["average"], open_task=tiny_task, watch=seen.append)
    assert [(p.phase, p.total) for p in seen if p.done == p.total][-1] == ("merges", len({g.digest for g in design}))
    more, seen = by_factor(store.frame(), "learning_rate", sizes=(2,), groups=5), []
    second = combine(store, more, ["average"], open_task=tiny_task, watch=seen.append)
    kept = seen[-1].kept
    assert kept == first["key"].nunique()
    assert seen[-1].total == second["key"].nunique() - kept
    assert set(first["key"]) <= set(second["key"])
    before = len(store.rows)
    again = combine(store, more, ["average"], open_task=None, root="/nowhere")  # nothing is opened
    assert len(store.rows) == before
    pd.testing.assert_frame_equal(again, second)


def test_settings_seeds_and_evaluation_name_a_merge() -> None:
    store = small()
    [group] = random_groups(store.frame(), sizes=(2,), groups=1)
    ties, dare = MergeMethod("ties"), MergeMethod("dare")
    from dataclasses import replace

    from experiments.combine.recipe import merge_key

    spec = Evaluate()
    keys = {
        merge_key(group, ties, spec),
        merge_key(group, MergeMethod("ties", {"density": 0.3}), spec),
        merge_key(group, dare, spec),
        merge_key(group, replace(dare, seed=1), spec),
        merge_key(group, ties, Evaluate(images=10)),
        merge_key(group, ties, Evaluate(batchnorm="reestimated")),
    }
    assert len(keys) == 6
    # what changes no bit changes no name: a default said aloud, a seed that is not used, what the group was drawn for
    assert merge_key(group, MergeMethod("ties", {"density": ties.filled["density"]}), spec) in keys
    assert merge_key(group, replace(ties, seed=5), spec) in keys
    assert merge_key(replace(group, seed=9, factor="x", level=2), ties, spec) in keys


def test_one_measurement_serves_two_designs() -> None:
    store = small()
    pairs = all_groups(store.frame(), fixed={"learning_rate": 0.1, "batch_size": 8})
    table = combine(store, pairs, ["average"], open_task=tiny_task)
    count = len(store.rows)
    factor = by_factor(store.frame(), "learning_rate", sizes=(2,), groups=4)
    other = combine(store, factor, ["average"], open_task=tiny_task)
    at_high = other[other["level"] == 0.1]
    assert set(at_high["key"]) <= set(table["key"])
    assert len(store.rows) > count
    joined = results(store.merges())
    assert len(joined) == len(pairs) + len(factor)
    assert set(joined["design"]) == {"all", "factor"}


def test_task_vectors_that_do_not_fit_are_mapped_and_give_the_same(tmp_path) -> None:
    store = small()
    groups = list(all_groups(store.frame(), fixed={"batch_size": 8}))
    plain = combine(store, groups, ["average", MergeMethod("ties")], open_task=tiny_task)
    other = small()
    other.added.clear()
    width = sum(tensor.numel() for tensor in other.base(groups[0].base).state.values()) * 4
    mapped = combine(
        other, groups, ["average", MergeMethod("ties")], open_task=tiny_task, memory=12 * width, scratch=tmp_path,
        test_memory=5000,
    )  # fmt: skip
    timing = ["seconds", "seconds_merge"]
    pd.testing.assert_frame_equal(plain.drop(columns=timing), mapped.drop(columns=timing))
    assert list(tmp_path.iterdir()) == []


def test_test_sets_take_no_more_memory_than_allowed() -> None:
    from experiments.combine.bench import Bench
    from experiments.combine.groups import Member

    store = small()
    base = store.base(store.frame()["base_digest"].iloc[0])
    room = 3 * 40 * 64 * 5  # three sets of 40 images: a byte, and four prepared, for each pixel
    bench = Bench(base, Evaluate(), tiny_task, memory=room)
    opened = []
    bench.tests._open = lambda name, seed: opened.append(name) or tiny_task(name, seed)
    names = ("ants", "bees", "ants", "cats", "dogs", "ants", "cats")
    for name in names:
        assert bench.tests.of(Member(name, "r", 1)).data.name == name
        assert bench.tests.bytes <= room
    assert opened == ["ants", "bees", "cats", "dogs", "ants"][: len(opened)]
    assert len(opened) in (4, 5)
    less = Bench(base, Evaluate(), tiny_task, memory=room // 3)
    assert less.tests.of(Member("ants", "r", 1)).ready is None  # prepared anew every time


def test_jobs_hold_no_more_experts_than_fit() -> None:
    from experiments.combine.merge_many_groups import merge_jobs

    groups = list(all_groups(finished_grid(with_states=False).frame()))
    jobs = list(merge_jobs(groups, MergeMethod("average"), groups[0].base, size=50, experts=5))
    assert [group for job in jobs for group in job.groups] == groups
    assert max(len({m for g in job.groups for m in g.members}) for job in jobs) <= 5


def test_a_fast_path_says_so_and_stays_close() -> None:
    store = finished_grid("resnet_bn", batch_sizes=(8,), seeds=(0,), steps=(10,), rates=(0.1,))
    groups = list(random_groups(store.frame(), sizes=(2,), groups=2))
    plain = combine(store, groups, ["average"], open_task=tiny_task)
    fast = combine(store, groups, ["average"], evaluate=Evaluate(fast=True), open_task=tiny_task)
    assert set(plain["key"]).isdisjoint(fast["key"])
    assert np.abs(plain["loss"] - fast["loss"]).max() < 0.1 * plain["loss"].max()


def test_a_subset_of_the_test_images_is_drawn_by_the_splits_seed() -> None:
    from experiments.combine.testing import some_of

    images = tiny_task("ants").test
    some = some_of(images, 10, 0)
    assert len(some) == 10
    assert list(some.rows) == sorted(set(some.rows))
    assert list(some.rows) != list(some_of(images, 10, 1).rows)
    store = small()
    row = combine(store, list(random_groups(store.frame(), sizes=(2,), groups=1)), ["average"],
                  evaluate=Evaluate(images=10), open_task=tiny_task).iloc[0]  # fmt: skip
    assert row["n"] == 20


@pytest.mark.parametrize(
    ("methods", "spec", "message"),
    [
        (["tise"], Evaluate(), "did you mean|choose"),
        ([MergeMethod("ties", {"density": 2.0})], Evaluate(), "density"),
        (["fisher"], Evaluate(), "needs data beyond the checkpoints"),
        (["weighted"], Evaluate(), "needs coefficients"),
        ([MergeMethod("weighted", coefficients=(1.0, 2.0, 3.0))], Evaluate(), "3 coefficients for groups of 2"),
        ([MergeMethod("wise_ft", coefficients=0.5)], Evaluate(), "takes no coefficients"),
        (["average", "average"], Evaluate(), "given twice"),
        ([], Evaluate(), "no method"),
        (["average"], Evaluate(images=0), "images = 0"),
        (["average"], Evaluate(batchnorm="new"), "batchnorm = 'new'"),  # type: ignore[arg-type]
        (["average"], Evaluate(batchnorm="reestimated"), "no BatchNorm statistics"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_measured(methods, spec, message) -> None:
    store = small()
    groups = list(random_groups(store.frame(), sizes=(2,), groups=1))
    with pytest.raises(MergeboundError, match=message):
        combine(store, groups, methods, evaluate=spec, open_task=tiny_task)
    assert not [row for row in store.rows.values() if row["kind"] == "merge"]


def test_other_data_than_the_grids_are_refused() -> None:
    store = small()
    groups = list(random_groups(store.frame(), sizes=(2,), groups=1))
    with pytest.raises(MergeboundError, match=r"ants.*are not those that the grid was run with|.*are not those"):
        combine(store, groups, ["average"], open_task=lambda name, seed: tiny_task(name, seed, images=20))


def test_a_network_that_is_all_head_is_refused() -> None:
    store = finished_grid("logistic", seeds=(0,), steps=(10,), options={"img_size": 8, "in_chans": 1})
    with pytest.raises(MergeboundError, match="logistic: has no layers before its head"):
        combine(store, random_groups(store.frame(), sizes=(2,), groups=1), ["average"], open_task=tiny_task)


def test_weights_that_are_not_finite_are_named() -> None:
    store = small()
    groups = list(random_groups(store.frame(), sizes=(2,), groups=1))
    member = groups[0].members[0]
    state = store._states[member.run, member.step]
    next(iter(state.values())).fill_(float("nan"))
    with pytest.raises(MergeboundError, match="merging by average"):
        combine(store, groups, ["average"], open_task=tiny_task)


def test_progress_has_a_rate() -> None:
    assert Progress("merges", 10, 20, 0, 2.0).rate == 5.0
    assert json.loads(Evaluate().text)["batch_size"] == 256
    assert torch.get_num_threads() >= 1


def test_one_method_with_two_seeds_is_two_methods() -> None:
    store = small()
    design = by_factor(store.frame(), "learning_rate", sizes=(2,), groups=3)
    seeds = [MergeMethod("dare", {"drop": 0.5}, seed=seed) for seed in (0, 1)]
    table = combine(store, design, seeds, open_task=tiny_task)
    assert len(table) == 2 * len(design)
    assert sorted(set(table["merge_seed"])) == [0, 1]
    gaps = factor_differences(table, "loss")
    assert list(gaps["groups"]) == [3, 3]
    for seed, gap in zip((0, 1), gaps["mean"], strict=True):
        own = table[table["merge_seed"] == seed].set_index(["level", "seed"])["loss"]
        assert gap == pytest.approx(float((own.loc[0.1] - own.loc[0.01]).mean()))
