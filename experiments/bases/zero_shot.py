"""Zero-shot heads: text embeddings of class names in prompt templates, averaged as in the CLIP paper, and cached.

    t_c = normalise( mean over templates of normalise( text(template with class name c) ) )

(Radford et al. 2021, arXiv 2103.00020, section 3.1.4.)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.bases.base import BaseError, tensors_digest
from experiments.bases.clip import ClipBase
from experiments.bases.prompts import templates_for
from experiments.tasks.catalogue import prompt_names
from merging.checkpoint import load_state_dict, save_state_dict


def text_head(
    clip: ClipBase,
    class_names: Sequence[str],
    *,
    data: str = "",
    templates: Sequence[str] | None = None,
    cache: Path | None = None,
    batch_size: int = 256,
) -> Tensor:
    """Normalised text embeddings, (classes, width) float32.

    Args:
        clip: the model.
        class_names: in the order of the labels.
        data: name of the data set: chooses templates, and how its class names are said.
        templates: with ``{}`` for the class name; default: those of the data set.
        cache: folder that embeddings are kept in, by a hash of text tower, tokenizer, names and templates.
        batch_size: texts per pass through the text tower.

    Raises:
        MergeboundError: no classes, or a template without ``{}``.
    """
    chosen = tuple(templates_for(data) if templates is None else templates)
    spoken = prompt_names(data, class_names) if data else tuple(class_names)
    bad = [template for template in chosen if template.count("{}") != 1]
    if bad or not chosen or not spoken:
        what = f"the template {bad[0]!r} needs exactly one {{}}" if bad else "there are no templates or no class names"
        raise BaseError(
            f"zero-shot head of {clip.name}: {what}; give class names and templates like 'a photo of a {{}}.'"
        )
    texts = [template.replace("{}", name) for name in spoken for template in chosen]
    if cache is None:
        return _encode(clip, texts, len(chosen), batch_size)
    key = sha256(json.dumps([text_digest(clip), texts, len(chosen)]).encode()).hexdigest()
    path = Path(cache).expanduser() / f"text-{key[:32]}.safetensors"
    if path.exists():
        stored = load_state_dict(path)
        if stored.keys() == {"text"} and len(stored["text"]) == len(spoken):
            return stored["text"]
        raise BaseError(f"{path}: is not what was stored under this name; remove it")
    text = _encode(clip, texts, len(chosen), batch_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_state_dict(path, {"text": text}, {"clip": clip.name, "classes": list(spoken), "templates": list(chosen)})
    return text


def text_digest(clip: ClipBase) -> str:
    """SHA-256 of what decides a text embedding: weights of the text tower, activation, and token numbers of a probe."""
    weights = {name: tensor for name, tensor in clip.model.state_dict().items() if not name.startswith("visual.")}
    tokens = clip.tokenizer(["A photo of a cat, 0123.", "naïve café"])
    return sha256(
        json.dumps([clip.name, clip.quick_gelu, tensors_digest(weights), torch.as_tensor(tokens).tolist()]).encode()
    ).hexdigest()


def _encode(clip: ClipBase, texts: Sequence[str], per_class: int, batch_size: int) -> Tensor:
    """Embeddings of all texts, averaged over the ``per_class`` texts of each class."""
    device = next(clip.model.parameters()).device
    found = []
    with torch.no_grad():
        for start in range(0, len(texts), batch_size):
            tokens = clip.tokenizer(list(texts[start : start + batch_size])).to(device)
            found.append(F.normalize(clip.model.encode_text(tokens).float(), dim=-1).cpu())  # type: ignore[operator]
    each = torch.cat(found).reshape(len(texts) // per_class, per_class, -1)
    return F.normalize(each.mean(1), dim=-1).clone()
