"""Read ``torch.save`` files without running what is in them.

``torch.load(weights_only=True)`` unpickles plain tensors only and refuses everything else before it is executed; the
one class allowed beyond torch's own list is ``argparse.Namespace``, plain attributes, where timm keeps its options.
Around it, three further checks: the archive is not compressed (a small file cannot unpack into a large one), no storage
is longer than the record that it comes from, and no tensor reaches beyond its storage.
"""

from __future__ import annotations

import argparse
import logging
import pickle
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merging.errors import CheckpointError
from merging.safetensors_file import Identity, opened

LEGACY_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pth.tar")
"""Names of ``torch.save`` files end like this (``.pth.tar`` is what timm's training script writes)."""

NESTED = ("state_dict", "model_state_dict", "model", "module", "net", "params", "state_dict_ema", "model_ema")
"""Where training checkpoints keep the state dict, in the order of preference (plain weights before averaged ones)."""

AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
"""Where they keep weights averaged over training (exponential moving average)."""

_DEPTH = 3
_log = logging.getLogger(__name__)


def read_legacy(path: Path, *, mapped: bool = False, averaged: bool = False) -> tuple[dict[str, Tensor], Identity]:
    """Read a ``torch.save`` file; tensors that shared memory when saved still do.

    The state dict is the file's content, or what lies under one of the keys :data:`NESTED`, up to three levels deep.

    Args:
        path: the file.
        mapped: map the file into memory where it allows that (not the format before torch 1.6, nor a tar file).
        averaged: read what lies under one of the keys :data:`AVERAGED` instead of the plain weights.

    Raises:
        CheckpointError: missing, damaged, needs more than plain tensors, or holds something else than a state dict; or
            no averaged weights.
    """
    with opened(path) as (handle, identity):
        start = handle.read(8)
        if start == b"version ":
            raise CheckpointError(f"{path}: this is a Git LFS pointer, not the weights: run 'git lfs pull' first")
        if not start:
            raise CheckpointError(f"{path}: the file is empty, so truncated or damaged: copy or save it again")
    records = _records(path) if start.startswith(b"PK") else None
    content = _load(path, mapped=mapped and records is not None)
    state = _find(path, _averaged(path, content) if averaged else content)
    for name, tensor in state.items():
        _check_entry(path, name, tensor)
    tensors = {name: tensor.detach() for name, tensor in state.items()}
    if records is not None:
        _check_storages(path, tensors, records)
    return tensors, identity


def _records(path: Path) -> Counter[int]:
    """Sizes of the archive's storages, after checking that nothing in it grows when it is read."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception as error:  # the bytes are untrusted, and zipfile raises many types on damage
        raise _damaged(path, error) from error
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size for entry in entries):
        raise CheckpointError(
            f"{path}: refused, because its records are compressed, which torch.save never does: save it again"
        )
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise CheckpointError(f"{path}: refused, because its records overlap (damaged or hostile): save it again")
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise CheckpointError(
            f"{path}: refused, because it is a TorchScript program, which holds code: save model.state_dict() of the "
            "original model"
        )
    return Counter(entry.file_size for entry in entries if "/data/" in entry.filename)


def _load(path: Path, *, mapped: bool) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters is said below
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
            except pickle.UnpicklingError as error:
                if _refused_global(error) != "argparse.Namespace":
                    raise
            with torch.serialization.safe_globals([argparse.Namespace]):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        found = _refused_global(error)
        named = f", here {found}" if found else ""
        raise CheckpointError(
            f"{path}: refused, because it is not plain tensors (it holds Python objects or code{named}, which are "
            "never executed, or it is damaged): save model.state_dict(), best as .safetensors"
        ) from error
    except Exception as error:  # the bytes are untrusted, and the reader raises many types on damage
        if "tar format" in str(error):
            raise CheckpointError(
                f"{path}: refused, because torch reads its old .tar format only by running what is in it: load it "
                "where you trust it, and save model.state_dict(), best as .safetensors"
            ) from error
        raise _damaged(path, error) from error


def _refused_global(error: Exception) -> str:
    """The class or function that torch's message names, if it names one."""
    found = re.search(r"GLOBAL ([\w.]{1,200})", str(error))
    return found.group(1) if found else ""


def _averaged(path: Path, content: Any) -> Any:
    for key in AVERAGED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            return content[key]
    raise CheckpointError(f"{path}: holds no averaged weights (none of {', '.join(AVERAGED)}): read the plain ones")


def _find(path: Path, content: Any) -> Mapping[Any, Any]:
    for _ in range(_DEPTH):
        nested = [key for key in NESTED if isinstance(content, Mapping) and isinstance(content.get(key), Mapping)]
        if not nested:
            break
        if len(nested) > 1:
            listed = " and ".join(f"'{key}'" for key in nested)
            _log.warning("%s holds %s: '%s' is used; save another to a file of its own", path, listed, nested[0])
        content = content[nested[0]]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a state dict: save model.state_dict()")
    return content


def _check_entry(path: Path, name: Any, tensor: Any) -> None:
    plain = isinstance(name, str) and type(tensor) in (Tensor, torch.nn.Parameter)
    if plain and tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_nested:
        if tensor.device.type == "meta":
            raise CheckpointError(
                f"{path}: tensor '{name}' has no values (it was saved from the meta device): save model.state_dict() "
                "after loading weights"
            )
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        needed = (tensor.storage_offset() + last + 1) * tensor.element_size() if tensor.numel() else 0
        if needed <= tensor.untyped_storage().nbytes():
            return
        raise CheckpointError(f"{path}: tensor '{name}' reaches beyond its storage: it is damaged, so save it again")
    kind = type(tensor).__name__
    if plain:
        kind = "quantized tensor" if tensor.is_quantized else f"{tensor.layout} tensor"
    raise CheckpointError(f"{path}: entry '{name}' is a {kind}, not a dense tensor: save model.state_dict() only")


def _check_storages(path: Path, tensors: Mapping[str, Tensor], records: Counter[int]) -> None:
    """Each storage must be as long as a record of the archive (torch trusts the pickle in some versions)."""
    found = {
        (tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
        for tensor in tensors.values()
        if tensor.untyped_storage().nbytes()
    }
    if Counter(size for _, size in found) - records:
        raise CheckpointError(f"{path}: a tensor does not fit the data stored for it: it is damaged, so save it again")


def _damaged(path: Path, error: Exception) -> CheckpointError:
    reason = str(error).partition("\n")[0][:200]
    return CheckpointError(f"{path}: cannot be read ({reason}): it is truncated or damaged, so copy or save it again")
