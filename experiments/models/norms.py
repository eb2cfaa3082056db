"""The normalisation layers of a network, and what a merge has to do about them.

A merge averages weights, not what layers see.  BatchNorm keeps running statistics of what its layer saw in training;
those of a merged network belong to none of its experts, and re-estimating them often repairs much of the damage.  Other
normalisations compute theirs on every image and need nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

_SCALE = re.compile(r"(gamma|layer_scale|ls)_?\d*")
_NAMES: tuple[tuple[str, str], ...] = (
    (r"FrozenBatchNorm", "frozen BatchNorm"),
    (r"InplaceAbn", "BatchNorm"),
    (r"EvoNorm2dB", "EvoNorm"),
    (r"EvoNorm", "EvoNorm"),
    (r"FilterResponseNorm", "FilterResponseNorm"),
    (r"GlobalResponseNorm", "GlobalResponseNorm"),
    (r"ScaledStdConv|StdConv", "weight standardisation"),
    (r"LayerScale(2d)?", "layer scale"),
    (r"RM?SNorm\w*|RmsNorm\w*|\w+RMSNorm|\w+RmsNorm", "RMSNorm"),
    (r"SimpleNorm", "SimpleNorm"),
    (r"LayerNorm\w*", "LayerNorm"),
    (r"GroupNorm\w*", "GroupNorm"),
)


@dataclass(frozen=True)
class NormLayer:
    """One layer that normalises, or scales where others normalise.

    Attributes:
        name: of the module (of the tensor, for a layer scale that is a bare parameter).
        kind: ``BatchNorm``, ``frozen BatchNorm``, ``LayerNorm``, ``GroupNorm``, ``InstanceNorm``, ``RMSNorm``,
            ``SimpleNorm``, ``EvoNorm``, ``FilterResponseNorm``, ``GlobalResponseNorm``, ``LocalResponseNorm``, ``weight
            standardisation`` (of a convolution's kernel) or ``layer scale`` (no normalisation).
        channels: how many numbers it scales; 0 if it says nothing.
        has_statistics: whether it keeps running statistics.
        affine: whether it has a scale (and mostly a shift) of its own.
    """

    name: str
    kind: str
    channels: int
    has_statistics: bool
    affine: bool


def normalisation_layers(model: nn.Module) -> list[NormLayer]:
    """Every normalisation layer of the model, in the order of its modules; layer scales are noted too."""
    found = []
    for name, module in model.named_modules():
        kind = _kind(module)
        if kind is not None:
            statistics = getattr(module, "running_mean", None) is not None
            found.append(NormLayer(name, kind, _channels(module), statistics, _affine(module)))
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if _SCALE.fullmatch(key) and parameter.numel() == max(parameter.shape, default=1) > 1:
                found.append(NormLayer(f"{name}.{key}" if name else key, "layer scale", parameter.numel(), False, True))
    return found


def _kind(module: nn.Module) -> str | None:
    known: tuple[tuple[type[nn.Module], str], ...] = (
        (nn.modules.batchnorm._BatchNorm, "BatchNorm"),
        (nn.modules.instancenorm._InstanceNorm, "InstanceNorm"),
        (nn.LayerNorm, "LayerNorm"),
        (nn.GroupNorm, "GroupNorm"),
        (nn.RMSNorm, "RMSNorm"),
        (nn.LocalResponseNorm, "LocalResponseNorm"),
    )
    for cls, kind in known:
        if isinstance(module, cls):
            return kind
    for ancestor in type(module).__mro__:
        for pattern, kind in _NAMES:
            if re.match(rf"(?:{pattern})", ancestor.__name__) and not re.search(
                r"Block|Head|Attn|Mlp", ancestor.__name__
            ):
                return kind
    return None


def _channels(module: nn.Module) -> int:
    for name in ("num_features", "num_channels", "out_channels"):
        if isinstance(getattr(module, name, None), int):
            return int(getattr(module, name))
    own = [t for t in (*module.parameters(recurse=False), *module.buffers(recurse=False)) if t.numel() > 1]
    if own:
        return max(t.numel() for t in own)
    shape = getattr(module, "normalized_shape", ())
    return int(shape[-1]) if shape else 0


def _affine(module: nn.Module) -> bool:
    names = ("gain",) if isinstance(module, nn.Conv2d) else ("weight", "gamma", "scale")
    return any(getattr(module, name, None) is not None for name in names)


def statistics_advice(layers: Iterable[NormLayer]) -> str:
    """What the layers' running statistics ask of a merge, in one sentence."""
    kept = [layer for layer in layers if layer.has_statistics]
    moving = [layer for layer in kept if layer.kind != "frozen BatchNorm"]
    channels = sum(layer.channels for layer in moving)
    if moving:
        return (
            f"{len(moving)} {moving[0].kind} layers keep running statistics ({channels} channels): after a merge, "
            "re-estimate them on images of the tasks (merging.batchnorm.reestimate_batchnorm)"
        )
    if kept:
        return (
            f"{len(kept)} frozen BatchNorm layers hold constant statistics, which experts of one base share: nothing "
            "to re-estimate"
        )
    return "no layer keeps running statistics: there is nothing to re-estimate after a merge"
