"""Networks that are a chain of linear layers, and their parameters as one row per expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from experiments.models.mlp import Mlp
from experiments.models.parts import head_tensors
from theory.errors import MergeboundError

NOTHING, RELU, GELU, TANH = range(4)
"""What follows a linear layer."""


@dataclass(frozen=True)
class Layer:
    """One linear layer and what follows it.

    Attributes:
        inputs, outputs: of the layer.
        weight: name of its matrix, ``[outputs, inputs]`` in the state dict.
        bias: name of its bias, empty if it has none.
        activation: ``NOTHING``, ``RELU``, ``GELU`` or ``TANH``.
        start: where its matrix begins in an expert's row, laid out ``[inputs, outputs]``; the bias follows it.
    """

    inputs: int
    outputs: int
    weight: str
    bias: str
    activation: int
    start: int

    @property
    def bias_start(self) -> int:
        """Where its bias begins; -1 without one."""
        return self.start + self.inputs * self.outputs if self.bias else -1

    @property
    def stop(self) -> int:
        """Where its parameters end."""
        return self.start + self.inputs * self.outputs + (self.outputs if self.bias else 0)


@dataclass(frozen=True)
class Chain:
    """Linear layers, the last of which is the head.

    Attributes:
        layers: in order.
    """

    layers: tuple[Layer, ...]

    @property
    def size(self) -> int:
        """Parameters."""
        return self.layers[-1].stop

    @property
    def shared(self) -> int:
        """Parameters before the head."""
        return self.layers[-1].start

    def trained(self, what: str) -> tuple[int, int]:
        """First and last column that are trained, of ``full``, ``backbone`` or ``head``."""
        return {"full": (0, self.size), "backbone": (0, self.shared), "head": (self.shared, self.size)}[what]

    def rows(self, states: Sequence[Mapping[str, Tensor]], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Parameters of M experts, (M, size), contiguous.

        Raises:
            MergeboundError: a state lacks a tensor of the network, or has another shape.
        """
        rows = torch.empty(len(states), self.size, dtype=dtype)
        for row, state in zip(rows, states, strict=True):
            for layer in self.layers:
                matrix = _fitting(state, layer.weight, (layer.outputs, layer.inputs))
                self.matrix(row, layer).copy_(matrix.detach().t())
                if layer.bias:
                    row[layer.bias_start : layer.stop].copy_(_fitting(state, layer.bias, (layer.outputs,)).detach())
        return rows.to(device)

    def matrix(self, rows: Tensor, layer: Layer) -> Tensor:
        """A view of one layer's matrices, (..., inputs, outputs), of rows (..., size)."""
        return rows[..., layer.start : layer.start + layer.inputs * layer.outputs].view(
            *rows.shape[:-1], layer.inputs, layer.outputs
        )

    def state(self, row: Tensor, start: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The full state dict of one expert, copied to the processor's memory, in the order of its x_0."""
        row = row.detach().to("cpu")
        found = {}
        for layer in self.layers:
            found[layer.weight] = self.matrix(row, layer).t().contiguous()
            if layer.bias:
                found[layer.bias] = row[layer.bias_start : layer.stop].clone()
        rest = {name: tensor.detach().to("cpu", copy=True) for name, tensor in start.items() if name not in found}
        return {name: found.get(name, rest.get(name, row)) for name in start}


def read_chain(network: nn.Module) -> Chain | str:
    """The chain that a network is, or why it is none.

    Accepted are :class:`~experiments.models.mlp.Mlp` and ``nn.Sequential`` (nested ones too) of ``Flatten``,
    ``Linear``, ``ReLU``, ``GELU`` (exact) and ``Tanh`` that say what their head is.
    """
    found = _modules(network)
    if isinstance(found, str):
        return found
    names = {id(module): name for name, module in network.named_modules()}
    layers: list[Layer] = []
    start = 0
    for module in found:
        if isinstance(module, nn.Linear):
            name = names[id(module)]
            bias = f"{name}.bias" if module.bias is not None else ""
            layer = Layer(module.in_features, module.out_features, f"{name}.weight", bias, NOTHING, start)
            if layers and layers[-1].outputs != layer.inputs:
                return f"layer {name} takes {layer.inputs} numbers, but {layers[-1].outputs} come"
            layers.append(layer)
            start = layer.stop
        elif not layers or layers[-1].activation != NOTHING:
            return f"{type(module).__name__} does not follow a linear layer"
        else:
            layers[-1] = Layer(**{**vars(layers[-1]), "activation": _ACTIVATIONS[type(module)]})
    return _with_head(network, tuple(layers))


_ACTIVATIONS: Mapping[type[nn.Module], int] = {nn.ReLU: RELU, nn.GELU: GELU, nn.Tanh: TANH}


def _modules(network: nn.Module) -> list[nn.Module] | str:
    """Linear layers and activations in order; or what stands in the way."""
    if type(network) is Mlp:
        parts = [network.flatten, network.layers, network.head]
    elif isinstance(network, nn.Sequential) and _plain(network):
        parts = list(network)
    elif type(network) is nn.Linear or type(network) in _ACTIVATIONS:
        if isinstance(network, nn.GELU) and network.approximate != "none":
            return "GELU is approximated"
        return [network]
    elif type(network) is nn.Identity or (type(network) is nn.Flatten and network.start_dim == 1):
        return []
    else:
        return f"{type(network).__name__} is not a linear layer, ReLU, GELU, Tanh or Flatten"
    if network._forward_hooks or network._forward_pre_hooks:
        return f"{type(network).__name__} has hooks"
    found: list[nn.Module] = []
    for part in parts:
        inner = _modules(part)
        if isinstance(inner, str):
            return inner
        found += inner
    return found


def _plain(network: nn.Sequential) -> bool:
    """Sequential, or a subclass that computes as it does (and may say what its head is)."""
    return type(network).forward is nn.Sequential.forward


def _with_head(network: nn.Module, layers: tuple[Layer, ...]) -> Chain | str:
    if not layers:
        return "there is no linear layer"
    known = {name for layer in layers for name in (layer.weight, layer.bias) if name}
    if known != set(network.state_dict()) or len(list(network.parameters())) != len(known):
        return "it has other tensors than those of its linear layers, or layers that share tensors"
    if layers[-1].activation != NOTHING:
        return "an activation follows the head"
    try:
        head = set(head_tensors(network))
    except MergeboundError as error:
        return str(error)
    if head != {name for name in (layers[-1].weight, layers[-1].bias) if name}:
        return "its head is not the last linear layer"
    return Chain(layers)


def _fitting(state: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    tensor = state.get(name)
    if tensor is None or tuple(tensor.shape) != shape:
        found = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
        raise MergeboundError(f"x_0: tensor '{name}' is {found}; the network needs {shape}, give its own state dict")
    return tensor
