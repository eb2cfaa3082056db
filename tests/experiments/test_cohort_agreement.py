"""Experts trained together against the reference loop, which trains one after the other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from experiments.finetune.cohort.folded import train_folded
from experiments.finetune.cohort.vmapped import train_vmapped
from experiments.finetune.reference import train_run
from experiments.grid.result import RunResult
from experiments.inputs.augment import Augmentation
from experiments.models import build_model
from experiments.models.cifar_resnet import CifarResNet
from experiments.models.mlp import Mlp
from tests.experiments.cohort_cases import DIFFERENT, bits, cohort, images, largest_difference, runs, starts

WAYS: dict[str, Any] = {"folded": train_folded, "vmap": train_vmapped}
NETWORKS = ("vit", "resnet_gn", "resnet_bn", "cifar_resnet8", "mlp")


def network(name: str) -> nn.Module:
    if name == "cifar_resnet8":
        torch.manual_seed(0)
        return CifarResNet(8, 10, 1, "bn")
    if name == "mlp":
        torch.manual_seed(0)
        return Mlp((8,), 10)
    return build_model(name, 10, 0)


def both(name: str, way: str, specs: Any, **options: Any) -> tuple[list[RunResult], list[RunResult]]:
    """By the reference, and together; every expert has images and weights of its own."""
    net = network(name)
    data = [images(seed=m, augment=options.get("augment")) for m in range(len(specs))]
    begin = starts(net, len(specs))
    alone = [train_run(run, net, start, own) for run, start, own in zip(specs, begin, data, strict=True)]
    return alone, WAYS[way](specs, net, begin, data, cohort(way, options.get("chunk", 8)))


@pytest.fixture(scope="module")
def references() -> dict[str, list[RunResult]]:
    return {}


@pytest.mark.parametrize(
    ("name", "way"), [*((name, "folded") for name in NETWORKS), *((n, "vmap") for n in NETWORKS[:3])]
)
def test_twenty_steps_of_different_experts_agree_to_1e_10_in_float64(
    name: str, way: str, references: dict[str, list[RunResult]]
) -> None:
    """Own rates, momenta, decays, clipping, smoothing, schedules, data, shares, steps, seeds; statistics included."""
    net, specs = network(name), runs(*DIFFERENT, batch_size=8)
    data, begin = [images(seed=m) for m in range(3)], starts(net, 3)
    if name not in references:
        references[name] = [train_run(r, net, s, d) for r, s, d in zip(specs, begin, data, strict=True)]
    together = WAYS[way](specs, net, begin, data, cohort(way))
    assert [sorted(result.states) for result in together] == [[5, 20], [17], [14]]
    for one, other in zip(references[name], together, strict=True):
        assert largest_difference(one, other) <= 1e-10


@pytest.mark.parametrize("name", NETWORKS[:3])
def test_adamw_with_its_own_epsilon_agrees_to_1e_10_after_twenty_steps(name: str) -> None:
    """Default epsilon, three learning rates; a ViT's biases of keys move by rounding alone.

    Their gradient is 0 in exact arithmetic (the softmax does not see a shift of all its arguments), so that AdamW
    divides one rounding error by epsilon = 1e-8: they differ most, by more at larger learning rates.
    """
    net = network(name)
    changes = ({"learning_rate": 1e-3}, {"learning_rate": 1e-2, "weight_decay": 0.1}, {"learning_rate": 3e-2})
    specs = runs(*changes, steps=20, momentum=0.9, optimizer="adamw", batch_size=8)
    assert {run.epsilon for run in specs} == {1e-8}
    data, begin = [images(seed=m) for m in range(3)], starts(net, 3)
    alone = [train_run(run, net, start, own) for run, start, own in zip(specs, begin, data, strict=True)]
    for way, train in WAYS.items():
        for one, other in zip(alone, train(specs, net, begin, data, cohort(way)), strict=True):
            assert largest_difference(one, other) <= 1e-10


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "common",
    [
        {"optimizer": "adamw", "weight_decay": 0.1, "epsilon": 1e-3},
        {"optimizer": "sam", "momentum": 0.5},
        {"trained": "head"},
        {"trained": "backbone", "clip_norm": 0.3},
        {"trained": "low_rank", "rank": 2},
    ],
    ids=lambda common: common.get("trained", common.get("optimizer")),
)
def test_every_optimizer_and_every_part_that_is_trained(way: str, common: dict[str, Any]) -> None:
    common = {**common, "steps": 3, "batch_size": 8}
    changes = ({"learning_rate": 0.02, "momentum": 0.8}, {"learning_rate": 0.1, "sam_radius": 0.2, "beta2": 0.9})
    alone, together = both("resnet_bn", way, runs(*changes, **common))
    for one, other in zip(alone, together, strict=True):
        assert largest_difference(one, other) <= 1e-10


def test_nesterov_beside_heavy_ball() -> None:
    specs = runs({"nesterov": True, "momentum": 0.8}, {"momentum": 0.8}, {})
    for one, other in zip(*both("mlp", "folded", specs), strict=True):
        assert largest_difference(one, other) <= 1e-12


@pytest.mark.parametrize("sampling", ["reshuffle", "with_replacement", "without_replacement"])
def test_every_sampling(sampling: str) -> None:
    for one, other in zip(*both("mlp", "folded", runs({}, {}, sampling=sampling, steps=9)), strict=True):
        assert largest_difference(one, other) <= 1e-12


@pytest.mark.parametrize(("name", "way"), [("resnet_bn", "folded"), ("resnet_bn", "vmap"), ("mlp", "folded")])
def test_batches_of_different_lengths_are_neither_filled_under_batchnorm_nor_wrong_elsewhere(
    name: str, way: str
) -> None:
    """56 images: batches of 16 end with 8, of 20 with 16, of 12 with 8; with shares, others."""
    specs = runs({"batch_size": 16}, {"batch_size": 20}, {"batch_size": 12, "data_share": 0.75}, steps=4)
    alone, together = both(name, way, specs)
    assert together[1].log.batch_size.tolist() == [20, 20, 16, 20]
    for one, other in zip(alone, together, strict=True):
        assert largest_difference(one, other) <= 1e-10


def test_augmented_images_are_drawn_as_for_one_alone() -> None:
    some = Augmentation(shift=1, flip=0.5, contrast=0.2)
    alone, together = both("mlp", "folded", runs({}, {}, steps=8), augment=some)
    plain, _ = both("mlp", "folded", runs({}, {}, steps=8))
    assert not bits(alone[0].states[8], plain[0].states[8])
    for one, other in zip(alone, together, strict=True):
        assert largest_difference(one, other) <= 1e-12


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["vit", "resnet_bn"])
def test_float32_stays_within_rounding(name: str, way: str) -> None:
    """Five steps: 2e-5 of the largest weight (84 float32 roundings); rounding grows with the steps, as of any order."""
    changes = ({"learning_rate": 0.01, "momentum": 0.9}, {"learning_rate": 0.02, "weight_decay": 1e-3})
    alone, together = both(name, way, runs(*changes, precision="float32", steps=5, batch_size=8))
    for one, other in zip(alone, together, strict=True):
        scale = max(float(t.abs().max()) for t in one.states[5].values())
        assert largest_difference(one, other) <= 2e-5 * max(scale, 10.0)
        assert all(t.dtype in (torch.float32, torch.int64) for t in other.states[5].values())


@pytest.mark.parametrize("name", ["vit", "resnet_bn"])
def test_bfloat16_is_as_near_to_float32_as_the_loop_in_bfloat16_is(name: str) -> None:
    exact, _ = both(name, "folded", runs({"momentum": 0.9}, {}, precision="float32", steps=3))
    alone, together = both(name, "folded", runs({"momentum": 0.9}, {}, precision="bfloat16", steps=3))
    for right, one, other in zip(exact, alone, together, strict=True):
        loop = np.abs(one.log.batch_loss - right.log.batch_loss).max()
        folded = np.abs(other.log.batch_loss - right.log.batch_loss).max()
        assert loop > 0
        assert folded <= 3 * loop + 5e-3
