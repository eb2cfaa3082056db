"""Two different experts through a folded network, and each alone: the numbers must be the same, in float64."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.finetune.cohort.folded import fold_network
from experiments.finetune.cohort.stack import Statistics, moving
from experiments.models.form import input_format

_IMAGES = 3
_CLOSE = 1e-8
_SEED = 0xF01D


def difference(network: nn.Module, image: tuple[int, ...] | None = None) -> str | None:
    """What is wrong with the folded form of a network, in training mode; ``None`` if nothing is.

    Logits, gradients by every parameter and running statistics of two experts with random weights are compared.

    Args:
        network: is not changed.
        image: shape of one image.
    """
    rng = np.random.default_rng([_SEED, 0])
    model = copy.deepcopy(network).cpu().double().train()
    shape = image or image_shape(model)
    states = [_perturbed(model, rng) for _ in range(2)]
    images = torch.from_numpy(rng.standard_normal((_IMAGES, 2, *shape)))
    try:
        with torch.random.fork_rng(devices=[]):
            alone = [_alone(model, state, images[:, m]) for m, state in enumerate(states)]
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        return f"it does not run on images of shape {shape} ({_line(error)})"
    try:
        with torch.random.fork_rng(devices=[]):
            together = _together(model, states, images)
    except (RuntimeError, ValueError, AssertionError, TypeError, IndexError, AttributeError) as error:
        return f"its forward pass does not take folded activations ({_line(error)})"
    for m, numbers in enumerate(alone):
        for name, tensor in numbers.items():
            other = together[name][m]
            if other.shape != tensor.shape:
                return f"folded, {name} has shape {tuple(other.shape)} instead of {tuple(tensor.shape)}"
            scale = max(float(tensor.abs().max()), 1e-3) if tensor.numel() else 1.0
            worst = float((other - tensor).abs().max()) / scale if tensor.numel() else 0.0
            if not worst <= _CLOSE:
                return f"folded, it computes something else: {name} is off by {worst:.1e}"
    return None


def image_shape(model: nn.Module) -> tuple[int, ...]:
    """Shape of one image that the network takes: (channels, height, width), or (1, 1, inputs) of an MLP."""
    first = next((m for m in model.modules() if next(iter(m.parameters(recurse=False)), None) is not None), None)
    if isinstance(first, nn.Linear) and not hasattr(model, "pretrained_cfg"):
        return (1, 1, first.in_features)
    form = input_format(model)
    return (form.channels, form.height, form.width)


def _perturbed(model: nn.Module, rng: np.random.Generator) -> dict[str, Tensor]:
    """Weights near the network's, so that nothing is zero or alike by chance."""
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    trained = dict(model.named_parameters())
    for name, tensor in state.items():
        if name in trained:
            tensor += 0.05 * torch.from_numpy(rng.standard_normal(tuple(tensor.shape)))
        elif name.endswith("running_var"):
            tensor += torch.from_numpy(rng.uniform(0.1, 0.5, tuple(tensor.shape)))
    return state


def _loss(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, torch.arange(len(logits)) % logits.shape[-1])


def _alone(model: nn.Module, state: Mapping[str, Tensor], images: Tensor) -> dict[str, Tensor]:
    own = copy.deepcopy(model)
    own.load_state_dict(dict(state))
    named = dict(own.named_parameters())
    logits = own(images)
    gradients = torch.autograd.grad(_loss(logits), list(named.values()), allow_unused=True)
    found = {f"the gradient of {n}": g for n, g in zip(named, gradients, strict=True) if g is not None}
    buffers = dict(own.named_buffers())
    return {"the output": logits.detach(), **found, **{name: buffers[name] for name in moving(own)}}


def _together(model: nn.Module, states: list[dict[str, Tensor]], images: Tensor) -> dict[str, Tensor]:
    way = fold_network(model)
    named = [name for name, _ in model.named_parameters()]

    def turned(name: str, tensor: Tensor) -> Tensor:
        return tensor.transpose(-1, -2) if name in way.transposed else tensor

    leaves = {n: torch.stack([turned(n, s[n]) for s in states]).contiguous().requires_grad_() for n in named}
    statistics = Statistics({name: torch.stack([s[name] for s in states]) for name in moving(model)})
    logits = way.logits(leaves, statistics.tensors, images)
    loss = torch.stack([_loss(each) for each in logits]).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    found = {f"the gradient of {n}": turned(n, g) for n, g in zip(leaves, gradients, strict=True) if g is not None}
    return {"the output": logits.detach(), **found, **statistics.tensors}


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
