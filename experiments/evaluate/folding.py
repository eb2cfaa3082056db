"""BatchNorm in evaluation mode folded into the convolution or linear layer before it.

    BN(W * x + b) = (g W) * x + g (b - mean) + shift,      g = weight / sqrt(var + eps), per output channel

A pair is folded only where a forward pass on a sample proves it: both layers run exactly once, the very tensor that the
first puts out goes into the second, and no other operation reads or changes it, nor is it an output of the network.
That covers plain networks, timm's ``BatchNormAct2d`` (whose activation stays) and branches alike.  Layers that change
their weights in ``forward`` (weight standardisation, parametrisations, hooks) are left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Pair:
    """Names of a layer and of the BatchNorm that follows it."""

    layer: str
    norm: str


@dataclass(frozen=True)
class Structure:
    """What a forward pass shows.

    Attributes:
        pairs: layers that BatchNorm can be folded into.
        last: name of the linear layer whose output is the network's output; empty if there is none.
    """

    pairs: tuple[Pair, ...]
    last: str


def is_layer(module: nn.Module) -> bool:
    """A layer whose output is linear in its ``weight`` and ``bias``, and that has no hooks."""
    from timm.layers.conv2d_same import Conv2dSame
    from timm.layers.linear import Linear

    return type(module) in (*CONVOLUTIONS, Conv2dSame, nn.Linear, Linear) and not _hooked(module)


def is_norm(module: nn.Module) -> bool:
    """A BatchNorm in evaluation mode with running statistics, and no hooks."""
    from timm.layers.norm_act import BatchNormAct2d

    if type(module) not in (*NORMS, BatchNormAct2d) or _hooked(module):
        return False
    norm: Any = module
    return norm.running_mean is not None and norm.running_var is not None and not norm.training


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or hasattr(module, "parametrizations"))


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts how often operations read the outputs of layers, apart from the norms that may follow them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: dict[str, Tensor] = {}
        self.read: dict[str, int] = {}
        self.inside = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.inside:
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor):
                    self._count(leaf)
        return func(*args, **(kwargs or {}))

    def _count(self, tensor: Tensor) -> None:
        for name, made in self.made.items():
            if made is tensor:
                self.read[name] = self.read.get(name, 0) + 1


def structure(model: nn.Module, sample: Tensor) -> Structure:
    """Find foldable pairs and the last layer, by one forward pass in evaluation mode.

    Args:
        model: in evaluation mode; unchanged afterwards.
        sample: a few images.
    """
    names = {module: name for name, module in model.named_modules()}
    layers = [module for module in names if is_layer(module)]
    norms = [module for module in names if is_norm(module)]
    watch = _Watch()
    calls: dict[nn.Module, int] = {}
    flows: dict[str, str] = {}
    inputs: dict[str, int] = {}

    def after_layer(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls[module] = calls.get(module, 0) + 1
        if isinstance(output, Tensor):
            watch.made[names[module]] = output
            inputs[names[module]] = args[0].ndim if args and isinstance(args[0], Tensor) else 0

    def before_norm(module: nn.Module, args: tuple[Any, ...]) -> None:
        calls[module] = calls.get(module, 0) + 1
        watch.inside += 1
        for name, made in watch.made.items():
            if args and args[0] is made:
                if name in flows:  # a second norm reads the same tensor
                    watch.read[name] = watch.read.get(name, 0) + 1
                flows[name] = names[module]

    def after_norm(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        watch.inside -= 1

    handles = [module.register_forward_hook(after_layer) for module in layers]
    handles += [module.register_forward_pre_hook(before_norm) for module in norms]
    handles += [module.register_forward_hook(after_norm) for module in norms]
    try:
        with torch.no_grad(), watch:
            result = model(sample)
    finally:
        for handle in handles:
            handle.remove()
    out = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    modules = dict(model.named_modules())
    pairs = []
    for layer, norm in flows.items():
        first, second = modules[layer], modules[norm]
        alone = calls[first] == 1 and calls[second] == 1 and not watch.read.get(layer)
        returned = any(watch.made[layer] is leaf for leaf in out)
        fits = not isinstance(first, nn.Linear) or inputs[layer] == 2
        if alone and not returned and fits and list(flows.values()).count(norm) == 1:
            pairs.append(Pair(layer, norm))
    last = [name for name, made in watch.made.items() if len(out) == 1 and made is out[0]]
    linear = [name for name in last if isinstance(modules[name], nn.Linear) and calls[modules[name]] == 1]
    return Structure(tuple(pairs), linear[0] if len(linear) == 1 and linear[0] else "")


def folded_weights(layer: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of the layer with the norm folded in, computed in float64, in the layer's type."""
    first: Any = layer
    second: Any = norm

    def wide(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().double()

    weight, bias = fuse_conv_bn_weights(
        first.weight.detach().double(),
        wide(first.bias),
        second.running_mean.double(),
        second.running_var.double(),
        second.eps,
        wide(second.weight),
        wide(second.bias),
    )
    return weight.detach().to(first.weight.dtype), bias.detach().to(first.weight.dtype)


def fold(model: nn.Module, pairs: Sequence[Pair]) -> nn.Module:
    """Fold the pairs of a network in place; what a norm does after normalising (dropout, activation) stays."""
    modules = dict(model.named_modules())
    for pair in pairs:
        layer, norm = modules[pair.layer], modules[pair.norm]
        weight, bias = folded_weights(layer, norm)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.bias = nn.Parameter(bias, requires_grad=False)
        _replace(model, norm, _rest(norm))
    return model


def _rest(norm: nn.Module) -> nn.Module:
    parts = [part for part in (getattr(norm, "drop", None), getattr(norm, "act", None)) if isinstance(part, nn.Module)]
    kept = [part for part in parts if not isinstance(part, nn.Identity)]
    return nn.Sequential(*kept) if kept else nn.Identity()


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if child is old:
                setattr(module, name, new)


def refill(target: nn.Module, source: nn.Module, pairs: Sequence[Pair]) -> None:
    """Copy the weights of a network into a folded copy of it (of any floating type and memory layout).

    Args:
        target: what :func:`fold` made of a copy of ``source``.
        source: the network with other weights.
    """
    modules, own = dict(source.named_modules()), dict(target.named_modules())
    folded: set[str] = set()
    with torch.no_grad():
        for pair in pairs:
            weight, bias = folded_weights(modules[pair.layer], modules[pair.norm])
            layer: Any = own[pair.layer]
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
            folded |= {f"{pair.layer}.weight", f"{pair.layer}.bias"}
        given = _tensors(source)
        for name, tensor in _tensors(target).items():
            if name not in folded:
                tensor.copy_(given[name])


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, those that are not saved as well."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
