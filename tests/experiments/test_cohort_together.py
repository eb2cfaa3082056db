"""What experts that are trained together must not do to each other, and what a cohort refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from experiments.finetune.cohort import together as engine
from experiments.finetune.cohort.folded import fold_network, supports_folding, train_folded
from experiments.finetune.cohort.rules import Rules
from experiments.finetune.cohort.supply import Supply, gather
from experiments.finetune.cohort.together import batch_losses, train_together
from experiments.finetune.cohort.vmapped import supports_vmap, train_vmapped
from experiments.finetune.optimizers import adamw, heavy_ball
from experiments.finetune.reference import train_run
from experiments.models import build_model
from experiments.models.mlp import Mlp
from tests.experiments.cohort_cases import (
    DIFFERENT,
    bits,
    cohort,
    difference_of_logs,
    images,
    largest_difference,
    runs,
    spec,
    starts,
)
from theory.errors import MergeboundError

WAYS: dict[str, Any] = {"folded": train_folded, "vmap": train_vmapped}


@pytest.mark.parametrize("way", WAYS)
def test_companions_and_chunks_change_nothing_but_rounding(way: str) -> None:
    """Within 1e-12 in float64, whoever is beside an expert and however many are trained at a time."""
    changes = ({**change, "steps": 3, "warm_up": 1, "checkpoints": (2, 3)} for change in DIFFERENT)
    net, specs = build_model("resnet_bn", 10, 0), runs(*changes)
    data, begin = [images(seed=m) for m in range(3)], starts(net, 3)
    whole = WAYS[way](specs, net, begin, data, cohort(way))
    for chunk in (1, 2):
        for one, other in zip(whole, WAYS[way](specs, net, begin, data, cohort(way, chunk)), strict=True):
            assert largest_difference(one, other) <= 1e-12
    turned = WAYS[way](specs[::-1], net, begin[::-1], data[::-1], cohort(way))
    for one, other in zip(whole, turned[::-1], strict=True):
        assert largest_difference(one, other) <= 1e-12


@pytest.mark.parametrize("way", WAYS)
def test_the_same_cohort_gives_the_same_bits(way: str) -> None:
    net, specs = build_model("vit", 10, 0), runs({}, {"momentum": 0.9}, precision="float32")
    data, begin = [images(seed=m) for m in range(2)], starts(net, 2)
    first, second = (WAYS[way](specs, net, begin, data, cohort(way)) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert bits(one.states[4], other.states[4])
        assert difference_of_logs(one.log, other.log) == 0.0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rate", [1e40, 1e308], ids=["loss", "weights"])
def test_an_expert_that_diverges_keeps_its_last_finite_state_and_leaves_the_others_alone(way: str, rate: float) -> None:
    """1e40 blows up the next loss or gradient; 1e308 with a large momentum makes the weights themselves infinite."""
    net = build_model("resnet_bn", 10, 0)
    specs = runs({}, {"learning_rate": rate, "momentum": 0.9}, {"momentum": 0.5}, steps=4)
    data, begin = [images(seed=m) for m in range(3)], starts(net, 3)
    alone = [train_run(r, net, s, d) for r, s, d in zip(specs, begin, data, strict=True)]
    found = WAYS[way](specs, net, begin, data, cohort(way))
    assert [result.outcome for result in found] == ["finished", "diverged", "finished"]
    assert largest_difference(alone[0], found[0]) <= 1e-10
    assert largest_difference(alone[2], found[2]) <= 1e-10
    (step,) = found[1].states
    assert list(alone[1].states) == [step]
    assert len(found[1].log.batch_loss) == step < 4
    assert all(bool(torch.isfinite(t).all()) for t in found[1].states[step].values())
    assert int(found[1].states[step]["bn1.num_batches_tracked"]) == step


def test_all_diverge_at_once() -> None:
    net = Mlp((4,), 10)
    specs = runs({"learning_rate": 1e300}, {"learning_rate": 1e300}, steps=9, momentum=0.9)
    found = train_folded(specs, net, starts(net, 2), [images()] * 2, cohort("folded"))
    assert [result.outcome for result in found] == ["diverged", "diverged"]


class _Spy:
    """A way that notes how many experts it is asked for at a time."""

    def __init__(self, way: engine.Way) -> None:
        self.model, self.transposed, self.mixes, self._way = way.model, way.transposed, way.mixes, way
        self.seen: list[int] = []

    def logits(self, tensors: Any, statistics: Any, pixels: torch.Tensor) -> torch.Tensor:
        self.seen.append(pixels.shape[1])
        return self._way.logits(tensors, statistics, pixels)


def test_experts_leave_when_they_are_done_and_a_chunk_is_never_exceeded() -> None:
    net = Mlp((4,), 10).double()
    specs = runs({"steps": 3}, {"steps": 1}, {"steps": 2}, {"steps": 1})
    spy = _Spy(fold_network(net.train()))
    train_together(spy, specs, starts(net, 4), [images()] * 4, chunk=3)
    assert spy.seen == [3, 2, 1, 1]


def test_the_network_and_the_callers_random_numbers_stay_as_they_are() -> None:
    net = build_model("resnet_bn", 10, 0)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train_folded(runs({}, {}, steps=1), net, starts(net, 2), [images()] * 2, cohort("folded"))
    assert supports_folding(net) is None
    assert torch.equal(torch.rand(3), expected)
    assert bits(before, net.state_dict())
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_time_is_shared_out_by_samples() -> None:
    net = Mlp((4,), 10)
    found = train_folded(runs({"steps": 8}, {"steps": 2}), net, starts(net, 2), [images()] * 2, cohort("folded"))
    samples = [result.log.batch_size.sum() for result in found]
    assert found[0].seconds / found[1].seconds == pytest.approx(samples[0] / samples[1])
    assert found[0].seconds > 0


# --- pieces ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_losses_are_those_of_pytorch_and_filling_does_not_count(seed: int, experts: int, size: int) -> None:
    rng = np.random.default_rng([seed, 0x1055])
    logits = torch.from_numpy(3 * rng.standard_normal((experts, size, 5)))
    labels = torch.from_numpy(rng.integers(0, 5, (experts, size)))
    lengths = rng.integers(1, size + 1, experts).tolist()
    smoothing = torch.from_numpy(rng.choice([0.0, 0.1, 0.9], experts))
    found = batch_losses(logits, labels, lengths, smoothing)
    for m, n in enumerate(lengths):
        expected = F.cross_entropy(logits[m, :n], labels[m, :n], label_smoothing=float(smoothing[m]))
        assert float(found[m]) == pytest.approx(float(expected), rel=1e-12)


@given(st.integers(0, 10**6), st.booleans())
@settings(max_examples=15, deadline=None)
def test_updates_of_rows_are_those_of_one_vector_each(seed: int, adaptive: bool) -> None:
    rng = np.random.default_rng([seed, 0x0117])
    changes = [
        {
            "learning_rate": float(rng.uniform(0.01, 1)),
            "momentum": float(rng.uniform(0.1, 0.95)),
            "beta2": float(rng.uniform(0.9, 0.99)),
            "weight_decay": float(rng.uniform(0, 0.5)),
            "nesterov": bool(not adaptive and rng.random() < 0.5),
        }
        for _ in range(3)
    ]
    specs = runs(*changes, optimizer="adamw" if adaptive else "sgd", schedule="linear", steps=5)
    x = torch.from_numpy(rng.standard_normal((3, 6)))
    alone = x.clone()
    rules = Rules(tuple(specs), x, [])
    updates = [
        adamw(row, r.momentum, r.beta2, r.epsilon, r.weight_decay)
        if adaptive
        else heavy_ball(row, r.momentum, nesterov=r.nesterov)
        for row, r in zip(alone, specs, strict=True)
    ]
    for step in range(5):
        gradient = torch.from_numpy(rng.standard_normal((3, 6)))
        for row, g, r, update in zip(alone, gradient, specs, updates, strict=True):
            update(row, g, r.learning_rate * (1 - step / 5))
        rules.update(x, gradient.clone(), step)
    torch.testing.assert_close(x, alone, rtol=1e-12, atol=1e-12)


def test_batches_from_one_store_are_those_of_each_alone() -> None:
    whole = images(40)
    parts = [whole, whole.take(np.arange(5, 40)), whole]
    specs = [spec(seed=m, batch_size=7, data_share=share) for m, share in enumerate((1.0, 0.8, 0.5))]
    supplies = [Supply(run, part) for run, part in zip(specs, parts, strict=True)]
    for _ in range(4):
        lengths = [supply.advance() for supply in supplies]
        pixels, labels = gather(supplies, 7)
        for m, supply in enumerate(supplies):
            expected = supply.sample.batch(supply.rows, supply.epoch)
            assert torch.equal(pixels[: lengths[m], m], expected[0])
            assert torch.equal(labels[m, : lengths[m]], expected[1])


# --- what can be folded ----------------------------------------------------------------------------------------------


def _token_vit() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=8, patch_size=4, in_chans=1, num_classes=5, embed_dim=12, depth=1, num_heads=2, init_values=0.1,
        qk_norm=True, reg_tokens=2, class_token=True, global_pool="token",
    )  # fmt: skip


def _wide_vit() -> nn.Module:
    """So many numbers that LayerNorm takes one expert after the other."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(img_size=16, patch_size=2, in_chans=1, num_classes=5, embed_dim=96, depth=1, num_heads=2)


def _bottlenecks() -> nn.Module:
    from timm.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, [1, 1, 1, 1], num_classes=5, in_chans=1, channels=(4, 4, 4, 8), avg_down=True)


def _convnext() -> nn.Module:
    from timm.models.convnext import ConvNeXt

    return ConvNeXt(in_chans=1, num_classes=5, depths=(1, 1, 1, 1), dims=(4, 4, 8, 8))


@pytest.mark.parametrize("make", [_token_vit, _wide_vit, _bottlenecks, _convnext])
def test_networks_that_fold(make: Any) -> None:
    """``supports_folding`` compares outputs, gradients and statistics of two experts with each alone, in float64."""
    size = {_token_vit: 8, _wide_vit: 16}.get(make, 32)
    assert supports_folding(make(), image=(1, size, size)) is None


class _Joins(nn.Module):
    """Joins channels of two branches, which folded lie in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.last = nn.Conv2d(1, 2, 3), nn.Conv2d(1, 2, 3), nn.Conv2d(4, 3, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.cat([self.one(x), self.two(x)], dim=1)).flatten(1)


def test_networks_that_do_not_fold_say_why() -> None:
    joins = supports_folding(_Joins(), image=(1, 8, 8))
    assert joins is not None
    assert "the output is off by" in joins
    dropping = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1))
    assert "1 (Dropout): it drops units at random" in str(supports_folding(dropping))
    assert "1 (Dropout): it drops units at random" in str(supports_vmap(dropping))
    assert "0 (Conv1d): its parameter 'weight' has no folded form" in str(
        supports_folding(nn.Sequential(nn.Conv1d(1, 1, 1)))
    )
    normed = nn.Sequential(nn.BatchNorm2d(2, momentum=None))
    assert "cumulative average" in str(supports_folding(normed))
    assert "cumulative average" in str(supports_vmap(normed))
    hooked = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    assert supports_folding(hooked) is not None
    with pytest.raises(MergeboundError, match=r"cannot be folded.*has no folded form.*way = loop or vmap"):
        train_folded(runs({}), nn.Sequential(nn.Conv1d(1, 1, 1)), [{}], [images()], cohort("folded"))


def test_shapes_without_numbers_are_looked_at_only() -> None:
    with torch.device("meta"):
        net = Mlp((4,), 10)
    assert supports_folding(net) is None


def test_runs_that_do_not_belong_together_are_refused() -> None:
    net = Mlp((4,), 10)
    with pytest.raises(MergeboundError, match=r"optimizer: runs of one cohort share it, but these have adamw, sgd"):
        train_folded(runs({}, {"optimizer": "adamw"}), net, starts(net, 2), [images()] * 2, cohort("folded"))
    with pytest.raises(MergeboundError, match=r"batch_size = 99 is larger than the 56 training samples"):
        train_folded(runs({}, {"batch_size": 99}), net, starts(net, 2), [images()] * 2, cohort("folded"))
