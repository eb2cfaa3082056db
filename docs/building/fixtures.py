"""Files and names that pages take for granted (a base, experts, images), made small before a page is run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def prepare(page: str, scratch: Path) -> None:
    """Make what a page names.  Every page finds the examples under ``docs/examples``, as in the repository."""
    examples = scratch / "docs" / "examples"
    if not examples.exists():
        shutil.copytree(ROOT / "docs" / "examples", examples)
    maker = {
        "README.md": _readme,
        "docs/merging.md": _merging,
        "docs/own_method.md": _own_method,
        "docs/theory.md": _theory,
        "docs/troubleshooting.md": _troubleshooting,
    }.get(page)
    if maker is not None:
        maker(scratch)


def names(page: str) -> dict[str, Any]:
    """What the Python of a page finds defined."""
    if page == "docs/own_method.md":
        import torch

        def state(value: float) -> dict[str, torch.Tensor]:
            return {"blocks.0.weight": torch.full((2, 2), value), "head.weight": torch.full((3, 2), value)}

        return {"base": state(0.0), "experts": {name: state(float(i)) for i, name in enumerate("abc")}}
    return {}


def _save(path: Path, tensors: dict[str, Any]) -> None:
    from merging.checkpoint import save_checkpoint

    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, tensors, overwrite=True)


def _noisy(folder: Path, files: tuple[str, ...], *, folders: bool = False) -> None:
    """Checkpoints of the digit ViT: the first is the base, the others lie around it."""
    import torch

    from experiments.models import build_model

    rng = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    base = build_model("vit", classes=10).state_dict()
    for number, name in enumerate(files):
        state = {k: v + 0.02 * number * torch.randn(v.shape, generator=rng) for k, v in base.items()}
        _save(folder / name / "model.safetensors" if folders else folder / name, state)


def _readme(scratch: Path) -> None:
    """ResNet-18 checkpoints with folders of images, and the files of the merging example."""
    import numpy as np
    import timm
    import torch
    from PIL import Image

    torch.manual_seed(0)
    base = timm.create_model("resnet18", num_classes=3).state_dict()
    _save(scratch / "base.safetensors", base)
    for name in ("a", "b"):
        moved = {k: v + 0.01 * torch.randn_like(v) if v.ndim > 1 else v for k, v in base.items()}
        _save(scratch / f"{name}.safetensors", moved)
        for label in ("cat", "dog", "owl"):
            folder = scratch / "data" / name / label
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(4):
                pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    _noisy(scratch, ("B.safetensors", "E1.safetensors", "E2.safetensors"))
    shutil.copy(ROOT / "docs" / "examples" / "recipe.yaml", scratch / "recipe.yaml")


def _merging(scratch: Path) -> None:
    """The files that the page's commands name, and images for statistics."""
    import numpy as np

    _noisy(scratch, ("B.safetensors", "E1.safetensors", "E2.safetensors"))
    _noisy(scratch, ("B", "E1", "E2", "E3"), folders=True)
    examples = scratch / "docs" / "examples"
    _noisy(examples, ("base.safetensors", "photos.safetensors", "sketches.safetensors"))
    rng = np.random.default_rng(0)
    np.savez(scratch / "e1.npz", x_val=rng.integers(0, 256, (24, 8, 8, 1), dtype=np.uint8), y_val=np.arange(24) % 10)


def _own_method(scratch: Path) -> None:
    _noisy(scratch, ("base.safetensors", "a.safetensors", "b.safetensors", "c.safetensors"))


def _theory(scratch: Path) -> None:
    shutil.copy(ROOT / "docs" / "examples" / "recipe.yaml", scratch / "recipe.yaml")


def _troubleshooting(scratch: Path) -> None:
    """Checkpoints that fit, one that does not, one that diverged."""
    import torch

    for name, width, value in (("base", 4, 0.0), ("one", 4, 1.0), ("two", 4, 2.0), ("wide", 6, 1.0)):
        _save(scratch / f"{name}.safetensors", {"body.weight": torch.full((width, 4), value)})
    _save(scratch / "diverged.safetensors", {"body.weight": torch.full((4, 4), float("nan"))})
