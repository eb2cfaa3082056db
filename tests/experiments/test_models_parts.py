"""Backbone and head of representative networks of timm: the head on the features is the network."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from experiments.models import (
    build_model,
    feature_dim,
    features,
    forward_backbone,
    head_logits,
    head_prefix,
    head_tensors,
    join_state,
    replace_head,
    split_state,
)
from experiments.models.build import build_shapes
from experiments.models.parts import without_numbers
from theory.errors import MergeboundError

CASES: tuple[tuple[str, int, dict[str, int], str | tuple[str, ...]], ...] = (
    ("vit", 8, {}, "head."),
    ("resnet_bn", 8, {}, "fc."),
    ("cifar_resnet20", 16, {}, "linear."),
    ("vit_s1", 16, {"img_size": 16}, "head."),
    ("test_vit", 32, {"img_size": 32}, "head."),
    ("test_vit2", 32, {"img_size": 32}, "head."),
    ("test_resnet", 32, {}, "fc."),
    ("test_efficientnet", 32, {}, "classifier."),
    ("test_byobnet", 32, {}, "head.fc."),
    ("test_convnext", 32, {}, "head.fc."),
    ("test_mambaout", 32, {}, "head.fc."),
    ("test_nfnet", 32, {}, "head.fc."),
    ("mobilenetv3_small_050", 32, {}, "classifier."),
    ("regnetx_002", 32, {}, "head.fc."),
    ("legacy_seresnet18", 32, {}, "last_linear."),
    ("pit_ti_224", 64, {"img_size": 64}, "head."),
    ("efficientvit_b0", 64, {}, "head.classifier.4."),
    ("dla46x_c", 32, {}, ("fc",)),
    ("levit_128s", 224, {}, ("head", "head_dist")),
    ("efficientvit_m0", 64, {"img_size": 64}, ("head",)),
    ("repvit_m0_9", 32, {}, ("head",)),
    ("deit_tiny_distilled_patch16_224", 32, {"img_size": 32}, ("head", "head_dist")),
    ("pit_ti_distilled_224", 64, {"img_size": 64}, ("head", "head_dist")),
    ("crossvit_tiny_240", 120, {"img_size": 120}, ("head.0", "head.1")),
    ("swiftformer_xs", 64, {}, ("head", "head_dist")),
)
"""Name, image side, options, and the prefix of a linear head or the classifiers of another one."""

Case = tuple[nn.Module, Tensor, str | tuple[str, ...]]


def network(name: str, size: int, options: dict[str, int], classes: int = 7) -> tuple[nn.Module, Tensor]:
    """In float64, with numbers of its own in every tensor, and images."""
    model = build_model(name, classes, seed=0, **options).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.mul_((0.1 * noise).exp()) if key.endswith("running_var") else tensor.add_(0.02 * noise)
    channels = 1 if name in ("vit", "resnet_bn") else 3
    return model, torch.randn(3, channels, size, size, generator=generator, dtype=torch.float64)


@pytest.fixture(scope="module", params=CASES, ids=[case[0] for case in CASES])
def case(request: pytest.FixtureRequest) -> Case:
    name, size, options, head = request.param
    return (*network(name, size, options), head)


def test_the_head_on_the_features_is_the_network(case: Case) -> None:
    model, images, _ = case
    model.train()
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = features(model, images, batch=2)
    assert model.training
    assert all(torch.equal(kept[name], tensor) for name, tensor in model.state_dict().items())
    assert rows.ndim == 2
    assert rows.shape[0] == 3
    with torch.no_grad():
        logits = head_logits(model, rows)
        assert model.training
        truth = model.eval()(images)
    assert logits.shape == (3, 7)
    torch.testing.assert_close(logits, truth, rtol=1e-9, atol=1e-10)
    assert truth.std(0).min() > 0  # the images differ, so equality says something
    assert feature_dim(model) == rows.shape[1]


def test_resetting_the_classifier_changes_the_heads_tensors_and_no_others(case: Case) -> None:
    model, images, _ = case
    own = set(head_tensors(model))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    backbone, head = split_state(model, before)
    assert set(head) == own
    assert not set(backbone) & own
    joined = join_state(model, backbone, head)
    assert list(joined) == list(before)
    assert all(joined[name] is before[name] for name in before)
    other = replace_head(copy.deepcopy(model), 5, seed=3)
    after = other.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in backbone.items())
    assert {name for name in before if after[name].shape != before[name].shape} <= own
    assert any(after[name].shape != before[name].shape for name in own)
    torch.testing.assert_close(features(other, images), features(model, images), rtol=0, atol=0)
    again = replace_head(copy.deepcopy(model), 5, seed=3).state_dict()
    assert all(torch.equal(after[name], again[name]) for name in after)
    with torch.no_grad():
        assert other.eval()(images).shape == (3, 5)
    mixed = split_state(model, {**backbone, **{name: after[name] for name in own}})  # a head with other classes
    assert mixed[1].keys() == own


def test_linear_heads_are_found_and_others_refused(case: Case) -> None:
    model, images, head = case
    if isinstance(head, tuple):
        assert all(name.startswith(tuple(f"{unit}." for unit in head)) for name in head_tensors(model))
        with pytest.raises(MergeboundError, match="no single linear classifier") as caught:
            head_prefix(model)
        assert (f"{len(head)} classifiers" if len(head) > 1 else f"its head '{head[0]}' is") in str(caught.value)
        return
    assert head_prefix(model) == head
    assert set(head_tensors(model)) == {head + "weight", head + "bias"}
    state = model.state_dict()
    with torch.no_grad():
        logits = forward_backbone(model.eval(), images) @ state[head + "weight"].T + state[head + "bias"]
        torch.testing.assert_close(logits, model(images), rtol=1e-9, atol=1e-10)


# --- what is refused, and the borders --------------------------------------------------------------------------------


def test_a_head_that_reads_more_than_the_features_is_refused() -> None:
    model = build_shapes("volo_d1_224", 4, img_size=32)
    assert set(head_tensors(model)) == {"head.weight", "head.bias", "aux_head.weight", "aux_head.bias"}
    with pytest.raises(MergeboundError, match="use_aux_head=False"):
        head_logits(model, torch.zeros(1, 384))
    assert head_prefix(build_shapes("volo_d1_224", 4, img_size=32, use_aux_head=False)) == "head."


def test_networks_without_classes() -> None:
    model = build_model("test_resnet", 0).eval()
    assert head_tensors(model) == ()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(features(model, images), model(images).detach())
    assert feature_dim(model) == features(model, images).shape[1]
    with pytest.raises(MergeboundError, match="without classes"):
        head_prefix(model)
    maps = build_model("test_resnet", 0, global_pool="")
    with pytest.raises(MergeboundError, match="not one row per image"):
        features(maps, torch.randn(2, 3, 96, 96))


def test_networks_that_are_not_timms() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.top = nn.Linear(6, 4), nn.Linear(4, 3)

        def get_classifier(self) -> nn.Module:
            return self.top

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.top(self.body(x.flatten(1)).relu())
            return out

    own = Own()
    assert head_prefix(own) == "top."
    images = torch.randn(5, 6)
    rows = features(own, images)
    assert torch.equal(rows, own.body(images).relu().detach())
    with pytest.raises(MergeboundError, match="reset_classifier"):
        replace_head(own, 2)
    with pytest.raises(MergeboundError, match="no classifier found"):
        head_tensors(nn.Sequential(nn.Linear(2, 2)))


def test_states_that_do_not_fit_are_refused_by_name() -> None:
    model = build_model("resnet_bn", 4)
    state = model.state_dict()
    backbone, head = split_state(model, {n: t for n, t in state.items() if not n.endswith("num_batches_tracked")})
    assert len(backbone) + len(head) < len(state)
    with pytest.raises(MergeboundError, match=r"'conv1\.weight' of ResNet is missing"):
        split_state(model, {n: t for n, t in state.items() if n != "conv1.weight"})
    with pytest.raises(MergeboundError, match=r"'extra' is not in ResNet"):
        split_state(model, {**state, "extra": torch.zeros(1)})
    with pytest.raises(MergeboundError, match=r"'fc\.bias' of the backbone belongs to the head"):
        join_state(model, {**backbone, "fc.bias": head["fc.bias"]}, head)
    with pytest.raises(MergeboundError, match=r"'extra' of the head is not one"):
        join_state(model, backbone, {**head, "extra": torch.zeros(1)})
    with pytest.raises(MergeboundError, match=r"'fc\.weight' of ResNet is missing"):
        join_state(model, backbone, {"fc.bias": head["fc.bias"]})
    with pytest.raises(MergeboundError, match="classes = 0"):
        replace_head(model, 0)
    with pytest.raises(MergeboundError, match="features have width 5"):
        head_logits(model, torch.zeros(2, 5))


def test_looking_at_a_network_changes_nothing() -> None:
    model = build_model("resnet_bn", 4)
    model.layer1.requires_grad_(False)  # type: ignore[union-attr]
    state = torch.random.get_rng_state()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    kept = {name: (id(t), t._version) for name, t in model.state_dict(keep_vars=True).items()}
    head_tensors(model)
    feature_dim(model)
    twin = without_numbers(model)
    assert {t.device.type for t in twin.state_dict().values()} == {"meta"}
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    assert kept == {name: (id(t), t._version) for name, t in model.state_dict(keep_vars=True).items()}
    assert torch.equal(state, torch.random.get_rng_state())
    assert not model.fc._forward_pre_hooks  # type: ignore[union-attr]


def test_features_can_be_differentiated_through_the_head() -> None:
    model = build_model("resnet_bn", 4).eval()
    rows = torch.randn(3, 40, requires_grad=True)
    (gradient,) = torch.autograd.grad(head_logits(model, rows)[:, 1].sum(), rows)
    torch.testing.assert_close(gradient, model.state_dict()["fc.weight"][1].expand(3, 40))
