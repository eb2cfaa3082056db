"""The record of a merge: what was done, as plain data, with the hashes of what was read."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from inspect import getsourcefile, unwrap
from pathlib import Path
from typing import Any

import torch

from experiments.merge_job.job import Job, Stage, ordered
from merging.config_values import written
from merging.device import check_device
from merging.errors import MethodError
from merging.fingerprint import HASHES
from merging.lazy import specs
from merging.lora import CONFIG as ADAPTER_CONFIG
from merging.partition import DEFAULT_PRIVATE
from merging.registry import builtin_methods
from merging.remote_path import last_name, shown, url_of
from merging.settings import Rule

HASHED_UP_TO = 1 << 30
"""Bytes of all inputs together up to which they are hashed in full unless something else is asked for."""


def record_of(
    job: Job, tell: Stage = lambda stage: None, hashing: str | None = None, device: str = "cpu"
) -> dict[str, Any]:
    """Everything that it takes to make the merge again: method, settings, policy, sources and their hashes.

    Args:
        job: the merge.
        tell: called with the name of each stage.
        hashing: ``full``: SHA-256 of every input, recorded as ``sha256``; ``quick``: of headers and samples
            (:func:`merging.fingerprint.quick_hash`), recorded as ``quick_sha256``, unless the full one is known
            already; default: full up to :data:`HASHED_UP_TO` bytes of inputs.  Of inputs behind URLs the URL (without
            credentials), size and version are recorded instead, unless ``full`` is asked for.
        device: where tensors are merged; its name is recorded unless it is the processor.

    Raises:
        CheckpointError: a source cannot be read.
        MethodError: another word for ``hashing``.
    """
    spec, method = job.spec, job.method
    if hashing not in (None, "full", "quick"):
        raise MethodError(f"--hash {hashing}: choose between full and quick")
    small = sum(entry.nbytes for state in job.inputs for entry in specs(state).values()) <= HASHED_UP_TO
    key = "sha256" if hashing == "full" or (hashing is None and small) else "quick_sha256"
    hashed = dict.fromkeys(job.hashes, "sha256")
    digests = dict(job.hashes)

    def source(path: Path) -> dict[str, Any]:
        url = url_of(path)
        if url is not None and hashing != "full" and path not in digests:
            from merging.remote import version_of

            return {"file": last_name(path), **version_of(url)}  # reading everything twice would cost too much
        if path not in digests:
            tell(f"hashing {last_name(path)}")
            digests[path] = HASHES[key](path)
            hashed[path] = key
        described = {"file": last_name(path), hashed[path]: digests[path]}
        if url is not None:
            described["url"] = shown(url)
        if (path / ADAPTER_CONFIG).is_file():
            described["adapter_config_sha256"] = _sha256(path / ADAPTER_CONFIG)
        return described

    described = describe(job)
    described["tool"] = f"mergebound {_version('mergebound')}"
    described["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
    if device != "cpu":
        described["versions"]["device"] = torch.cuda.get_device_name(check_device(device))
    if method.name not in builtin_methods() and spec.mergekit is None:
        file = getsourcefile(unwrap(method.function))
        if file is not None:
            described["method_source"] = {
                "file": Path(file).name,
                "sha256": _sha256(Path(file)),
            }
    described["base"] = None if spec.base is None else source(spec.base)
    described["experts"] = [{"name": name, **source(path)} for name, path in zip(spec.names, spec.experts, strict=True)]
    if spec.statistics:
        described["statistics"] = [source(path) for path in spec.statistics]
    return described


def describe(job: Job) -> dict[str, Any]:
    """The merge as plain data, without hashes."""
    spec, method = job.spec, job.method
    defaults = {parameter.name: parameter.default for parameter in method.parameters}
    extras = {name for name in method.extras if name in job.settings}
    parameters = defaults | {key: written(value) for key, value in job.settings.items() if key not in extras}
    plain = {key: written(job.settings[key]) for key in extras if _is_plain(job.settings[key])}
    found: dict[str, Any] = {
        "method": method.name,
        "parameters": parameters | plain,
        "coefficients": None
        if job.coefficients is None
        else dict(zip(spec.names, map(written, job.coefficients), strict=True)),
        "rules": [_rule(rule, spec.names) for rule in job.rules],
        "seed": None if method.deterministic else spec.seed,
        "private": list(DEFAULT_PRIVATE if spec.private is None else spec.private),
        "private_from": spec.private_from,
        "policy": spec.policy,
        "dtype": spec.dtype,
    }
    if spec.for_expert is not None:
        found["for_expert"] = spec.for_expert
    if not job.states.report.empty:
        found["keys"] = {key: written(value) for key, value in vars(job.states.report).items() if value}
    if job.aliases:
        found["tied"] = dict(job.aliases)
    if spec.mergekit is not None:
        found["rules"] = []
        found["mergekit"] = {
            "merge_method": spec.mergekit.merge_method,
            "parameters": dict(spec.mergekit.parameters),
            "models": [
                {"name": name, "parameters": dict(parameters)}
                for name, parameters in zip(spec.names, spec.mergekit.models, strict=True)
            ],
        }
    return found


def _rule(rule: Rule, names: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"tensors": rule.pattern}
    if rule.settings:
        found["settings"] = written(rule.settings)
    if rule.coefficients is not None:
        values = ordered(rule.coefficients, names)
        assert values is not None
        found["alpha"] = dict(zip(names, map(written, values), strict=True))
    return found


def _is_plain(value: Any) -> bool:
    """Whether a structure is small plain data (text, numbers, lists and mappings of these)."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(entry) for key, entry in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str)


def _sha256(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "(not installed)"


def group_settings(job: Job) -> list[dict[str, Any]]:
    """What each group of tensors is merged with, as plain data, in the order of their first tensors."""
    found: dict[str, dict[str, Any]] = {}
    for group in job.groups:
        table = group.settings.get("table")
        for name in group.names:
            settings = {k: written(v) for k, v in group.settings.items() if k not in job.method.extras}
            weights = group.coefficients
            if isinstance(table, Mapping):  # mergekit's family: parameters of each tensor's own
                settings = {key: written(value) for key, value in vars(table[name]).items()}
            entry = found.setdefault(
                repr((settings, weights)),
                {
                    "settings": settings,
                    "coefficients": None if weights is None else dict(zip(job.spec.names, weights, strict=True)),
                    "tensors": [],
                },
            )
            entry["tensors"].append(name)
    return list(found.values())
