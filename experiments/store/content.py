"""What a run leaves as one blob, and back: states by step against their base, and the log."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from experiments.bases.base import tensors_digest
from experiments.finetune.loop import TrainingLog
from experiments.grid.result import RunResult
from experiments.store.blobs import blob_path
from experiments.store.codec import decode, encode
from experiments.store.errors import StoreError
from merging.partition import DEFAULT_PRIVATE, is_statistic, matches

TaskVectors = Literal["lossless", "bfloat16"]
FORMAT = 2
"""Of the files that are written; those of format 1, which repeat the layout for every state, are read too."""
_READ = (1, 2)
_RECORD = "mergebound"
_VECTOR = "vector"


@dataclass(frozen=True)
class Packed:
    """A result, ready to be stored.

    Attributes:
        tensors: for a safetensors file.
        record: what unpacking needs besides, JSON data.
        content: SHA-256 of what was trained (outcome, bits of every state, log), whatever way it is stored.
        digests: by step, SHA-256 of the tensors that :func:`unpack_state` gives back.
        log: the log's scalars, JSON data.
    """

    tensors: Mapping[str, Tensor]
    record: Mapping[str, Any]
    content: str
    digests: Mapping[int, str]
    log: Mapping[str, Any]

    @cached_property
    def nbytes(self) -> int:
        """Bytes that the run's tensors take (their layout, which runs of one file share, comes on top)."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def bundle(runs: Mapping[str, Packed]) -> bytes:
    """Several runs as the bytes of one safetensors file: one wait for the disk instead of many.

    Names and shapes of tensors, which are alike for most states of a file, are written once.

    Args:
        runs: by digest.
    """
    from safetensors.torch import save

    tensors = {f"{digest}/{name}": t for digest, packed in runs.items() for name, t in packed.tensors.items()}
    layouts: list[Mapping[str, Any]] = []
    records = {
        digest: {
            "vectors": packed.record["vectors"],
            "steps": {step: _shortened(header, layouts) for step, header in packed.record["steps"].items()},
            "log": _shortened(packed.record["log"], layouts),
        }
        for digest, packed in runs.items()
    }
    return save(tensors, {_RECORD: json.dumps({"format": FORMAT, "layouts": layouts, "runs": records})})


def _shortened(header: Mapping[str, Any], layouts: list[Mapping[str, Any]]) -> list[Any]:
    """A header as the number of its layout and what is its own: the lengths of packed blocks."""
    layout = {**header, "packed": {kind: entry["tensors"] for kind, entry in header["packed"].items()}}
    if layout not in layouts:
        layouts.append(layout)
    return [layouts.index(layout), {kind: entry["blocks"] for kind, entry in header["packed"].items()}]


def _lengthened(short: Any, layouts: list[Mapping[str, Any]]) -> dict[str, Any]:
    """The header that :func:`_shortened` was given."""
    number, blocks = short
    layout = layouts[number]
    packed = {kind: {"tensors": tensors, "blocks": blocks[kind]} for kind, tensors in layout["packed"].items()}
    return {**layout, "packed": packed}


def pack(
    result: RunResult,
    base: Mapping[str, Tensor],
    vectors: TaskVectors = "lossless",
    *,
    nothing: Mapping[str, Tensor] | None = None,
) -> Packed:
    """A result as what a file of tensors can hold.

    Args:
        result: of a run; its states must hold at least one step.
        base: tensors of x_0 (:mod:`experiments.store.codec` takes what matches).
        vectors: ``bfloat16`` rounds x - x_0 of the backbone's parameters to that type; head, statistics and counters
            stay exact.
        nothing: an empty :class:`~experiments.store.joined.Reference` that many logs share, where there are many.

    Raises:
        StoreError: there is no state.
    """
    if not result.states:
        raise StoreError("a result without a state cannot be stored; give at least the last finite one")
    tensors: dict[str, Tensor] = {}
    record: dict[str, Any] = {"vectors": vectors, "steps": {}}
    digests, given = {}, {}
    for step in sorted(result.states):
        state = {name: tensor.detach().cpu() for name, tensor in result.states[step].items()}
        given[step] = tensors_digest(state)
        rounded = _rounded(state, base) if vectors == "bfloat16" else {}
        tensors |= {f"{step}/{_VECTOR}/{name}": vector for name, vector in rounded.items()}
        exact = {name: tensor for name, tensor in state.items() if name not in rounded}
        stored, header = encode(exact, base, str(step))
        tensors |= stored
        record["steps"][str(step)] = header | {"names": list(state), "rounded": list(rounded)}
        digests[step] = tensors_digest(_restored(state, rounded, base)) if rounded else given[step]
    columns, scalars = _split_log(result.log)
    stored, record["log"] = encode(columns, {} if nothing is None else nothing, "log")
    tensors |= stored
    identity = {"outcome": result.outcome, "states": given, "log": tensors_digest(columns)}
    content = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return Packed(tensors, record, content, digests, scalars)


def unpack_state(folder: Path, blob: str, run: str, step: int, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state at a step, read without the others.

    Raises:
        StoreError: missing or damaged; names the file.
    """
    path = blob_path(folder, blob)
    record, stored = _read(path, run, str(step))
    header = record.get("steps", {}).get(str(step))
    if header is None:
        raise StoreError(f"{path}: holds no step {step}; it has {', '.join(record.get('steps', {}))}")
    try:
        state = decode(stored, header, base, str(step))
        rounded = {name: stored[f"{step}/{_VECTOR}/{name}"] for name in header["rounded"]}
        return {name: state[name] if name in state else _moved(base[name], rounded[name]) for name in header["names"]}
    except (KeyError, StoreError) as error:
        raise StoreError(f"{path}: {error}; see `mergebound grid verify`") from error


def unpack_log(folder: Path, blob: str, run: str, scalars: Mapping[str, Any]) -> TrainingLog:
    """The log of a run.

    Raises:
        StoreError: missing or damaged; names the file.
    """
    path = blob_path(folder, blob)
    record, stored = _read(path, run, "log")
    try:
        columns = decode(stored, record["log"], {}, "log")
        fields: dict[str, Any] = {name: tensor.numpy() for name, tensor in columns.items()}
        return TrainingLog(**fields, **scalars)
    except (KeyError, TypeError, StoreError) as error:
        raise StoreError(f"{path}: the log cannot be read ({error}); see `mergebound grid verify`") from error


def _read(path: Path, run: str, key: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {})[_RECORD])
            wanted = [name for name in file.keys() if name.startswith(f"{run}/{key}/")]  # noqa: SIM118
            stored = {name.removeprefix(f"{run}/"): file.get_tensor(name) for name in wanted}
    except FileNotFoundError as error:
        raise StoreError(f"{path}: is missing; see `mergebound grid verify`") from error
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise StoreError(f"{path}: is damaged ({reason}); see `mergebound grid verify`") from error
    if not isinstance(record, dict) or record.get("format") not in _READ:
        raise StoreError(f"{path}: is not of a format that this version of mergebound reads; update mergebound")
    found = record.get("runs", {}).get(run)
    if not isinstance(found, dict):
        raise StoreError(f"{path}: does not hold run {run[:12]}; see `mergebound grid verify`")
    if record["format"] == 1:
        return found, stored
    try:
        layouts = record["layouts"]
        steps = {step: _lengthened(short, layouts) for step, short in found["steps"].items()}
        return {"steps": steps, "log": _lengthened(found["log"], layouts)}, stored
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"{path}: its record is damaged; see `mergebound grid verify`") from error


def _split_log(log: TrainingLog) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Arrays as tensors, and everything else."""
    values = {field.name: getattr(log, field.name) for field in dataclasses.fields(log)}
    arrays = {k: torch.from_numpy(np.array(v)) for k, v in values.items() if isinstance(v, np.ndarray)}
    return arrays, {k: v for k, v in values.items() if k not in arrays}


def _rounded(state: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """x - x_0 in bfloat16 for the parameters of the backbone (those that would not stay finite are kept exact)."""
    found = {}
    for name, tensor in state.items():
        other = base.get(name)
        if other is None or other.shape != tensor.shape or other.dtype != tensor.dtype:
            continue
        if tensor.dtype not in (torch.float32, torch.float64) or is_statistic(name) or matches(name, DEFAULT_PRIVATE):
            continue
        vector = (tensor - other).to(torch.bfloat16)
        if not torch.equal(tensor, other) and bool(torch.isfinite(vector).all()):
            found[name] = vector
    return found


def _moved(base: Tensor, vector: Tensor) -> Tensor:
    return base + vector.to(base.dtype)


def _restored(
    state: Mapping[str, Tensor], rounded: Mapping[str, Tensor], base: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    return {name: _moved(base[name], rounded[name]) if name in rounded else tensor for name, tensor in state.items()}
