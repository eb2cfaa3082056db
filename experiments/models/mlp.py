"""Logistic regression and multilayer perceptrons on the pixels of small images: the theory's own scale.

The interface is timm's.  Logistic regression has no backbone: all of it is the head.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from theory.errors import MergeboundError

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh}
MLP_EXAMPLES = ("logistic", "mlp_64", "mlp_64_64", "mlp_64_gelu", "mlp_64_tanh")
"""Names that are listed; every ``mlp_<width>[_<width> ...][_gelu | _tanh]`` is one."""
_NAME = re.compile(r"mlp((?:_[1-9]\d*)+)(?:_(relu|gelu|tanh))?")


class Mlp(nn.Module):
    """Linear layers with an activation after each but the last, which is the head.

    Args:
        widths: of the hidden layers; none for logistic regression.
        num_classes: outputs; 0 for none.
        in_chans, img_size: of the (square) images that are flattened.
        activation: ``relu``, ``gelu`` (exact) or ``tanh``.

    Raises:
        MergeboundError: an unknown activation.
    """

    def __init__(
        self,
        widths: Sequence[int] = (),
        num_classes: int = 10,
        in_chans: int = 1,
        img_size: int = 8,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise MergeboundError(f"activation = {activation!r}: choose from {', '.join(ACTIVATIONS)}")
        self.num_classes = num_classes
        self.in_chans = in_chans
        layers: list[nn.Module] = []
        size = in_chans * img_size * img_size
        for width in widths:
            layers += [nn.Linear(size, width), ACTIVATIONS[activation]()]
            size = width
        self.num_features = self.head_hidden_size = size
        self.flatten = nn.Flatten()
        self.layers = nn.Sequential(*layers)
        self.head = _classifier(size, num_classes)
        self.pretrained_cfg = {
            "input_size": (in_chans, img_size, img_size),
            "mean": (0.5,) * in_chans,
            "std": (0.5,) * in_chans,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "classifier": "head",
        }

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Make a new head with ``num_classes`` outputs (0: none)."""
        if global_pool is not None:
            raise MergeboundError(f"global_pool = {global_pool!r}: there is nothing to pool here; leave it out")
        like = next(self.parameters(), torch.empty(0))
        self.num_classes = num_classes
        self.head = _classifier(self.num_features, num_classes).to(like).train(self.training)

    def forward_features(self, x: Tensor) -> Tensor:
        """(n, in_chans, h, w) to (n, features)."""
        features: Tensor = self.layers(self.flatten(x))
        return features

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(n, features) to logits (n, num_classes); unchanged with ``pre_logits``."""
        out: Tensor = x if pre_logits else self.head(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """(n, in_chans, h, w) to logits (n, num_classes)."""
        return self.forward_head(self.forward_features(x))


def is_mlp(architecture: str) -> bool:
    """Whether :func:`mlp` takes the name."""
    return architecture == "logistic" or _NAME.fullmatch(architecture) is not None


def mlp(architecture: str, classes: int = 10, in_chans: int = 1, img_size: int = 8) -> nn.Module:
    """A network by name: ``logistic``, ``mlp_64`` (one hidden layer of 64, ReLU), ``mlp_128_64_tanh``.

    Raises:
        MergeboundError: another name, or a size that is not positive.
    """
    match = _NAME.fullmatch(architecture)
    if match is None and architecture != "logistic":
        raise MergeboundError(f"architecture: {architecture!r} is not 'logistic' or like 'mlp_64_64_gelu'")
    if in_chans < 1 or img_size < 1:
        raise MergeboundError(f"{architecture}: in_chans = {in_chans} and img_size = {img_size} must be positive")
    widths = tuple(int(width) for width in match[1].split("_")[1:]) if match else ()
    return Mlp(widths, classes, in_chans, img_size, (match[2] if match else None) or "relu")


def _classifier(features: int, classes: int) -> nn.Module:
    return nn.Linear(features, classes) if classes > 0 else nn.Identity()
