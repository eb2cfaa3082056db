"""M experts as one network: convolutions in groups, linear layers as batched products.

The network's own ``forward`` runs; only its layers are replaced (:mod:`experiments.finetune.cohort.layers`).  Whether a
network can be folded is proved, not assumed (:mod:`experiments.finetune.cohort.proof`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from experiments.finetune.cohort.layers import FoldedLayer, FoldedPatches, makers, split_axis
from experiments.finetune.cohort.stack import prepared
from experiments.finetune.cohort.together import train_together
from experiments.grid.result import Cohort, RunResult
from experiments.grid.run_spec import RunSpec
from experiments.inputs.training_data import TrainingData
from experiments.models.loaded import timm_is_loaded
from theory.errors import MergeboundError


def train_folded(
    runs: Sequence[RunSpec],
    network: nn.Module,
    starts: Sequence[Mapping[str, Tensor]],
    data: Sequence[TrainingData],
    cohort: Cohort,
) -> list[RunResult]:
    """Train M runs as one folded network, ``cohort.chunk`` experts at a time.

    Args:
        runs: they share architecture, optimizer, what is trained, rank and precision.
        network: the architecture; it is copied and stays as it is.
        starts: M full state dicts x_0.
        data: M training samples, on the device that trains.
        cohort: ``options``: ``channels_last`` (memory order of images; pays with bfloat16 and BatchNorm).

    Raises:
        MergeboundError: a network that cannot be folded (says why), or runs that cannot be trained together.
    """
    reason = supports_folding(network, prove=not _known(network))
    if reason is not None:
        raise MergeboundError(f"{runs[0].architecture}: it cannot be folded: {reason}; use way = loop or vmap")
    model = prepared(network, runs, starts, data[0].labels.device)
    half = runs[0].precision == "bfloat16"
    way = fold_network(model, half=half, channels_last=bool(cohort.options.get("channels_last", False)))
    return train_together(way, runs, starts, data, chunk=cohort.chunk)


def supports_folding(network: nn.Module, *, image: tuple[int, ...] | None = None, prove: bool = True) -> str | None:
    """Why a network cannot be folded; ``None`` if it can.

    Args:
        network: is not changed.
        image: shape of one image; default: what the network says that it takes.
        prove: try it with two experts in float64, where the network has numbers (not on the meta device).
    """
    reason = _obstacle(network)
    if reason is not None or not prove or any(p.is_meta for p in network.parameters()):
        return reason
    from experiments.finetune.cohort.proof import difference

    return difference(network, image)


def _obstacle(network: nn.Module) -> str | None:
    known = makers()
    for name, module in _leaves(network, known):
        label = f"{name or 'the network'} ({type(module).__name__})"
        if type(module) in known:
            reason = _refused(module)
        else:
            reason = dropped(module)
            if reason is None and any(True for _ in module.parameters(recurse=False)):
                raw = set(_raw(module))
                unknown = [key for key, _ in module.named_parameters(recurse=False) if key not in raw]
                reason = f"its parameter {unknown[0]!r} has no folded form" if unknown else None
        if reason is not None:
            return f"{label}: {reason}"
    return None


def dropped(module: nn.Module) -> str | None:
    """Whether a module draws at random in training: experts trained together would not draw what one alone draws."""
    rates = (getattr(module, key, 0.0) for key in ("p", "drop_prob", "drop_rate"))
    random = any(isinstance(rate, float) and rate > 0 for rate in rates)
    return "it drops units at random, which only the loop draws as the reference does" if random else None


def _refused(module: Any) -> str | None:
    if module._forward_hooks or module._forward_pre_hooks or hasattr(module, "parametrizations"):
        return "it has hooks or parametrizations"
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.momentum is None or not module.affine):
        return "BatchNorm with a cumulative average or without scales"
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) != 1:
        return "it normalises over more than one axis"
    if type(module).__name__ == "PatchEmbed":
        proj = module.proj
        plain = module.flatten and not module.dynamic_img_pad and proj.groups == 1 and tuple(proj.padding) == (0, 0)
        if not plain or tuple(proj.kernel_size) != tuple(proj.stride) or tuple(proj.dilation) != (1, 1):
            return "patches that overlap, are padded or stay a map"
    inner = next((reason for child in module.modules() if child is not module for reason in [dropped(child)]), None)
    return inner


def _leaves(module: nn.Module, known: Mapping[type, Any], name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The module and those below it, not going into what is folded as a whole."""
    yield name, module
    patches = type(module).__name__ == "PatchEmbed"
    if type(module) not in known or patches:
        for key, child in module.named_children():
            if patches and key != "norm":
                continue
            yield from _leaves(child, known, f"{name}.{key}" if name else key)


def _raw(module: nn.Module) -> Mapping[str, str]:
    """Parameters that a container uses itself: ``token`` (1, N, D) for [M B, N, D], ``channel`` (C,) for M C."""
    if not timm_is_loaded():
        return {}
    from timm.models.convnext import ConvNeXtBlock
    from timm.models.vision_transformer import VisionTransformer

    tokens = {"cls_token": "token", "reg_token": "token", "pos_embed": "token"}
    found: Mapping[type, Mapping[str, str]] = {VisionTransformer: tokens, ConvNeXtBlock: {"gamma": "channel"}}
    return found.get(type(module), {})


def _known(network: nn.Module) -> bool:
    """Whether it is one of the networks whose folded form the tests prove."""
    from experiments.models.cifar_resnet import CifarResNet

    if type(network) is CifarResNet or not timm_is_loaded():
        return type(network) is CifarResNet
    from timm.models.resnet import ResNet
    from timm.models.vision_transformer import VisionTransformer

    return type(network) in (ResNet, VisionTransformer)


# --- the folded network ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Slot:
    """A tensor that is bound before a forward pass.

    Attributes:
        module, attribute: where.
        name: in the state dict.
        kind: ``layer`` as it is, ``token`` or ``channel``.
    """

    module: nn.Module
    attribute: str
    name: str
    kind: str


class Folded:
    """A network folded over as many experts as its tensors have; a :class:`~.together.Way`.

    Args:
        model: the original, in the modes in which it is trained.
        network: its copy with folded layers.
        slots: what is bound.
        channels_last: memory order of images.
    """

    def __init__(self, model: nn.Module, network: nn.Module, slots: Sequence[_Slot], channels_last: bool) -> None:
        self.model = model
        self._network, self._slots, self._channels_last = network, tuple(slots), channels_last
        self.transposed = frozenset(
            slot.name
            for slot in slots
            if isinstance(slot.module, FoldedLayer) and slot.attribute in slot.module.transposed
        )
        self.mixes = any(mixes(module) for module in model.modules())

    def logits(self, tensors: Mapping[str, Tensor], statistics: Mapping[str, Tensor], images: Tensor) -> Tensor:
        """See :class:`~.together.Way`."""
        count, experts = images.shape[:2]
        for slot in self._slots:
            tensor = statistics[slot.name] if slot.name in statistics else tensors[slot.name]
            if slot.kind == "token":
                tensor = tensor.expand(experts, count, *tensor.shape[2:]).flatten(0, 1)
            elif slot.kind == "channel":
                tensor = tensor.flatten()
            elif isinstance(slot.module, FoldedLayer):
                slot.module.experts = experts
            setattr(slot.module, slot.attribute, tensor)
        for module in self._network.modules():
            if isinstance(module, FoldedLayer):
                module.experts = experts
        x = images.flatten(1, 2)
        if self._channels_last and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        out: Tensor = self._network(x)
        if out.shape[0] == count and experts > 1:
            return split_axis(out, out.ndim - 1, experts).movedim(-2, 0)
        return split_axis(out, 0, experts)


def mixes(module: nn.Module) -> bool:
    """Whether a module normalises by the batch."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None)


def fold_network(model: nn.Module, *, half: bool = False, channels_last: bool = False) -> Folded:
    """The folded form of a network that :func:`supports_folding` accepts.

    Args:
        model: in the modes in which it is trained; kept, and not changed.
        half: it will run in bfloat16, where fused attention's backward pass is slow.
        channels_last: memory order of images.
    """
    known = makers()
    slots: list[_Slot] = []
    network = _folded(copy.deepcopy(model), "", known, slots)
    if half:
        without_fused_attention(network)
    return Folded(model, network, slots, channels_last)


def without_fused_attention(network: nn.Module) -> None:
    """Attention in plain operations, in place."""
    for module in network.modules():
        if isinstance(getattr(module, "fused_attn", None), bool):
            module.fused_attn = False  # type: ignore[assignment]


def _folded(module: nn.Module, prefix: str, known: Mapping[type, Any], slots: list[_Slot]) -> nn.Module:
    def full(key: str) -> str:
        return f"{prefix}.{key}" if prefix else key

    maker = known.get(type(module))
    if maker is not None:
        layer: FoldedLayer = maker(module)
        there = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        slots += [_Slot(layer, a, full(key), "layer") for a, key in layer.takes.items() if key in there]
        if isinstance(layer, FoldedPatches):
            layer.norm = _folded(layer.norm, full("norm"), known, slots)
        return layer
    for key, kind in _raw(module).items():
        if module._parameters.get(key) is not None:
            del module._parameters[key]
            slots.append(_Slot(module, key, full(key), kind))
    for key, child in list(module.named_children()):
        setattr(module, key, _folded(child, full(key), known, slots))
    return module
