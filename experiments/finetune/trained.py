"""Which part of a network is trained, as one flat vector of parameters and one of gradients."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from experiments.finetune.loop import flatten
from experiments.finetune.low_rank import Factors, low_rank
from experiments.grid.run_spec import RunSpec, Trained
from experiments.models.parts import head_tensors, head_units
from theory.errors import MergeboundError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class TrainedNetwork:
    """A network whose trained parameters are views of one vector.

    Attributes:
        model: the network, with its own tensors.
        x: trained parameters, (d,): the shared part first, the head last.
        gradient: of the same order, (d,); ``backward`` adds to it.
        shared: how many entries of ``x`` belong to the shared part.
        factors: of ``low_rank``, by the name of the matrix: then the shared part of ``x`` holds B and A of each.
        buffers: BatchNorm's statistics and whatever else a forward pass may move.
        statistics: running means and variances among them.
        dtype: of parameters and images.
    """

    model: nn.Module
    x: Tensor
    gradient: Tensor
    shared: int
    factors: Mapping[str, Factors]
    buffers: Sequence[Tensor]
    statistics: Sequence[Tensor]
    dtype: torch.dtype

    def logits(self, images: Tensor) -> Tensor:
        """The network's output, (m, classes), differentiable in ``x``."""
        merged = {name: factors.merged() for name, factors in self.factors.items()}
        logits: Tensor = functional_call(self.model, merged, (images,)) if merged else self.model(images)
        return logits

    def state(self) -> dict[str, Tensor]:
        """The full state dict, copied to the processor's memory; low-rank updates are merged into their matrices."""
        with torch.no_grad():
            merged = {name: factors.merged() for name, factors in self.factors.items()}
        whole = {**self.model.state_dict(), **merged}
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in whole.items()}


def trained_network(
    run: RunSpec, network: nn.Module, start: Mapping[str, Tensor], device: torch.device
) -> TrainedNetwork:
    """A copy of the network at ``start``, in the modes and with the trainable parameters that the run asks for.

    Args:
        run: its ``trained``, ``rank``, ``precision`` and ``seed``.
        network: is not changed.
        start: full state dict x_0.
        device: where to train.

    Raises:
        MergeboundError: no classifier is found in the network, or nothing in it can be trained.
    """
    dtype = _DTYPES[run.precision]
    model = copy.deepcopy(network).to(device=device, dtype=dtype)
    model.load_state_dict(dict(start))
    set_modes(model, run.trained)
    head = set(head_tensors(model))
    factors = low_rank(model, head, run.rank, run.seed) if run.rank is not None else {}
    shared: list[nn.Parameter] = [p for each in factors.values() for p in (each.up, each.down)]
    last: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        part = last if name in head else shared
        if trains(run.trained, name in head):
            part.append(parameter)
        parameter.requires_grad_(trains(run.trained, name in head))
    if not shared and not last:
        raise MergeboundError(
            f"trained = {run.trained}: {type(model).__name__} has no parameter there; use another part of the network"
        )
    x, gradient = flatten([*shared, *last])
    buffers = dict(model.named_buffers())
    statistics = [buffer for name, buffer in buffers.items() if name.endswith(("running_mean", "running_var"))]
    shared_entries = sum(p.numel() for p in shared)
    return TrainedNetwork(model, x, gradient, shared_entries, factors, tuple(buffers.values()), statistics, dtype)


def trains(trained: Trained, in_head: bool) -> bool:
    """Whether a parameter of the head, or of the backbone, is trained itself."""
    return trained == "full" or trained == ("head" if in_head else "backbone") or (trained == "low_rank" and in_head)


def set_modes(model: nn.Module, trained: Trained) -> None:
    """Training mode for what is trained; what is frozen behaves as in evaluation.

    ``full``: everything in training mode.  ``backbone``: the head in evaluation mode.  ``head``: the backbone in
    evaluation mode, so that its BatchNorm layers use x_0's statistics and leave them as they are, and nothing is
    dropped out.  ``low_rank``: everything in training mode but the backbone's BatchNorm layers, which use x_0's
    statistics and leave them as they are: their scales and shifts are frozen too.
    """
    model.train()
    if trained == "full":
        return
    units = [model.get_submodule(name) for name in head_units(model)]
    if trained == "backbone":
        for unit in units:
            unit.eval()
    elif trained == "head":
        model.eval()
        for unit in units:
            unit.train()
    else:
        of_head = {id(module) for unit in units for module in unit.modules()}
        for module in model.modules():
            if getattr(module, "running_mean", None) is not None and id(module) not in of_head:
                module.eval()
