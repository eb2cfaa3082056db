"""Folding: equal functions, and nothing is folded that the forward pass does not prove."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from experiments.evaluate.folding import Pair, fold, folded_weights, refill, structure
from experiments.models import CifarResNet, build_model


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Running statistics and affine maps away from their start."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
            if module.affine:
                with torch.no_grad():
                    module.weight.uniform_(0.5, 1.5, generator=generator)
                    module.bias.normal_(0, 0.3, generator=generator)
    return model.eval().requires_grad_(False)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "digits": (lambda: build_model("resnet_bn"), (1, 8, 8), 0),
    "cifar20": (lambda: CifarResNet(20), (3, 32, 32), 19),
    "resnet18": (lambda: timm.create_model("resnet18", num_classes=7), (3, 32, 32), 20),
    "BatchNormAct2d": (lambda: timm.create_model("regnetx_002", num_classes=7), (3, 32, 32), 0),
    "depthwise": (lambda: timm.create_model("mobilenetv3_small_050", num_classes=7), (3, 32, 32), 0),
}


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


@pytest.mark.parametrize("name", NETWORKS)
def test_whole_networks(name: str) -> None:
    make, shape, count = NETWORKS[name]
    torch.manual_seed(0)
    model = randomised(make())
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(1))
    found = structure(model, x[:2])
    assert len(found.pairs) == (count or norms(model))
    assert isinstance(model.get_submodule(found.last), nn.Linear)
    twin = fold(copy.deepcopy(model), found.pairs)
    assert norms(twin) == norms(model) - len(found.pairs)
    wanted, out = model(x), twin(x)
    assert torch.allclose(out, wanted, rtol=0, atol=1e-4 * float(wanted.std()))
    double = fold(copy.deepcopy(model).double(), found.pairs)(x.double())
    assert torch.allclose(double, model.double()(x.double()), rtol=1e-9, atol=1e-12)


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.sampled_from([1, 2, 4]), st.booleans(), st.booleans())
def test_one_convolution(seed: int, groups: int, bias: bool, affine: bool) -> None:
    torch.manual_seed(seed)
    layer = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=groups, bias=bias)
    model = randomised(nn.Sequential(layer, nn.BatchNorm2d(8, eps=1e-3, affine=affine)), seed).double()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    assert structure(model, x).pairs == (Pair("0", "1"),)
    assert torch.allclose(fold(copy.deepcopy(model), [Pair("0", "1")])(x), model(x), rtol=1e-10, atol=1e-12)


def test_linear_layers() -> None:
    model = randomised(nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3))).double()
    x = torch.randn(6, 5, dtype=torch.float64)
    found = structure(model, x)
    assert (found.pairs, found.last) == ((Pair("0", "1"),), "3")
    assert torch.allclose(fold(copy.deepcopy(model), found.pairs)(x), model(x), rtol=1e-10)
    # on (n, length, features) BatchNorm1d normalises the middle, not what the layer puts out
    assert structure(randomised(nn.Sequential(nn.Linear(7, 7), nn.BatchNorm1d(4))), torch.randn(2, 4, 7)).pairs == ()


class Net(nn.Module):
    """A convolution and a norm, put together by a function."""

    def __init__(self, join: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm, self.join = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self, x)


def changed(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    y.mul_(2.0)
    return net.norm(y)  # type: ignore[no-any-return]


def viewed(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    flat = y.flatten(1)
    return net.norm(y) + flat.sum()  # type: ignore[no-any-return]


UNSOUND: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "read twice": lambda net, x: (lambda y: net.norm(y) + y)(net.conv(x)),
    "activation between": lambda net, x: net.norm(net.conv(x).relu()),
    "changed in place": changed,
    "viewed": viewed,
    "layer twice": lambda net, x: net.norm(net.conv(net.conv(x))),
    "norm twice": lambda net, x: net.norm(net.norm(net.conv(x))),
    "norm first": lambda net, x: net.conv(net.norm(x)),
    "norm of two": lambda net, x: net.norm(net.conv(x)) + net.norm(x),
    "returned": lambda net, x: (lambda y: (net.norm(y), y))(net.conv(x)),  # type: ignore[dict-item,return-value]
}


@pytest.mark.parametrize("name", UNSOUND)
def test_what_is_not_proven_is_left_alone(name: str) -> None:
    assert structure(Net(UNSOUND[name]).eval(), torch.randn(2, 3, 4, 4)).pairs == ()


def test_shapes_may_be_looked_at() -> None:
    net = Net(lambda net, x: (lambda y: net.norm(y) * y.shape[1] * y.ndim)(net.conv(x))).eval()
    assert structure(net, torch.randn(2, 3, 4, 4)).pairs == (Pair("conv", "norm"),)


@pytest.mark.parametrize("what", ["training", "no statistics", "hook", "weight norm", "standardised"])
def test_layers_that_cannot_be_folded(what: str) -> None:
    from timm.layers import StdConv2d

    net = Net(lambda net, x: net.norm(net.conv(x))).eval()
    if what == "training":
        net.norm.train()
    elif what == "no statistics":
        net.norm = nn.BatchNorm2d(3, track_running_stats=False).eval()
    elif what == "hook":
        net.conv.register_forward_hook(lambda module, args, out: out * 2)
    elif what == "weight norm":
        nn.utils.parametrizations.weight_norm(net.conv)
    else:
        net.conv = StdConv2d(3, 3, 1)
    assert structure(net, torch.randn(2, 3, 4, 4)).pairs == ()
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_shared_weights_are_untied_in_the_copy() -> None:
    net = Net(lambda net, x: net.norm(net.conv(x)) + net.other(x)).eval()
    net.other = nn.Conv2d(3, 3, 1)
    net.other.weight = net.conv.weight
    randomised(net)
    x = torch.randn(2, 3, 4, 4)
    pairs = structure(net, x).pairs
    assert pairs == (Pair("conv", "norm"),)
    assert torch.allclose(fold(copy.deepcopy(net), pairs)(x), net(x), atol=1e-5)


def test_other_weights_fill_the_same_buffers() -> None:
    first, second = (randomised(build_model("resnet_bn", seed=seed), seed) for seed in (0, 1))
    x = torch.randn(4, 1, 8, 8)
    pairs = structure(first, x).pairs
    twin = fold(copy.deepcopy(first), pairs)
    places = [tensor.data_ptr() for tensor in twin.parameters()]
    refill(twin, second, pairs)
    assert torch.allclose(twin(x), second(x), atol=1e-5)
    assert [tensor.data_ptr() for tensor in twin.parameters()] == places


def test_weights_by_hand() -> None:
    layer, norm = nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1, eps=0.0).eval()
    for tensor, value in zip(
        (layer.weight, layer.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var),
        (2.0, 1.0, 3.0, 5.0, 4.0, 0.25),
        strict=True,
    ):
        assert tensor is not None
        tensor.data.fill_(value)
    weight, bias = folded_weights(layer, norm)  # g = 3 / 0.5 = 6
    assert (weight.item(), bias.item()) == (12.0, 6.0 * (1.0 - 4.0) + 5.0)
