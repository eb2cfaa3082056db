"""M experts by ``torch.func.vmap`` over the network: the weights of each are one slice of stacked tensors.

Any network that runs under vmap can be trained so: nothing in it is replaced but BatchNorm, whose running statistics
move in place in PyTorch's own layer, and fused attention, which has no batching rule.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from experiments.finetune.cohort.folded import dropped, mixes, without_fused_attention
from experiments.finetune.cohort.stack import moving, prepared
from experiments.finetune.cohort.together import train_together
from experiments.grid.result import Cohort, RunResult
from experiments.grid.run_spec import RunSpec
from experiments.inputs.training_data import TrainingData
from experiments.models.loaded import timm_is_loaded
from theory.errors import MergeboundError


def train_vmapped(
    runs: Sequence[RunSpec],
    network: nn.Module,
    starts: Sequence[Mapping[str, Tensor]],
    data: Sequence[TrainingData],
    cohort: Cohort,
) -> list[RunResult]:
    """Train M runs by vmap, ``cohort.chunk`` experts at a time.

    Args:
        runs: they share architecture, optimizer, what is trained, rank and precision.
        network: the architecture; it is copied and stays as it is.
        starts: M full state dicts x_0.
        data: M training samples, on the device that trains.
        cohort: ``options``: ``channels_last`` (memory order of images).

    Raises:
        MergeboundError: a network that vmap does not take (says why), or runs that cannot be trained together.
    """
    reason = supports_vmap(network)
    if reason is not None:
        raise MergeboundError(f"{runs[0].architecture}: vmap does not take it: {reason}; use way = loop")
    model = prepared(network, runs, starts, data[0].labels.device)
    way = Vmapped(model, channels_last=bool(cohort.options.get("channels_last", False)))
    return train_together(way, runs, starts, data, chunk=cohort.chunk)


def supports_vmap(network: nn.Module) -> str | None:
    """Why a network cannot be trained by vmap as the reference trains it, as far as its layers show.

    ``None`` where nothing speaks against it.  Whether vmap has a rule for each of its operations shows when it runs.
    """
    for name, module in network.named_modules():
        reason = dropped(module)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.momentum is None:
                reason = "BatchNorm with a cumulative average"
            elif type(module) not in _norms():
                reason = "a kind of BatchNorm that is not known here"
        if reason is not None:
            return f"{name or 'the network'} ({type(module).__name__}): {reason}"
    return None


def _norms() -> tuple[type[nn.Module], ...]:
    if not timm_is_loaded():
        return (nn.BatchNorm1d, nn.BatchNorm2d)
    from timm.layers.norm_act import BatchNormAct2d

    return (nn.BatchNorm1d, nn.BatchNorm2d, BatchNormAct2d)


class BatchNormOfOne(nn.Module):
    """BatchNorm of one expert as a function: what its statistics become is noted, not written.

    Args:
        layer: whose parameters and buffers it has.
    """

    def __init__(self, layer: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__()
        self.eps, self.momentum = layer.eps, layer.momentum or 0.0
        self.running_mean: Tensor | None
        self.running_var: Tensor | None
        self.weight, self.bias = layer.weight, layer.bias
        for name, buffer in layer.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        for name in ("running_mean", "running_var"):
            if getattr(layer, name) is None:
                self.register_buffer(name, None)
        self.track_running_stats = layer.track_running_stats
        self.drop, self.act = getattr(layer, "drop", nn.Identity()), getattr(layer, "act", nn.Identity())
        self.moved: tuple[Tensor, ...] = ()
        self.training = layer.training

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, ...]."""
        old, spread = self.running_mean, self.running_var
        if self.training and old is not None and spread is not None and self.track_running_stats:
            with torch.no_grad():
                axes = [0, *range(2, x.ndim)]
                wide = x.detach().to(old.dtype)
                mean, var = wide.mean(axes), wide.var(axes, correction=1)
                share = self.momentum
                self.moved = (old * (1.0 - share) + mean * share, spread * (1.0 - share) + var * share)
        by_batch = self.training or old is None
        mean_var = (None, None) if by_batch else (old, spread)
        out = F.batch_norm(x, mean_var[0], mean_var[1], self.weight, self.bias, by_batch, 0.0, self.eps)
        after: Tensor = self.act(self.drop(out))
        return after


class Vmapped:
    """A network under vmap; a :class:`~.together.Way`.

    Args:
        model: in the modes in which it is trained; kept, and not changed.
        channels_last: memory order of images.
    """

    transposed: frozenset[str] = frozenset()

    def __init__(self, model: nn.Module, *, channels_last: bool = False) -> None:
        self.model = model
        self.mixes = any(mixes(module) for module in model.modules())
        self._names = moving(model)
        self._network = copy.deepcopy(model)
        without_fused_attention(self._network)
        _replace(self._network)
        self._layers = [m for m in self._network.modules() if isinstance(m, BatchNormOfOne)]
        self._channels_last = channels_last

    def logits(self, tensors: Mapping[str, Tensor], statistics: Mapping[str, Tensor], images: Tensor) -> Tensor:
        """See :class:`~.together.Way`."""
        x = images.transpose(0, 1)
        if self._channels_last and x.ndim == 5:
            x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).view(x.shape)
        one: Callable[..., tuple[Tensor, dict[str, Tensor]]] = vmap(self._one, randomness="error")
        logits, moved = one(dict(tensors), dict(statistics), x)
        with torch.no_grad():
            for name, tensor in moved.items():
                statistics[name].copy_(tensor)
        return logits

    def _one(
        self, tensors: dict[str, Tensor], statistics: dict[str, Tensor], images: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One expert's logits [B, K] and what its running statistics become."""
        logits: Tensor = functional_call(self._network, {**tensors, **statistics}, (images,))
        found = [tensor for layer in self._layers for tensor in layer.moved]
        for layer in self._layers:
            layer.moved = ()
        return logits, dict(zip(self._names, found, strict=True))


def _replace(module: nn.Module) -> None:
    for name, child in list(module.named_children()):
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            setattr(module, name, BatchNormOfOne(child))
        else:
            _replace(child)
