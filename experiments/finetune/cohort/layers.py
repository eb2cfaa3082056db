"""Layers of M experts at once: the same operation, with M times the channels or M matrices.

A folded activation has one of two layouts, and every layer gives back the one that it was given:

* *channels*: images [B, M C, H, W], vectors [B, M C] (or channels last, [B, H, W, M C]), expert after expert;
* *batch*: tokens [M B, N, C] and vectors [M B, C], expert after expert.

The size of the axis tells them apart (at M = 1 they are the same).  Weights are bound from outside before a forward
pass, stacked over experts: convolutions [M, out, in / groups, h, w], linear layers [M, in, out] (products and gradients
then need no transposed copies), vectors [M, C].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_SMALL = 16384
"""LayerNorm of fewer numbers than that per expert: scales and shifts of all experts are applied in one operation."""


class FoldedLayer(nn.Module):
    """A layer of M experts.

    Attributes:
        experts: M.
        takes: the tensors that are bound before a forward pass, each [M, ...] or ``None``, and what they are called
            in the layer that this one stands for.
        transposed: those that are bound as [M, in, out], where the state dict has (out, in).
    """

    takes: ClassVar[Mapping[str, str]] = {"weight": "weight", "bias": "bias"}
    transposed: ClassVar[tuple[str, ...]] = ()
    weight: Any
    bias: Any

    def __init__(self) -> None:
        super().__init__()
        self.experts = 1
        for name in self.takes:
            setattr(self, name, None)


class FoldedConv2d(FoldedLayer):
    """M convolutions as one with M times the groups."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.channels, self.groups = layer.in_channels, layer.groups
        self.stride, self.dilation = layer.stride, layer.dilation
        self.padding: Any = layer.padding
        self.around = layer._reversed_padding_repeated_twice if layer.padding_mode != "zeros" else None
        self.mode = layer.padding_mode

    def forward(self, x: Tensor) -> Tensor:
        """[B, M C, H, W] or [M B, C, H, W]."""
        x, back = to_channels(x, self.experts, self.channels)
        padding = self.padding
        if self.around is not None:
            x, padding = F.pad(x, self.around, mode=self.mode), 0
        weight, bias = self.weight.flatten(0, 1), _joined(self.bias)
        out = F.conv2d(x, weight, bias, self.stride, padding, self.dilation, self.groups * self.experts)
        return to_batch(out, self.experts) if back else out


class FoldedLinear(FoldedLayer):
    """M linear layers as one batched product; ``weight`` is [M, in, out]."""

    transposed = ("weight",)

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.inputs = layer.in_features

    def forward(self, x: Tensor) -> Tensor:
        """[..., M in] or [M B, ..., in]."""
        rows, restore = by_expert(x, self.experts, self.inputs)
        if self.bias is None:
            return restore(torch.bmm(rows, self.weight))
        return restore(torch.baddbmm(self.bias.unsqueeze(1), rows, self.weight))


class FoldedBatchNorm(FoldedLayer):
    """BatchNorm over M C channels: per expert, as each channel has its own statistics; they move in place."""

    takes: ClassVar[Mapping[str, str]] = {name: name for name in ("weight", "bias", "running_mean", "running_var")}
    running_mean: Any
    running_var: Any

    def __init__(self, layer: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__()
        self.channels, self.eps, self.momentum = layer.num_features, layer.eps, layer.momentum
        self.by_batch = layer.training or layer.running_mean is None
        self.after = _after(layer)

    def forward(self, x: Tensor) -> Tensor:
        """[B, M C, ...] or [M B, C, ...]."""
        x, back = to_channels(x, self.experts, self.channels)
        mean, var = _joined(self.running_mean), _joined(self.running_var)
        weight, bias = _joined(self.weight), _joined(self.bias)
        out = F.batch_norm(x, mean, var, weight, bias, self.by_batch, self.momentum or 0.0, self.eps)
        out = self.after(out)
        return to_batch(out, self.experts) if back else out


class FoldedGroupNorm(FoldedLayer):
    """GroupNorm with M G groups over M C channels."""

    def __init__(self, layer: nn.GroupNorm) -> None:
        super().__init__()
        self.channels, self.groups, self.eps = layer.num_channels, layer.num_groups, layer.eps
        self.after = _after(layer)

    def forward(self, x: Tensor) -> Tensor:
        """[B, M C, ...] or [M B, C, ...]."""
        x, back = to_channels(x, self.experts, self.channels)
        out = F.group_norm(x, self.groups * self.experts, _joined(self.weight), _joined(self.bias), self.eps)
        out = self.after(out)
        return to_batch(out, self.experts) if back else out


class FoldedLayerNorm(FoldedLayer):
    """LayerNorm over the last axis, each expert with its own scale and shift."""

    def __init__(self, layer: nn.LayerNorm) -> None:
        super().__init__()
        self.width, self.eps = layer.normalized_shape[-1], layer.eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., M C] or [M B, ..., C]."""
        rows, restore = by_expert(x, self.experts, self.width)
        if self.weight is None:
            return restore(F.layer_norm(rows, (self.width,), None, None, self.eps))
        small = rows.is_cuda or (rows[0].numel() < _SMALL and rows.dtype == self.weight.dtype)
        if small and self.bias is not None:
            plain = F.layer_norm(rows, (self.width,), None, None, self.eps).to(self.weight.dtype)
            return restore(torch.addcmul(self.bias.unsqueeze(1), plain, self.weight.unsqueeze(1)))
        shift = [None] * self.experts if self.bias is None else self.bias.unbind(0)
        parts = zip(rows.unbind(0), self.weight.unbind(0), shift, strict=True)
        return restore(torch.stack([F.layer_norm(r, (self.width,), w, b, self.eps) for r, w, b in parts]))


class FoldedLayerNorm2d(FoldedLayerNorm):
    """The same over the channels of images."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, M C, H, W] or [M B, C, H, W]."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class FoldedLayerScale(FoldedLayer):
    """A scale per expert and channel."""

    takes: ClassVar[Mapping[str, str]] = {"gamma": "gamma"}
    gamma: Any

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.width = int(layer.get_parameter("gamma").numel())

    def forward(self, x: Tensor) -> Tensor:
        """[..., M C] or [M B, ..., C]."""
        rows, restore = by_expert(x, self.experts, self.width)
        return restore(rows * self.gamma.unsqueeze(1))


class FoldedPatches(FoldedLayer):
    """Patch embedding as a batched product: images in the layout *channels*, tokens in the layout *batch*.

    The projection's kernel is as large as its stride, so that a patch is a row and the kernel a matrix.
    """

    takes: ClassVar[Mapping[str, str]] = {"weight": "proj.weight", "bias": "proj.bias"}

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.channels, self.size = layer.proj.in_channels, layer.proj.kernel_size
        self.norm: nn.Module = layer.norm  # folded by the walk

    def forward(self, x: Tensor) -> Tensor:
        """[B, M C, H, W] to [M B, N, D]."""
        x, _ = to_channels(x, self.experts, self.channels)
        high, wide = self.size
        count, down, across = x.shape[0], x.shape[2] // high, x.shape[3] // wide
        cut = x.reshape(count, self.experts, self.channels, down, high, across, wide)
        rows = cut.permute(1, 0, 3, 5, 2, 4, 6).reshape(self.experts, count * down * across, -1)
        matrix = self.weight.flatten(2).transpose(1, 2)
        out = torch.bmm(rows, matrix) if self.bias is None else torch.baddbmm(self.bias.unsqueeze(1), rows, matrix)
        tokens: Tensor = self.norm(out.reshape(self.experts * count, down * across, -1))
        return tokens


class FoldedShortcut(FoldedLayer):
    """Option A of the CIFAR ResNets: zero channels around each expert's own."""

    takes: ClassVar[Mapping[str, str]] = {}

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.stride, self.before, self.after = layer.stride, layer.before, layer.after

    def forward(self, x: Tensor) -> Tensor:
        """[B, M C, H, W] to [B, M C', H', W']."""
        apart = split_axis(x[:, :, :: self.stride, :: self.stride], 1, self.experts)
        return F.pad(apart, (0, 0, 0, 0, self.before, self.after)).flatten(1, 2)


# --- layouts ---------------------------------------------------------------------------------------------------------


def to_channels(x: Tensor, experts: int, channels: int) -> tuple[Tensor, bool]:
    """To [B, M C, ...], and whether it came as [M B, C, ...].

    Raises:
        ValueError: neither fits.
    """
    if x.shape[1] == experts * channels:
        return x, False
    if x.shape[1] == channels and x.shape[0] % experts == 0:
        return split_axis(x, 0, experts).transpose(0, 1).flatten(1, 2), True
    raise ValueError(f"shape {tuple(x.shape)} is not that of {experts} experts with {channels} channels")


def to_batch(x: Tensor, experts: int) -> Tensor:
    """From [B, M C, ...] to [M B, C, ...]."""
    return split_axis(x, 1, experts).transpose(0, 1).flatten(0, 1)


def by_expert(x: Tensor, experts: int, width: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Rows of each expert, [M, R, width], and how the layer's output [M, R, width'] gets the layout of x.

    Raises:
        ValueError: the last axis fits neither layout.
    """
    lead = x.shape[:-1]
    if x.shape[-1] == width and (experts == 1 or lead[0] % experts == 0):
        return x.reshape(experts, -1, width), lambda out: out.reshape(*lead, out.shape[-1])
    if x.shape[-1] == experts * width:
        rows = x.reshape(-1, experts, width).transpose(0, 1)
        return rows, lambda out: out.transpose(0, 1).reshape(*lead, experts * out.shape[-1])
    raise ValueError(f"shape {tuple(x.shape)} is not that of {experts} experts with {width} numbers each")


def split_axis(x: Tensor, axis: int, experts: int) -> Tensor:
    """An axis of M times n as two, M and n; the tensor is copied only where it must be."""
    return x.reshape(*x.shape[:axis], experts, -1, *x.shape[axis + 1 :])


def _joined(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.flatten(0, 1)


def _after(layer: nn.Module) -> nn.Module:
    """What timm's norms do afterwards."""
    parts = [
        part for part in (getattr(layer, "drop", None), getattr(layer, "act", None)) if isinstance(part, nn.Module)
    ]
    return nn.Sequential(*parts) if parts else nn.Identity()


# --- which layer becomes which ---------------------------------------------------------------------------------------

Maker = Callable[[Any], FoldedLayer]


def makers() -> Mapping[type[nn.Module], Maker]:
    """How a layer is folded, by its exact type (a subclass may compute something else)."""
    from experiments.models.cifar_resnet import Shortcut
    from experiments.models.loaded import timm_is_loaded

    found: dict[type[nn.Module], Maker] = {
        nn.Conv2d: FoldedConv2d,
        nn.Linear: FoldedLinear,
        nn.BatchNorm1d: FoldedBatchNorm,
        nn.BatchNorm2d: FoldedBatchNorm,
        nn.GroupNorm: FoldedGroupNorm,
        nn.LayerNorm: FoldedLayerNorm,
        Shortcut: FoldedShortcut,
    }
    return found | _makers_of_timm() if timm_is_loaded() else found


def _makers_of_timm() -> dict[type[nn.Module], Maker]:
    from timm import layers as timm_layers
    from timm.layers.norm import GroupNorm, LayerNorm, LayerNorm2d
    from timm.layers.norm_act import BatchNormAct2d, GroupNormAct

    return {
        timm_layers.Linear: FoldedLinear,
        BatchNormAct2d: FoldedBatchNorm,
        GroupNorm: FoldedGroupNorm,
        GroupNormAct: FoldedGroupNorm,
        LayerNorm: FoldedLayerNorm,
        LayerNorm2d: FoldedLayerNorm2d,
        timm_layers.LayerScale: FoldedLayerScale,
        timm_layers.PatchEmbed: FoldedPatches,
    }
