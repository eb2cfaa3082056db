"""timm's published weights, from a local file or from timm's own source, fitted to the network that is wanted.

The fitting is timm's: names converted by the architecture's own filter, position embeddings resized to ``img_size``,
the first convolution adapted to ``in_chans``.  The weights are first loaded whole (with the head they came with, every
tensor checked), then the head is exchanged if another number of classes is wanted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.bases.base import Base, BaseError, Provenance, build, first_few, make_base, mismatch
from experiments.bases.known_hashes import check_hash, default_record, remember, replace_entry
from experiments.bases.reading import read_weights
from experiments.bases.sources import hub_file, url_file
from merging.checkpoint import file_hash, open_checkpoint


def load_pretrained(
    name: str,
    *,
    weights: Path | None = None,
    classes: int | None = None,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    sha256: str | None = None,
    download: bool = False,
    ema: bool = False,
    cache: Path | None = None,
    record: Path | None = None,
) -> Base:
    """Published weights of a timm model.

    Args:
        name: timm's name, with or without a tag (``resnet18.a1_in1k``).
        weights: a local file; default: timm's own source, from the local cache or, with ``download``, the network.
        classes: outputs of the head; another number than the file's (or None where it has none) gives a new, seeded
            head; None keeps the file's head.
        options: of the network: ``img_size``, ``in_chans``, ``drop_path_rate``, ...
        seed: names the initial weights of a new head.
        sha256: expected SHA-256 of the file (its beginning is enough).
        download: allow the network.
        ema: the averaged weights of a training checkpoint.
        cache: where downloads are kept; default: Hugging Face's cache, and ``MERGEBOUND_CACHE`` for web addresses.
        record: where hashes are recorded (:mod:`experiments.bases.known_hashes`); default: beside the cache.

    Raises:
        MergeboundError: unknown name, no weights, another hash, tensors that do not fit (the first few are named).
    """
    cfg = known(name)
    published = None
    if weights is None:
        path, published = locate(name, cfg, download=download, cache=cache)
        source = name
    else:
        path, source = Path(weights), str(weights)
    found = verified(path, name if weights is None else str(path.absolute()), sha256, published, record)
    state = read_weights(path, ema=ema)
    held = classes_held(state, cfg)
    if held == 0 and classes is None:
        raise BaseError(f"{path}: holds no classifier ({cfg.classifier}); say how many classes the new head has")
    loaded = adapted(name, cfg, state, held, options or {}, seed, path)
    wanted = held if classes is None else classes
    kept, notes = with_head(name, cfg, loaded, held, wanted, options or {}, seed, path)
    provenance = Provenance(
        "pretrained",
        source,
        sha256=found[0],
        licence=cfg.license if weights is None else None,
        seed=seed,
        notes=(found[1], *(["averaged (EMA) weights"] if ema else []), *notes),
        details={"timm": _version()} | ({"url": cfg.hf_hub_id or cfg.url} if weights is None else {}),
    )
    return make_base(kept, name, wanted, options or {}, provenance)


def known(name: str) -> Any:
    """timm's description of a model's published weights (a ``PretrainedCfg``).

    Raises:
        MergeboundError: unknown model or tag.
    """
    import timm

    plain, _, tag = name.partition(".")
    if not timm.is_model(plain):
        from experiments.models import build_model

        build_model(plain)  # raises with suggestions, unless it is a network of our own
        raise BaseError(f"{name}: there are no published weights of this architecture; use kind checkpoint or pretrain")
    if tag and not timm.models.is_model_pretrained(name):
        tags = [each.partition(".")[2] for each in timm.list_models(f"{plain}.*", pretrained=True)]
        raise BaseError(f"{name}: {plain} has no weights tagged {tag!r}; there are: {', '.join(tags) or 'none'}")
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None:
        raise BaseError(f"{name}: timm describes no weights for it; use kind checkpoint")
    return cfg


def locate(name: str, cfg: Any, *, download: bool, cache: Path | None = None) -> tuple[Path, str | None]:
    """The file of published weights, and its published hash or the beginning of it.

    Raises:
        BaseError: there are none, they are not on this machine, or cannot be downloaded.
    """
    command = f"mergebound base get {name}"
    if cfg.hf_hub_id:
        files = [cfg.hf_hub_filename] if cfg.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
        if str(files[0]).endswith((".npz", ".npy")):
            raise BaseError(f"{name}: its weights are a NumPy archive, which only timm reads; choose another tag")
        return hub_file(cfg.hf_hub_id, files, download=download, command=command, cache=cache)
    if isinstance(cfg.url, str) and cfg.url and not cfg.url.endswith((".npz", ".npy")):
        return url_file(cfg.url, download=download, command=command, cache=cache)
    raise BaseError(f"{name}: timm knows no weights that can be fetched for it; give a local file or another tag")


def verified(
    path: Path, name: str, expected: str | None, published: str | None, record: Path | None
) -> tuple[str, str]:
    """SHA-256 of a file after comparing it, and against what, in words.

    Raises:
        MergeboundError: another hash than the given, published or recorded one; or the file cannot be read.
    """
    found = file_hash(path)
    size = sum(open_checkpoint(path).sizes)
    record = record or default_record()
    for digits in (expected, published):
        if digits is not None:
            check_hash(found, digits, path)
    if expected is not None or published is not None:
        said = "given" if expected is not None else "published"
        replace_entry(record, name, found, size, str(path))
        return found, f"the SHA-256 is the {said} one"
    return found, remember(record, name, found, size, str(path))


def classes_held(state: Mapping[str, Tensor], cfg: Any) -> int:
    """Outputs of the classifier in a file; 0 where it has none.

    A file whose names the architecture's filter converts first may not show it: then timm's own number is taken.
    """
    for classifier in _classifiers(cfg):
        weight = state.get(f"{classifier}.weight")
        if weight is not None:
            return int(weight.shape[0]) - (cfg.label_offset or 0)
    last = {classifier.rpartition(".")[2] for classifier in _classifiers(cfg)} | {"head", "fc", "classifier"}
    seen = any(name.endswith(".weight") and name.split(".")[-2] in last for name in state if "." in name)
    return int(cfg.num_classes) if seen else 0


def adapted(
    name: str,
    cfg: Any,
    state: Mapping[str, Tensor],
    held: int,
    options: Mapping[str, Any],
    seed: int,
    path: Path,
) -> dict[str, Tensor]:
    """The weights after timm's conversions, as the state dict of a network with ``held`` classes.

    Raises:
        BaseError: tensors are missing, too many, or of another shape; or an option that the network does not take.
    """
    import timm

    overlay: dict[str, Any] = {"state_dict": dict(state), "source": "", "num_classes": held}
    if held == 0:
        overlay["label_offset"] = 0
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = timm.create_model(
                name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=held, **dict(options)
            )
    except (RuntimeError, KeyError, AssertionError, TypeError, ValueError) as error:
        raise BaseError(_complaint(name, path, error)) from error
    return {each: tensor.detach().clone() for each, tensor in model.state_dict().items()}


def with_head(
    name: str,
    cfg: Any,
    loaded: dict[str, Tensor],
    held: int,
    wanted: int,
    options: Mapping[str, Any],
    seed: int,
    path: Path,
) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict of a network with ``wanted`` classes, and what was done, in words."""
    if wanted == held:
        return loaded, []
    target = build(name, wanted, options, seed).state_dict()
    heads = tuple(f"{classifier}." for classifier in _classifiers(cfg))
    new = [n for n in target if n not in loaded or loaded[n].shape != target[n].shape]
    wrong = [n for n in new if not n.startswith(heads)]
    if wrong:
        raise BaseError(f"{path}: does not fit {name}: missing or of another shape: {first_few(wrong)}; check the tag")
    said = f"the head of {held} classes was exchanged for a new one of {wanted}" if held else "the head is new"
    return {n: target[n].detach().clone() if n in new else loaded[n] for n in target}, [said]


def _classifiers(cfg: Any) -> tuple[str, ...]:
    found = cfg.classifier or ()
    return (found,) if isinstance(found, str) else tuple(found)


def _complaint(name: str, path: Path, error: Exception) -> str:
    """torch's message about tensors that do not fit, on one line and with the first few names."""
    text = str(error)
    missing, unexpected = _quoted(text, "Missing"), _quoted(text, "Unexpected")
    shapes = [
        f"{each} is {_shape(there)} where {_shape(here)} is needed"
        for each, there, here in re.findall(
            r"size mismatch for (\S+): copying a param with shape (.*?) from checkpoint, the shape in current model is "
            r"(.*?)\.(?:\n|$)",
            text,
        )
    ]
    found = mismatch(missing, unexpected, shapes) or " ".join(text.split())[:300] or type(error).__name__
    return f"{path}: does not fit {name}: {found}; check the name and the options, or read it with kind checkpoint"


def _quoted(text: str, word: str) -> list[str]:
    """The names in one of torch's lists."""
    line = next((line for line in text.splitlines() if f"{word} key(s) in state_dict" in line), "")
    return re.findall(r'"([^"]+)"', line)


def _shape(text: str) -> str:
    return text.replace("torch.Size(", "").rstrip(")").replace("[", "(").replace("]", ")")


def _version() -> str:
    import timm

    return str(timm.__version__)
