"""The network as a function of its merged coordinates: values and derivatives against the plain model."""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from experiments.measure.backbone import Backbone, EvaluationBatchNorm, differentiable_copy, smoothness
from experiments.models import build_model, head_prefix

MODELS = ("vit", "resnet_gn", "resnet_bn", "test_efficientnet")
"""The digit networks, and a timm network with ``BatchNormAct2d``."""

State = dict[str, Tensor]


def perturb(state: State, seed: int, size: float) -> State:
    """Every floating tensor moved at random; running variances stay positive."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            out[name] = tensor.clone()
            continue
        noise = size * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        out[name] = tensor * noise.exp() if name.endswith("running_var") else tensor + noise
    return out


@cache
def plain_model(architecture: str) -> nn.Module:
    """In float64 and evaluation mode, with running statistics that are not those of a fresh layer."""
    model = build_model(architecture, classes=4, seed=0).double()
    model.load_state_dict(perturb(model.state_dict(), seed=1, size=0.1))
    return model.eval()


def state_of(architecture: str) -> State:
    return {name: tensor.detach().clone() for name, tensor in plain_model(architecture).state_dict().items()}


def images_of(architecture: str, n: int = 3, seed: int = 2) -> Tensor:
    shape = (n, 3, 32, 32) if architecture.startswith("test_") else (n, 1, 8, 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_logits(architecture: str, state: State, images: Tensor) -> Tensor:
    """The plain model's own output: nothing of the backbone is used."""
    model = copy.deepcopy(plain_model(architecture))
    model.load_state_dict(state)
    with torch.no_grad():
        out: Tensor = model(images)
    return out


def backbone_of(architecture: str, *, shared_head: bool = False) -> Backbone:
    return Backbone.of(plain_model(architecture), state_of(architecture), shared_head=shared_head)


def moved(backbone: Backbone, state: State, direction: Tensor, step: float) -> State:
    """The checkpoint at x + step d: named tensors, for the plain model."""
    return {**state, **backbone.space.unflatten(backbone.vector(state) + step * direction)}


def differences(architecture: str, backbone: Backbone, direction: Tensor, images: Tensor) -> Tensor:
    """Central finite differences of the plain model's logits along ``direction``."""
    state, step = state_of(architecture), 1e-5
    right, left = (plain_logits(architecture, moved(backbone, state, direction, s), images) for s in (step, -step))
    return (right - left) / (2 * step)


def random_directions(backbone: Backbone, count: int, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(count, backbone.space.size, generator=generator, dtype=torch.float64)
    return directions / directions.norm(dim=1, keepdim=True)


def only(backbone: Backbone, ending: str) -> Tensor:
    """A unit direction that moves only the tensors whose name ends so."""
    mask = torch.zeros(backbone.space.size, dtype=torch.float64)
    for name, piece in backbone.space.segments():
        if name.endswith(ending):
            mask[piece] = 1.0
    direction = mask * random_directions(backbone, 1, seed=5)[0]
    return direction / direction.norm()


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared_head", [False, True])
@pytest.mark.parametrize("architecture", MODELS)
def test_features_and_readout_are_the_models_own_logits(architecture: str, shared_head: bool) -> None:
    backbone, images = backbone_of(architecture, shared_head=shared_head), images_of(architecture)
    for seed in (7, 8):
        state = perturb(state_of(architecture), seed, 0.05)
        logits = backbone.readout(state).logits(backbone.features(backbone.vector(state), images))
        torch.testing.assert_close(logits, plain_logits(architecture, state, images), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("architecture", ["vit", "resnet_bn"])
def test_coordinates_are_everything_but_the_head_and_the_counters(architecture: str) -> None:
    state, prefix = state_of(architecture), head_prefix(plain_model(architecture))
    own, shared = backbone_of(architecture), backbone_of(architecture, shared_head=True)
    floating = {name for name, tensor in state.items() if tensor.is_floating_point()}
    assert set(shared.space.names) == floating
    assert set(own.space.names) == {name for name in floating if not name.startswith(prefix)}
    assert shared.head == ""
    assert shared.readout(state).weight is None
    np.testing.assert_array_equal(own.readout(state).weight, state[prefix + "weight"])
    if architecture == "resnet_bn":
        assert {"bn1.running_mean", "bn1.running_var"} <= set(own.space.names)
        assert "bn1.num_batches_tracked" not in own.space.names


def test_a_head_that_moves_changes_nothing_when_private_and_logits_when_shared() -> None:
    state, images = state_of("vit"), images_of("vit")
    other = {**state, "head.weight": state["head.weight"] + 1.0}
    own, shared = backbone_of("vit"), backbone_of("vit", shared_head=True)
    assert torch.equal(own.vector(state), own.vector(other))
    logits = shared.features(shared.vector(other), images)
    torch.testing.assert_close(logits, plain_logits("vit", other, images), rtol=1e-9, atol=1e-9)


def test_many_images_are_cut_into_chunks_without_a_trace() -> None:
    backbone, images = backbone_of("vit"), images_of("vit", n=600)
    whole = backbone.features(backbone.vector(state_of("vit")), images)
    parts = torch.cat([backbone.features(backbone.vector(state_of("vit")), part) for part in images.split(77)])
    torch.testing.assert_close(whole, parts, rtol=1e-10, atol=1e-12)


def test_the_models_own_layers_are_left_alone() -> None:
    model = build_model("resnet_bn", classes=4)
    names = list(model.state_dict())
    twin = differentiable_copy(model)
    assert isinstance(model.bn1, nn.BatchNorm2d)
    assert isinstance(twin.bn1, EvaluationBatchNorm)
    assert list(twin.state_dict()) == names
    assert all(p.requires_grad for p in model.parameters())


def test_batchnorm_without_statistics_is_refused() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.Linear(3, 2))
    with pytest.raises(ValueError, match="0: BatchNorm without running statistics"):
        differentiable_copy(model)


# --- derivatives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared_head", [False, True])
@pytest.mark.parametrize("architecture", MODELS)
def test_products_are_directional_derivatives_of_the_plain_model(architecture: str, shared_head: bool) -> None:
    backbone, images = backbone_of(architecture, shared_head=shared_head), images_of(architecture)
    state = state_of(architecture)
    directions = random_directions(backbone, 2)
    products = backbone.readout(state).products(backbone.products(backbone.vector(state), directions, images))
    for product, direction in zip(products, directions, strict=True):
        expected = differences(architecture, backbone, direction, images)
        assert float(expected.abs().max()) > 1e-4
        torch.testing.assert_close(product, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("architecture", ["resnet_bn", "test_efficientnet"])
@pytest.mark.parametrize("ending", ["running_mean", "running_var"])
def test_products_pass_through_running_statistics(architecture: str, ending: str) -> None:
    backbone, images, state = backbone_of(architecture), images_of(architecture), state_of(architecture)
    direction = only(backbone, ending)
    features = backbone.products(backbone.vector(state), direction[None], images)[0]
    product = backbone.readout(state).products(features)
    expected = differences(architecture, backbone, direction, images)
    assert float(expected.abs().max()) > 1e-4, "the statistics matter"
    torch.testing.assert_close(product, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("architecture", ["vit", "resnet_bn"])
def test_products_at_many_points_equal_products_at_each(architecture: str) -> None:
    backbone, state = backbone_of(architecture), state_of(architecture)
    count = 10
    points = backbone.vector(state) + 0.3 * random_directions(backbone, count, seed=11)
    directions = random_directions(backbone, count, seed=12)
    images = torch.stack([images_of(architecture, seed=20 + k) for k in range(count)])
    features, products = backbone.products_at(points, directions, images)
    for k in range(count):
        alone = backbone.products(points[k], directions[k : k + 1], images[k])[0]
        torch.testing.assert_close(products[k], alone, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(features[k], backbone.features(points[k], images[k]), rtol=1e-9, atol=1e-12)


def test_products_are_linear_in_the_direction_over_chunks() -> None:
    backbone, state, images = backbone_of("resnet_bn"), state_of("resnet_bn"), images_of("resnet_bn")
    directions = random_directions(backbone, 9)
    weights = torch.randn(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    directions = torch.cat([directions, (weights @ directions)[None]])
    products = backbone.products(backbone.vector(state), directions, images)
    combined = torch.tensordot(weights, products[:9], 1)
    torch.testing.assert_close(products[9], combined, rtol=1e-8, atol=1e-10)


# --- smoothness ------------------------------------------------------------------------------------------------------


class Tiny(nn.Module):
    """Linear, BatchNorm, tanh, linear head: small enough for dense matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 3)

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward_features(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.body(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def tiny_logits(x: Tensor, *p: Tensor) -> Tensor:
    """Written out by hand, in the order of :func:`tiny_parameters`."""
    weight, bias, scale, shift, mean, variance, head, offset = p
    z = (x @ weight.T + bias - mean) / torch.sqrt(variance + 1e-5)
    return torch.tanh(z * scale + shift) @ head.T + offset


def tiny_parameters(state: State) -> tuple[Tensor, ...]:
    names = ("body.weight", "body.bias", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var")
    return tuple(state[name] for name in (*names, "head.weight", "head.bias"))


def dense_largest_eigenvalue(state: State, images: Tensor) -> float:
    """Of the mean over images of J^T (diag p - p p^T) J, with J over every coordinate and the head."""
    parameters = tiny_parameters(state)
    blocks = torch.autograd.functional.jacobian(lambda *p: tiny_logits(images, *p), parameters)
    jacobian = torch.cat([block.reshape(len(images), 3, -1) for block in blocks], dim=2)
    p = torch.softmax(tiny_logits(images, *parameters), dim=1)
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    dense = torch.einsum("ncp,ncd,ndq->pq", jacobian, middle, jacobian) / len(images)
    return float(torch.linalg.eigvalsh(dense)[-1])


@pytest.mark.parametrize("shared_head", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_smoothness_is_the_largest_gauss_newton_eigenvalue_from_below(dtype: torch.dtype, shared_head: bool) -> None:
    torch.manual_seed(0)
    model = Tiny().eval()
    exact = perturb({k: v.detach().clone() for k, v in model.state_dict().items()}, seed=4, size=0.3)
    images = torch.randn(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    truth = dense_largest_eigenvalue({k: v.double() for k, v in exact.items()}, images)
    model, state, batch = model.to(dtype), {k: v.to(dtype) for k, v in exact.items()}, images.to(dtype)
    state["norm.num_batches_tracked"] = torch.tensor(0)
    model.load_state_dict(state)
    backbone = Backbone.of(model, state, shared_head=shared_head)
    vector, readout = backbone.vector(state), backbone.readout(state)
    values = [smoothness(backbone, vector, readout, batch, iterations=k) for k in (1, 2, 4, 60)]
    assert all(value <= truth * (1 + 1e-5) for value in values)
    assert values == pytest.approx(sorted(values), rel=1e-5)
    assert values[-1] == pytest.approx(truth, rel=1e-4)
