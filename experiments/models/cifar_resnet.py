"""The ResNets for CIFAR-10 of He et al.: three stages of 16, 32 and 64 channels, shortcuts without parameters.

Source: He, Zhang, Ren and Sun, "Deep residual learning for image recognition", CVPR 2016 (arXiv:1512.03385), section
4.2: depth 6n + 2, option A shortcuts (every second pixel, missing channels are zero).  Tensor names are those of the
CIFAR-10 networks that are usually passed around (``conv1``, ``bn1``, ``layer1.0.conv1`` ... ``linear``), so that their
files load with ``strict=True``.  The interface is timm's.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from theory.errors import MergeboundError

CIFAR_DEPTHS = (20, 32, 44, 56)
"""Depths with a name: ``cifar_resnet20`` and so on."""
CIFAR_MEAN = (0.485, 0.456, 0.406)
CIFAR_STD = (0.229, 0.224, 0.225)
"""How the images of the published files are normalised."""
_GROUPS = 8


def _batch_norm(channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels)


def _group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(_GROUPS, channels)


_NORMS: dict[str, Callable[[int], nn.Module]] = {"bn": _batch_norm, "gn": _group_norm}


class Shortcut(nn.Module):
    """Option A: every ``stride``-th pixel, and zero channels, half of them before and half after."""

    def __init__(self, channels: int, wanted: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = (wanted - channels) // 2
        self.after = wanted - channels - self.before

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, h, w) to (n, wanted, ceil(h / stride), ceil(w / stride))."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


class Block(nn.Module):
    """Two 3x3 convolutions and the shortcut around them."""

    def __init__(self, channels: int, wanted: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, wanted, 3, stride, 1, bias=False)
        self.bn1 = norm(wanted)
        self.conv2 = nn.Conv2d(wanted, wanted, 3, 1, 1, bias=False)
        self.bn2 = norm(wanted)
        same = stride == 1 and channels == wanted
        self.shortcut = nn.Identity() if same else Shortcut(channels, wanted, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, h, w) to (n, wanted, h', w')."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class CifarResNet(nn.Module):
    """A ResNet of depth 6n + 2 for small images; 269,722 parameters at depth 20 with ten classes and three channels.

    Args:
        depth: 20, 32, 44, 56 or any other 6n + 2.
        num_classes: outputs; 0 for none.
        in_chans: channels of the images.
        norm: ``"bn"`` (BatchNorm) or ``"gn"`` (GroupNorm, eight groups; same tensor names, no running statistics).

    Raises:
        MergeboundError: a depth or a norm that there is not.
    """

    def __init__(self, depth: int = 20, num_classes: int = 10, in_chans: int = 3, norm: str = "bn") -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise MergeboundError(f"depth = {depth}: a CIFAR ResNet has depth 6n + 2; give 20, 32, 44 or 56")
        if norm not in _NORMS:
            raise MergeboundError(f"norm = {norm!r}: choose 'bn' (BatchNorm) or 'gn' (GroupNorm)")
        layer = _NORMS[norm]
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = 64
        self.conv1 = nn.Conv2d(in_chans, 16, 3, 1, 1, bias=False)
        self.bn1 = layer(16)
        blocks = (depth - 2) // 6
        self.layer1 = _stage(16, 16, 1, blocks, layer)
        self.layer2 = _stage(16, 32, 2, blocks, layer)
        self.layer3 = _stage(32, 64, 2, blocks, layer)
        self.linear = _classifier(64, num_classes)
        self.feature_info = [
            {"num_chs": 16 * 2**stage, "reduction": 2**stage, "module": f"layer{stage + 1}"} for stage in range(3)
        ]
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)
        self.pretrained_cfg = {
            "architecture": f"cifar_resnet{depth}",
            "input_size": (in_chans, 32, 32),
            "mean": CIFAR_MEAN,
            "std": CIFAR_STD,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "num_classes": 10,
            "first_conv": "conv1",
            "classifier": "linear",
        }

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.linear

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Make a new head with ``num_classes`` outputs (0: none)."""
        if global_pool not in (None, "avg"):
            raise MergeboundError(f"global_pool = {global_pool!r}: a CIFAR ResNet averages over the image; use 'avg'")
        self.num_classes = num_classes
        head = _classifier(self.num_features, num_classes)
        if isinstance(head, nn.Linear):
            nn.init.kaiming_normal_(head.weight)
        self.linear = head.to(self.conv1.weight).train(self.training)

    def forward_features(self, x: Tensor) -> Tensor:
        """(n, in_chans, h, w) to (n, 64, ceil(h / 4), ceil(w / 4))."""
        out = F.relu(self.bn1(self.conv1(x)))
        maps: Tensor = self.layer3(self.layer2(self.layer1(out)))
        return maps

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(n, 64, h, w) to logits (n, num_classes); with ``pre_logits`` to pooled features (n, 64)."""
        pooled = x.mean((2, 3))
        out: Tensor = pooled if pre_logits else self.linear(pooled)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """(n, in_chans, h, w) to logits (n, num_classes)."""
        return self.forward_head(self.forward_features(x))


def _stage(channels: int, wanted: int, stride: int, blocks: int, norm: Callable[[int], nn.Module]) -> nn.Sequential:
    rest = [Block(wanted, wanted, 1, norm) for _ in range(blocks - 1)]
    return nn.Sequential(Block(channels, wanted, stride, norm), *rest)


def _classifier(features: int, classes: int) -> nn.Module:
    return nn.Linear(features, classes) if classes > 0 else nn.Identity()
