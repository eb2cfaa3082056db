"""Weights of any local file, with the choice between plain and averaged ones, and prefixes of wrappers removed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from experiments.bases.base import BaseError
from merging.checkpoint import load_state_dict
from merging.folder import find_weights
from merging.legacy import LEGACY_SUFFIXES, read_legacy

WRAPPERS = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.", "net.", "network.")
"""What training code puts before the names of a network's tensors."""
_DEPTH = 3


def read_weights(path: Path, *, ema: bool = False) -> dict[str, Tensor]:
    """All tensors of a checkpoint, on the CPU; nothing in it is executed.

    Args:
        path: any format that :mod:`merging.checkpoint` reads, or a folder.
        ema: the averaged weights (exponential moving average) that a training checkpoint keeps beside the plain ones.

    Raises:
        MergeboundError: missing or damaged, a LoRA adapter, or ``ema`` where the file holds none; names the file.
    """
    if ema:
        file = find_weights(path) if path.is_dir() else path
        if not file.name.endswith(LEGACY_SUFFIXES):
            raise BaseError(f"{file}: this format holds one set of weights; leave ema out")
        state = {name: tensor.clone() for name, tensor in read_legacy(file, averaged=True)[0].items()}
    else:
        state = load_state_dict(path)
    if any(".lora_A" in name or ".lora_B" in name for name in state):
        raise BaseError(
            f"{path}: this is a LoRA adapter, not the weights of a network; name the base that it was trained on"
        )
    return state


def without_prefixes(names: tuple[str, ...], wanted: Mapping[str, object]) -> tuple[dict[str, str], str]:
    """Match names of a file with names of a network, by removing what wrappers put before them.

    Of all prefixes made of :data:`WRAPPERS`, up to three deep, the one that matches most names is taken; names that do
    not have it stay as they are.

    Returns:
        The new name of each name, and the prefix (empty if none helps).

    Raises:
        BaseError: two names become one.
    """
    best, prefix = sum(name in wanted for name in names), ""
    for candidate in _prefixes(names):
        found = sum(name.removeprefix(candidate) in wanted for name in names)
        if found > best:
            best, prefix = found, candidate
    renamed = {name: name.removeprefix(prefix) for name in names}
    if len(set(renamed.values())) < len(names):
        twice = next(name for name in names if name != renamed[name] and renamed[name] in renamed)
        raise BaseError(f"tensors {twice!r} and {renamed[twice]!r} are both there; save one set of weights per file")
    return renamed, prefix


def _prefixes(names: tuple[str, ...]) -> Iterator[str]:
    """Chains of wrappers that some name starts with."""
    found = {""}
    for _ in range(_DEPTH):
        longer = {p + w for p in found for w in WRAPPERS if any(name.startswith(p + w) for name in names)}
        if longer <= found:
            break
        found |= longer
    yield from sorted(found - {""}, key=lambda prefix: (len(prefix), prefix))
