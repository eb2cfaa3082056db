"""Open the checkpoints of a merge (headers only), check that they fit, and resolve settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.merge_job.job import DTYPES, Job, Stage, naming, ordered
from experiments.merge_job.targets import check_files, check_output
from merging.checkpoint import Checkpoint, file_hash, open_checkpoint
from merging.config import MergeSpec
from merging.errors import CheckpointError, MethodError
from merging.keys import harmonise
from merging.lazy import LazyState, Spec, specs
from merging.lora import CONFIG as ADAPTER_CONFIG
from merging.lora import read_adapter
from merging.method import Method
from merging.partition import DEFAULT_PRIVATE, Partition, partition
from merging.registry import get
from merging.remote_path import last_name, shown
from merging.settings import resolve
from merging.statistics import ARGUMENTS, load_statistics
from merging.tied import dealias
from merging.types import StateDict


def prepare(spec: MergeSpec, tell: Stage = lambda stage: None) -> Job:
    """Open the checkpoints (headers only), check that they fit, and work out every tensor's settings.

    Args:
        spec: the merge.
        tell: called with the name of each stage.

    Raises:
        CheckpointError: a target or a checkpoint is at fault.
        MethodError: the method or its settings are.
    """
    inputs = [*([] if spec.base is None else [spec.base]), *spec.experts]
    if spec.out is not None:
        check_output(spec.out, inputs, overwrite=spec.overwrite)
        if spec.copy_files_from is not None and spec.out.suffix == ".safetensors" and spec.mergekit is None:
            raise CheckpointError(f"{spec.out}: files can only be copied along into a folder: name a folder as target")
    if spec.dtype is not None and spec.dtype not in DTYPES:
        raise MethodError(f"--dtype {spec.dtype}: choose among {', '.join(DTYPES)}")
    if spec.mergekit is None:
        method = get(spec.method)
        _check_method(spec, method)
    tell("reading headers")
    files = dict(zip(spec.names, spec.experts, strict=True))
    base = None if spec.base is None else open_checkpoint(spec.base)
    experts: dict[str, StateDict] = {name: _open_expert(path, base) for name, path in files.items()}
    reference = experts[min(experts)] if base is None else base
    origin = files[min(experts)] if spec.base is None else spec.base
    paths = {"base": origin, **files}
    if spec.out is not None:
        check_files(spec.out, [state for state in (base, *experts.values()) if isinstance(state, Checkpoint)])
    patterns = DEFAULT_PRIVATE if spec.private is None else spec.private
    with naming(paths):
        try:
            parts = partition(reference, patterns)
        except CheckpointError as error:
            raise CheckpointError(f"{shown(origin)}: {error}") from None
        if spec.policy == "union" and base is None:
            raise MethodError("--policy union says what stays at the base: add --base, or use intersection")
        states = harmonise(reference, experts, spec.policy, parts)
        aliases = dealias(states.base, states.experts, states.parts.coordinates)
    states = replace(states, parts=_without(states.parts, aliases))
    settings, coefficients, rules = dict(spec.settings), ordered(spec.coefficients, spec.names), spec.rules
    if spec.mergekit is not None:
        plan = spec.mergekit.plan(states.parts.shared, states.parts.buffers)
        method, settings, coefficients, rules = plan.method, plan.settings, plan.coefficients, plan.rules
        _check_method(spec, method)
    if base is None and not method.base_free(method.settings(_plain(settings))):
        raise MethodError(
            f"method '{method.name}' needs the checkpoint that the experts were fine-tuned from: add --base"
        )
    hashes: dict[Path, str] = {}
    if spec.statistics:
        found, hashes = _statistics(spec, method, tell)
        coefficients = found.pop("coefficients", coefficients)
        settings |= found
    if coefficients is None and method.coefficients == "required":
        collected = ", or --statistics with a file of `mergebound collect`" if "groups" in method.extras else ""
        raise MethodError(
            f"method '{method.name}' needs coefficients: add --alpha with {len(experts)} comma-separated numbers"
            f"{collected}"
        )
    covered = states.parts.coordinates if method.linear or method.merges_buffers else states.parts.shared
    groups = resolve(method, covered, settings, coefficients, rules, spec.names)
    return Job(
        spec,
        method,
        states,
        settings,
        coefficients,
        rules,
        tuple(groups),
        aliases,
        paths,
        hashes,
    )


def _open_expert(path: Path, base: StateDict | None) -> StateDict:
    """A checkpoint, or the base with a LoRA adapter; products are formed when a tensor is asked for."""
    if not (path / ADAPTER_CONFIG).is_file():
        return open_checkpoint(path)
    if base is None:
        raise CheckpointError(f"{path}: this is a LoRA adapter: add --base, the model that it was trained on")
    adapter = read_adapter(path)
    described = dict(specs(base)) | {name: Spec(tuple(t.shape), t.dtype) for name, t in adapter.replaced.items()}
    for name, factor in adapter.factors.items():
        if name not in described or described[name].shape != factor.shape:
            raise CheckpointError(
                f"{path}: the adapter changes '{name}' of shape {factor.shape}, which the base lacks: use the base it "
                "was trained on"
            )
        wide = torch.float64 if torch.float64 in (described[name].dtype, factor.up.dtype) else torch.float32
        described[name] = Spec(factor.shape, wide)

    def read(name: str) -> Tensor:
        if name in adapter.replaced:
            return adapter.replaced[name]
        if name in adapter.factors:
            return (base[name].to(torch.float64) + adapter.factors[name].dense()).to(described[name].dtype)
        return base[name]

    return LazyState(described, read)


def _check_method(spec: MergeSpec, method: Method) -> None:
    """What can be said about the method before any file is opened."""
    least, most = method.experts
    count = len(spec.experts)
    if count < least or (most is not None and count > most):
        wanted = f"{least}" if least == most else f"{least} or more" if most is None else f"{least} to {most}"
        raise MethodError(f"method '{method.name}' merges {wanted} experts and was given {count}: change them")
    if spec.coefficients is not None and method.coefficients == "none":
        raise MethodError(f"method '{method.name}' takes no coefficients: leave --alpha out, or use 'weighted'")
    if spec.for_expert is not None:
        if method.localized is None:
            raise MethodError(f"--for-expert: method '{method.name}' keeps nothing per expert: leave it out")
        if spec.rules or spec.base is None:
            raise MethodError("--for-expert needs --base, and takes no settings for single tensors: change these")
    per_expert = set(ARGUMENTS.values()) & set(method.extras)
    solved = method.coefficients == "required"
    if spec.statistics:
        if not per_expert and not solved:
            raise MethodError(f"--statistics: method '{method.name}' uses none: leave them out")
        if solved and spec.coefficients is not None:
            raise MethodError("--statistics and --alpha both give coefficients: keep one")
        files = 1 if solved else count
        if len(spec.statistics) != files:
            what = "one file with all coefficients" if solved else "one per expert, in order"
            raise MethodError(f"--statistics: {len(spec.statistics)} files were given for {count} experts: give {what}")
    elif "evaluate" in method.extras:
        raise MethodError(
            f"method '{method.name}' evaluates merges, which works from Python only: call "
            "merging.merge.merge_state_dicts"
        )
    elif per_expert and not any(key in spec.settings for key in per_expert):
        raise MethodError(
            f"method '{method.name}' needs statistics of data: add --statistics once per expert, with files that "
            "`mergebound collect` wrote"
        )


def _statistics(spec: MergeSpec, method: Method, tell: Stage) -> tuple[dict[str, Any], dict[Path, str]]:
    """What the files hold as arguments, and the hashes of the experts that they were compared with."""
    hashes: dict[Path, str] = {}
    for path in spec.experts:
        tell(f"hashing {last_name(path)}")
        hashes[path] = file_hash(path)
    tell("reading statistics")
    found = load_statistics(spec.statistics, sources=[hashes[path] for path in spec.experts], method=method.name)
    unknown = [key for key in found if key not in (*method.extras, "coefficients")]
    if unknown:
        raise MethodError(
            f"--statistics: these files hold '{unknown[0]}', which method '{method.name}' does not use: collect "
            f"{', '.join(method.extras)}"
        )
    return found, hashes


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if isinstance(value, bool | int | float | str)}


def _without(parts: Partition, names: Mapping[str, str]) -> Partition:
    if not names:
        return parts
    return replace(
        parts,
        shared=tuple(name for name in parts.shared if name not in names),
        buffers=tuple(name for name in parts.buffers if name not in names),
    )
