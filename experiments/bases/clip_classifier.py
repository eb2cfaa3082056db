"""A CLIP image tower that looks like a timm model: backbone, linear head, and the methods that split them."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from experiments.tasks.form import InputFormat


class ClipClassifier(nn.Module):
    """An image tower with a linear head on its normalised embedding; takes images (n, 3, height, width).

    Args:
        visual: open_clip's image tower; gives (n, width).
        width: of the embedding.
        classes: outputs of the head; 0 for none.
        bias: whether the head has one (models trained with a sigmoid loss have a logit bias).
        form: what the tower takes.
    """

    def __init__(self, visual: nn.Module, width: int, classes: int, *, bias: bool, form: InputFormat) -> None:
        super().__init__()
        self.visual = visual
        self.num_features = self.head_hidden_size = width
        self.num_classes = classes
        self.with_bias = bias
        self.head: nn.Module = nn.Linear(width, classes, bias=bias) if classes else nn.Identity()
        self.default_cfg = self.pretrained_cfg = {
            "input_size": (form.channels, form.height, form.width),
            "fixed_input_size": True,
            "mean": form.mean,
            "std": form.std,
            "interpolation": form.interpolation,
            "crop_pct": form.crop,
            "num_classes": classes,
            "classifier": "head",
        }

    def forward_features(self, images: Tensor) -> Tensor:
        """Projected image embedding, not normalised, (n, width)."""
        found = self.visual(images)
        embedding: Tensor = found[0] if isinstance(found, tuple) else found
        return embedding

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Normalised embedding, or logits (n, classes) of it."""
        embedding = F.normalize(features, dim=-1)
        logits: Tensor = embedding if pre_logits else self.head(embedding)
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """Logits, (n, classes)."""
        return self.forward_head(self.forward_features(images))

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new head in its place; ``global_pool`` is there for timm's signature and changes nothing."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes, bias=self.with_bias) if num_classes else nn.Identity()
