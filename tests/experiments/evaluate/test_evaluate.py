"""Evaluation per task and joint: literal sums, intervals that cover, images that tasks share, rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from experiments.evaluate.bootstrap import bootstrap_means, percentile
from experiments.evaluate.evaluate import combine, evaluate, evaluate_tasks, evaluation, over_groups
from experiments.evaluate.metrics import score
from experiments.evaluate.predictions import extract, outputs
from experiments.evaluate.results import EvaluationSet
from experiments.inputs.resident import residents
from experiments.measure.backbone import Backbone, Readout
from experiments.models import build_model, head_prefix
from experiments.tasks.digits8 import EIGHT, digits8
from experiments.tasks.digits_images import digits_task
from experiments.tasks.form import InputFormat
from experiments.tasks.images import Subset, shared_rows
from experiments.tasks.types import Split
from theory.errors import MergeboundError
from theory.function_space import joint_standard_error


def split(seed: int, n: int = 50, classes: int = 4) -> Split:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 1, 2, 2, generator=generator)
    return Split(images, torch.randint(0, classes, (n,), generator=generator), np.arange(n))


def linear(seed: int, classes: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, classes))


def test_numbers_are_those_of_a_plain_loop() -> None:
    data, model = split(0), linear(0)
    model.train()
    found = evaluate(model, data, task="t", digest="d", split_seed=3, batch_size=7)
    with torch.no_grad():
        logits = model(data.images)
    assert found.metrics.loss == pytest.approx(float(nn.functional.cross_entropy(logits, data.labels)), rel=1e-6)
    assert found.metrics.correct == int((logits.argmax(1) == data.labels).sum())
    assert all(module.training for module in model.modules())
    again = evaluate(model, EvaluationSet("t", data, "d", 3), batch_size=50)
    row = found.to_row()
    for name, value in again.to_row().items():  # the network itself rounds differently in other batches
        assert value == (pytest.approx(row[name], rel=1e-5) if isinstance(value, float) else row[name])
    assert (row["task"], row["tier"], row["n"], row["path"]) == ("t", "measured", 50, "fp32")
    assert (row["split_digest"], row["split_seed"], row["bootstrap_seed"]) == ("d", 3, 0)
    assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]


def test_modes_come_back_one_by_one() -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model.train()
    model[1].eval()
    before = model[1].running_mean.clone()
    evaluate(model, split(0), resamples=0)
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert torch.equal(model[1].running_mean, before)


def test_joint_is_the_weighted_mean_and_features_meet_their_heads() -> None:
    family = digits8(tasks=("identity", "flip", "roll"))
    model = build_model("resnet_bn").eval()
    heads = {name: linear_head(seed) for seed, name in enumerate(family.tasks)}
    sets = [EvaluationSet.of_split(name, task.test, family.seed) for name, task in family.tasks.items()]
    weights = {"identity": 2.0, "flip": 1.0, "roll": 1.0}
    joint = evaluate_tasks(model, heads, sets, weights=weights, resamples=50)
    assert joint.weights == (0.5, 0.25, 0.25)
    backbone = Backbone.of(model, model.state_dict())
    vector = backbone.vector(model.state_dict())
    for name, task in family.tasks.items():
        logits = heads[name].logits(backbone.features(vector, task.test.images))
        loss = float(nn.functional.cross_entropy(logits, task.test.labels))
        assert joint[name].metrics.loss == pytest.approx(loss, rel=1e-5)
    losses = [one.metrics.loss for one in joint.tasks]
    assert joint.joint["loss"].value == pytest.approx(np.dot(joint.weights, losses), rel=1e-12)
    row = joint.to_row()
    assert row["loss/flip"] == losses[1]
    assert row["weight/identity"] == 0.5
    assert row["split_digest/roll"] == sets[2].digest
    assert len(pd.DataFrame(joint.to_rows())) == 3
    with pytest.raises(KeyError):
        joint["no"]


def linear_head(seed: int) -> Readout:
    generator = torch.Generator().manual_seed(seed)
    return Readout(torch.randn(10, 40, generator=generator), torch.randn(10, generator=generator))


def test_features_are_what_the_head_reads() -> None:
    model, task = build_model("vit").eval(), digits8().tasks["flip"]
    features, labels = extract(model, task.test, batch_size=64)
    logits, _ = outputs(model, task.test)
    state, prefix = model.state_dict(), head_prefix(model)
    assert torch.allclose(features @ state[prefix + "weight"].T + state[prefix + "bias"], logits, atol=1e-5)
    assert torch.equal(labels, task.test.labels)


def test_digest_tells_splits_apart() -> None:
    a, b, c = (EvaluationSet.of_split("t", split(seed)).digest for seed in (0, 0, 1))
    assert a == b != c
    assert EvaluationSet.of_split("u", split(0)).digest != a


def test_bootstrap_agrees_with_the_normal_approximation() -> None:
    rng = np.random.default_rng(0)
    values = rng.exponential(size=(400, 1))
    draws = bootstrap_means([values], resamples=4000, seed=1)[0][:, 0]
    assert draws.std() == pytest.approx(values.std() / 20, rel=0.06)
    assert draws.mean() == pytest.approx(values.mean(), abs=0.01)
    found = percentile(float(values.mean()), draws)
    assert (found.low, found.high) == pytest.approx(
        tuple(values.mean() + np.array([-1.96, 1.96]) * values.std() / 20), abs=0.02
    )
    assert np.array_equal(draws, bootstrap_means([values], resamples=4000, seed=1)[0][:, 0])


@pytest.mark.parametrize("shared", [True, False])
def test_images_that_tasks_share_are_drawn_together(shared: bool) -> None:
    """The spread of the joint loss against theory's standard error, which counts images once."""
    rng = np.random.default_rng(2)
    common = rng.exponential(size=300)
    losses = [common, common + 0.1 * rng.standard_normal(300)]
    sources = [np.arange(300)] * 2 if shared else None
    draws = bootstrap_means([loss[:, None] for loss in losses], sources=sources, resamples=3000)
    spread = np.mean([block[:, 0] for block in draws], axis=0).std()
    assert spread == pytest.approx(joint_standard_error(losses, sources), rel=0.06)


def test_tasks_of_the_embedded_digits_share_their_test_images() -> None:
    sets, tasks = [], [digits_task(name, seed=1) for name in EIGHT[:2]]
    for task in tasks:
        data = residents(task, InputFormat(1, 8, 8))[2]
        sets.append(EvaluationSet.of_task(task, data))
    rows = digits8(seed=1).tasks[EIGHT[0]].test.source
    assert all(np.array_equal(each.source, rows) for each in sets)
    assert np.array_equal(shared_rows(Subset(tasks[0].test, np.array([3, 1]))), rows[[3, 1]])
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with torch.no_grad():  # of the second task the network sees the first one's logits: all errors are common
        network[1].weight.copy_(torch.randn(10, 64, generator=torch.Generator().manual_seed(0)))
    one = evaluate(network, sets[0])
    joint = combine([one, replace(one, task="again", source=sets[1].source)])
    own, both = one.intervals["accuracy"], joint.joint["accuracy"]
    assert both.high - both.low == pytest.approx(own.high - own.low, rel=0.2)


def test_tasks_that_overlap_in_part_or_through_others() -> None:
    values = [np.ones((3, 1)), np.arange(3.0)[:, None], np.ones((2, 1)), np.ones((2, 1))]
    sources = [np.array([0, 1, 2]), np.array([2, 3, 4]), np.array([4, 5]), None]
    draws = bootstrap_means(values, sources=sources, resamples=200)
    assert all(block.shape == (200, 1) for block in draws)
    found = draws[1][np.isfinite(draws[1])]
    assert ((found >= 0) & (found <= 2)).all()
    assert np.allclose(draws[3], 1.0)


def test_an_infinite_loss_stays_infinite() -> None:
    logits = torch.tensor([[0.0, 1.0]] * 20 + [[float("nan"), 0.0]])
    found = evaluation(EvaluationSet("t", split(0)), score(logits, torch.ones(21, dtype=torch.int64)), resamples=100)
    assert found.intervals["loss"].value == float("inf")
    assert found.intervals["loss"].low < 1.0 < found.intervals["loss"].high
    assert found.intervals["accuracy"].low > 0.7


def test_intervals_over_experts() -> None:
    model, groups = linear(0), [("a", "b"), ("b", "c"), ("a", "c"), ("c", "d")]
    found = [combine([evaluate(model, split(k), task="t", resamples=0)], resamples=0) for k in range(4)]
    estimate = over_groups(found, groups)
    assert estimate.value == pytest.approx(np.mean([one.joint["accuracy"].value for one in found]))
    assert estimate.low <= estimate.value <= estimate.high
    with pytest.raises(MergeboundError, match="4 evaluations for 3"):
        over_groups(found, groups[:3])


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("broken")


def test_errors() -> None:
    model, data = linear(0), split(0)
    with pytest.raises(MergeboundError, match="no images"):
        evaluate(model, data.take(np.arange(0)))
    with pytest.raises(MergeboundError, match="batch_size = 0"):
        evaluate(model, data, batch_size=0)
    with pytest.raises(MergeboundError, match="task 'x': label"):
        evaluate(linear(0, 2), EvaluationSet("x", data))
    with pytest.raises(MergeboundError, match="'x' has no head"):
        evaluate_tasks(model, {}, [EvaluationSet("x", data)])
    one = evaluate(model, data, task="t", resamples=0)
    with pytest.raises(MergeboundError, match="two tasks"):
        combine([one, one])
    with pytest.raises(MergeboundError, match="at least one"):
        combine([])
    with pytest.raises(MergeboundError, match="not both"):
        combine([one], weights={"u": 1.0})
    with pytest.raises(MergeboundError, match="nonnegative"):
        combine([one], weights={"t": -1.0})
    broken = Fails().train()
    with pytest.raises(RuntimeError, match="broken"):
        evaluate(broken, data)
    assert broken.training
