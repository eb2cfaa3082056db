"""CLIP image towers as backbones, with zero-shot heads made of text, through ``open_clip`` (the ``clip`` extra).

A :class:`~experiments.bases.clip_classifier.ClipClassifier` looks like a timm model: its backbone is the image tower
with its projection, its head a linear layer on the normalised image embedding.  With the head of
:meth:`ClipBase.classifier` its logits are CLIP's own: logit scale times the cosine between image and text.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.bases.base import CLIP_PREFIX, Base, BaseError, Provenance, check_fits, make_base
from experiments.bases.clip_classifier import ClipClassifier
from experiments.bases.known_hashes import check_hash
from experiments.bases.pretrained import verified
from experiments.bases.sources import hub_file, url_file
from experiments.tasks.form import InputFormat
from merging.checkpoint import file_hash, load_state_dict
from theory.errors import nearest

OPENAI_ONLY = ("input_resolution", "context_length", "vocab_size")
"""Entries of OpenAI's own state dicts, which also tell that the network uses QuickGELU."""
INSTALL = "pip install 'mergebound[clip]'"


@dataclass(frozen=True)
class ClipBase:
    """A CLIP model on this machine.

    Attributes:
        name: open_clip's.
        model: open_clip's network (both towers), in evaluation mode.
        tokenizer: its tokenizer.
        form: what the image tower takes.
        quick_gelu: whether the network was built with OpenAI's QuickGELU.
        image_size: asked for by the user; None for the model's own.
        provenance: where the weights come from.
    """

    name: str
    model: nn.Module
    tokenizer: Any
    form: InputFormat
    quick_gelu: bool
    image_size: int | None
    provenance: Provenance

    @property
    def logit_scale(self) -> float:
        """The factor on cosines."""
        return float(self.model.logit_scale.detach().exp())  # type: ignore[operator]

    @property
    def logit_bias(self) -> float | None:
        """What is added to scaled cosines; None for most models."""
        bias = getattr(self.model, "logit_bias", None)
        return None if bias is None else float(bias.detach())

    def classifier(self, text: Tensor) -> ClipClassifier:
        """The image tower with a zero-shot head.

        Args:
            text: normalised text embeddings, (classes, width), as :mod:`experiments.bases.zero_shot` makes them.
        """
        bias = self.logit_bias
        found = ClipClassifier(
            self.model.visual,  # type: ignore[arg-type]
            int(text.shape[1]),
            len(text),
            bias=bias is not None,
            form=self.form,
        )
        with torch.no_grad():
            found.head.weight.copy_(self.logit_scale * text)  # type: ignore[operator]
            if bias is not None:
                found.head.bias.fill_(bias)  # type: ignore[operator]
        return found.eval()

    def base(self, class_names: Sequence[str], *, data: str = "", cache: Path | None = None) -> Base:
        """The image tower with the zero-shot head of these classes, as a base.

        Args:
            class_names: in the order of the labels.
            data: name of the data set, which chooses the prompt templates and the spoken class names.
            cache: folder of text embeddings; default: nothing is kept.
        """
        from experiments.bases.zero_shot import text_head

        text = text_head(self, class_names, data=data, cache=cache)
        options: dict[str, Any] = {"quick_gelu": self.quick_gelu, "image_size": self.image_size}
        return make_base(
            self.classifier(text).state_dict(),
            f"{CLIP_PREFIX}{self.name}",
            len(class_names),
            {key: value for key, value in options.items() if value},
            self.provenance,
        )


def load_clip(
    name: str,
    weights: Path | None = None,
    download: bool = False,
    *,
    tag: str | None = None,
    sha256: str | None = None,
    image_size: int | None = None,
    quick_gelu: bool | None = None,
    cache: Path | None = None,
    record: Path | None = None,
) -> ClipBase:
    """A CLIP model from local weights, or from open_clip's source.

    Args:
        name: open_clip's or OpenAI's (``ViT-B-32``, ``ViT-B/32``), of any model that ``open_clip`` was told of.
        weights: ``.safetensors``, or a ``torch.save`` file of plain tensors, with open_clip's or OpenAI's names.
        download: allow the network, where no ``weights`` are given.
        tag: open_clip's name of the weights (``laion2b_s34b_b79k``, ``openai``), where no ``weights`` are given.
        sha256: expected SHA-256 of the file (its beginning is enough).
        image_size: another size; position embeddings are resized, as open_clip does it.
        quick_gelu: whether the weights were trained with OpenAI's QuickGELU, which no tensor tells; default: what the
            tag says, or yes for a state dict that OpenAI wrote, or what ``name`` says.  For a local copy of OpenAI's
            weights under open_clip's names take a name that ends in ``-quickgelu``, or say so here.
        cache: where downloads are kept.
        record: where hashes are recorded.

    Raises:
        MergeboundError: ``open_clip`` is not installed, unknown name or tag, no weights, another hash, tensors that do
            not fit.
    """
    open_clip = library()
    name = name.replace("/", "-")
    normalisation: dict[str, Any] = {}
    if weights is None:
        path, published, normalisation = _locate(open_clip, name, tag, download, cache)
        said = verified(path, f"{name}:{tag}", sha256, published, record)
        digest, note, source = said[0], said[1], f"{name}:{tag}"
    else:
        path, source = Path(weights), str(weights)
        digest, note = file_hash(path), ""
        if sha256 is not None:
            check_hash(digest, sha256, path)
            note = "the SHA-256 is the given one"
    state = load_state_dict(path)
    openai = any(key in state for key in OPENAI_ONLY)
    quick = (openai or bool(normalisation.get("quick_gelu", False))) if quick_gelu is None else quick_gelu
    model = _build(open_clip, name, quick, image_size)
    _fill(model, state, path, name)
    notes = [note] if note else []
    if quick and not _config(open_clip, name).get("quick_gelu", False):
        notes.append("built with QuickGELU, as these weights were trained with it")
    details = {"open_clip": str(getattr(open_clip, "__version__", "unknown"))}
    provenance = Provenance("clip", source, sha256=digest, notes=tuple(notes), details=details)
    form = _form(open_clip, model, normalisation)
    return ClipBase(name, model.eval(), _tokenizer(open_clip, name), form, quick, image_size, provenance)


def build_classifier(
    name: str, classes: int, *, seed: int = 0, quick_gelu: bool = False, image_size: int | None = None
) -> ClipClassifier:
    """A CLIP image tower with seeded initial weights and a head of ``classes`` outputs.

    Raises:
        MergeboundError: ``open_clip`` is not installed, or does not know the name.
    """
    open_clip = library()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _build(open_clip, name.replace("/", "-"), quick_gelu, image_size)
        width = int(_config(open_clip, name.replace("/", "-"))["embed_dim"])
        bias = getattr(model, "logit_bias", None) is not None
        return ClipClassifier(
            model.visual,  # type: ignore[arg-type]
            width,
            classes,
            bias=bias,
            form=_form(open_clip, model, {}),
        )


def library() -> Any:
    """The ``open_clip`` package.

    Raises:
        BaseError: it is not installed; tells the command that installs it.
    """
    try:
        import open_clip
    except ImportError as error:
        raise BaseError(
            f"CLIP models need open_clip, which is not installed here ({error}); install: {INSTALL}"
        ) from error
    return open_clip


def _config(open_clip: Any, name: str) -> Mapping[str, Any]:
    config = open_clip.get_model_config(name)
    if config is None or "vision_cfg" not in config:
        close = nearest(name, open_clip.list_models())
        if len(close) > 200:
            close = "see open_clip.list_models(); a JSON file of your own: open_clip.add_model_config(FILE)"
        raise BaseError(f"architecture: open_clip has no CLIP model {name!r}; {close}")
    found: Mapping[str, Any] = config
    return found


def _build(open_clip: Any, name: str, quick_gelu: bool, image_size: int | None) -> nn.Module:
    _config(open_clip, name)
    try:
        with _without_advice():
            model: nn.Module = open_clip.create_model(
                name,
                pretrained=None,
                pretrained_hf=False,
                force_quick_gelu=quick_gelu,
                force_image_size=image_size,
            )
    except (OSError, RuntimeError, ImportError, ValueError, TypeError) as error:
        raise BaseError(f"{name}: open_clip cannot build it ({' '.join(str(error).split())[:300]})") from error
    return model


@contextmanager
def _without_advice() -> Iterator[None]:
    """Keep quiet that the weights are random when a network is built: they are loaded afterwards."""

    def keep(record: logging.LogRecord) -> bool:
        return "initialized randomly" not in record.getMessage()

    loggers = (logging.getLogger(), logging.getLogger("open_clip.factory"))
    for logger in loggers:
        logger.addFilter(keep)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(keep)


def _fill(model: nn.Module, state: dict[str, Tensor], path: Path, name: str) -> None:
    """Load weights with the conversions that open_clip does for published files."""
    from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed

    if any(key.startswith("vision_model.") for key in state):
        raise BaseError(
            f"{path}: has the names of the transformers library; take the weights in open_clip's or OpenAI's form"
        )
    state = {key: tensor for key, tensor in state.items() if key not in OPENAI_ONLY}
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    own = model.state_dict()
    for key in ("logit_scale", "logit_bias"):
        if key in state and key in own:
            state[key] = state[key].reshape(own[key].shape)
    state.pop("text.transformer.embeddings.position_ids", None)
    try:
        resize_pos_embed(state, model)
        resize_text_pos_embed(state, model)
    except (RuntimeError, AttributeError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BaseError(f"{path}: its position embeddings do not fit {name} ({reason}); check the name") from error
    check_fits(state, own, path, "check the name of the CLIP model", fits=name)
    model.load_state_dict({key: tensor.to(own[key].dtype) for key, tensor in state.items()})


def _form(open_clip: Any, model: nn.Module, given: Mapping[str, Any]) -> InputFormat:
    found = {**(open_clip.get_model_preprocess_cfg(model) or {})}
    found |= {key: given[key] for key in ("mean", "std", "interpolation") if given.get(key)}
    size = found.get("size") or model.visual.image_size  # type: ignore[union-attr]
    height, width = (size, size) if isinstance(size, int) else tuple(size)  # type: ignore[arg-type]
    mean = tuple(float(v) for v in found.get("mean") or open_clip.OPENAI_DATASET_MEAN)
    std = tuple(float(v) for v in found.get("std") or open_clip.OPENAI_DATASET_STD)
    return InputFormat(3, int(height), int(width), mean, std, str(found.get("interpolation") or "bicubic"), 1.0)


def _tokenizer(open_clip: Any, name: str) -> Any:
    try:
        return open_clip.get_tokenizer(name)
    except (OSError, ImportError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise BaseError(
            f"{name}: its tokenizer is not on this machine ({reason}); get it, or take another model"
        ) from error


def _locate(
    open_clip: Any, name: str, tag: str | None, download: bool, cache: Path | None
) -> tuple[Path, str | None, dict[str, Any]]:
    tags = open_clip.list_pretrained_tags_by_model(name)
    _config(open_clip, name)
    known = dict(open_clip.get_pretrained_cfg(name, tag) or {}) if tag else {}
    if not known:
        listed = ", ".join(tags) or "none"
        wrong = f"there are no weights tagged {tag!r}" if tag else "say which weights"
        raise BaseError(f"{name}: {wrong}; give a local file, or one of the tags {listed}")
    command = f"mergebound base get {CLIP_PREFIX}{name}:{tag}"
    place = str(known.get("hf_hub") or "")
    if place:
        repository, _, file = place.rpartition("/")
        stems = [file.rpartition(".")[0]] if file else ["open_clip_model", "open_clip_pytorch_model"]
        files = [f"{stem}.safetensors" for stem in stems] + ([file] if file else ["open_clip_pytorch_model.bin"])
        return *hub_file(repository, list(dict.fromkeys(files)), download=download, command=command, cache=cache), known
    if known.get("url"):
        return *url_file(str(known["url"]), download=download, command=command, cache=cache), known
    raise BaseError(f"{name}: open_clip gives no address for {tag!r}; give a local file")
