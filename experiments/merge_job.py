"""Merge checkpoint files as a :class:`~merging.config.MergeSpec` says: check, plan, merge, record, write.

Nothing is written before the merge is complete, an existing target is refused before anything is read, and the inputs
are only ever read.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from inspect import getsourcefile, unwrap
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from merging.checkpoint import Checkpoint, file_hash, open_checkpoint
from merging.config import MergeSpec
from merging.config_values import written
from merging.device import check_device
from merging.errors import CheckpointError, MethodError
from merging.fingerprint import HASHES
from merging.folder import SAFETENSORS_INDEX
from merging.keys import Harmonised, harmonise
from merging.lazy import LazyState, Spec, specs
from merging.legacy import LEGACY_SUFFIXES
from merging.lora import CONFIG as ADAPTER_CONFIG
from merging.lora import read_adapter
from merging.merge import localize_state_dict, merge_state_dicts
from merging.method import Method
from merging.partition import DEFAULT_PRIVATE, Partition, partition
from merging.registry import builtin_methods, get
from merging.remote_path import last_name, shown, url_of
from merging.save import Fill, leftovers, save_checkpoint
from merging.settings import Resolved, Rule, resolve
from merging.statistics import ARGUMENTS, load_statistics
from merging.tensorwise import Stream, can_stream, merge_stream
from merging.tied import dealias
from merging.types import StateDict
from merging.writer import Outline
from theory.errors import MergeboundError

if TYPE_CHECKING:
    from merging.streaming.build import Batch
    from merging.streaming.plan import Plan, Sources

DTYPES: Mapping[str, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
"""Types that a merge can be stored in."""

STREAMED_FROM = 1 << 28
"""Bytes of all inputs together from which merging in chunks by compiled loops pays."""

HASHED_UP_TO = 1 << 30
"""Bytes of all inputs together up to which they are hashed in full unless something else is asked for."""

Stage = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """A merge that has been checked as far as that is possible without reading weights.

    Attributes:
        spec: what was asked for.
        method: the method.
        states: checkpoints that fit together.
        settings: the method's settings and extras.
        coefficients: one per expert, in the order of ``spec.names``.
        rules: settings of some tensors.
        groups: the tensors that share settings, all of them together what the method acts on.
        aliases: tied tensors, alias to canonical name; merged once.
        paths: name to path, ``"base"`` included.
        hashes: SHA-256 of files that had to be known already.
    """

    spec: MergeSpec
    method: Method
    states: Harmonised
    settings: Mapping[str, Any]
    coefficients: tuple[Any, ...] | None
    rules: tuple[Rule, ...]
    groups: tuple[Resolved, ...]
    aliases: Mapping[str, str]
    paths: Mapping[str, Path]
    hashes: Mapping[Path, str]

    @property
    def inputs(self) -> tuple[StateDict, ...]:
        """What is read: the base, if there is one, and the experts."""
        base = () if self.spec.base is None else (self.states.base,)
        return (*base, *self.states.experts.values())

    @property
    def parts(self) -> Partition:
        """Which tensors are merged."""
        return self.states.parts

    @property
    def specs(self) -> dict[str, Spec]:
        """Shape and type of every tensor of the result that is known beforehand."""
        known = {**specs(self.states.carried), **specs(self.states.base)}
        donor = self.spec.for_expert or self.spec.private_from
        if donor is not None:
            found = specs(self.states.experts[donor])
            known = {n: s for n, s in known.items() if not self.parts.is_private(n) or n in found}
            known |= {name: spec for name, spec in found.items() if self.parts.is_private(name)}
        return {name: _stored(spec, self.spec.dtype) for name, spec in known.items()}


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
        _check_files(spec.out, [state for state in (base, *experts.values()) if isinstance(state, Checkpoint)])
    patterns = DEFAULT_PRIVATE if spec.private is None else spec.private
    with _naming(paths):
        try:
            parts = partition(reference, patterns)
        except CheckpointError as error:
            raise CheckpointError(f"{shown(origin)}: {error}") from None
        if spec.policy == "union" and base is None:
            raise MethodError("--policy union says what stays at the base: add --base, or use intersection")
        states = harmonise(reference, experts, spec.policy, parts)
        aliases = dealias(states.base, states.experts, states.parts.coordinates)
    states = replace(states, parts=_without(states.parts, aliases))
    settings, coefficients, rules = dict(spec.settings), _ordered(spec.coefficients, spec.names), spec.rules
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


def merge(job: Job, tell: Stage = lambda stage: None, device: str = "cpu") -> StateDict:
    """The merged checkpoint, in the base's tensor order.

    Where every tensor can be merged on its own, the result is a lazy mapping that merges a tensor when it is asked for
    (and raises then); otherwise it is in memory.

    Args:
        job: the merge.
        tell: called with the name of each stage.
        device: where tensors are merged that are merged on their own.

    Raises:
        CheckpointError: a checkpoint holds NaN or infinite weights, or cannot be read.
        MethodError: the result overflows the type that it is stored in.
    """
    spec, states = job.spec, job.states
    base = None if spec.base is None else states.base
    donor = spec.for_expert or spec.private_from
    if _tensorwise(job):
        tell(f"merging with {job.method.name}")
        stored = job.specs
        dtypes = {name: stored[name].dtype for name in states.parts.coordinates}
        merged: StateDict = merge_stream(
            Stream(job.method, base, states.base, states.experts, states.parts, job.groups, spec.seed, dtypes, device)
        )
    else:
        tell(f"merging with {job.method.name}, which needs all tensors at once")
        merged = _in_memory(job, base)
    return _assembled(job, merged, states.base if donor is None else states.experts[donor])


def _tensorwise(job: Job) -> bool:
    everything = (job.states.base, *job.states.experts.values())
    return job.spec.for_expert is None and can_stream(job.method, job.groups, everything, job.parts)


def _in_memory(job: Job, base: StateDict | None) -> dict[str, Tensor]:
    """The merged coordinates, in at least float32 where another storage type is asked for."""
    spec, states = job.spec, job.states
    arguments: dict[str, Any] = {"partition": states.parts, "coefficients": job.coefficients, "seed": spec.seed}
    wide = {name: _widened(state, spec.dtype) for name, state in states.experts.items()}
    with _naming(job.paths):
        if spec.for_expert is not None:
            assert base is not None
            return localize_state_dict(
                job.method, _widened(base, spec.dtype), wide, spec.for_expert, **arguments, **job.settings
            )
        origin = None if base is None else _widened(base, spec.dtype)
        return merge_state_dicts(job.method, origin, wide, rules=job.rules, **arguments, **job.settings)


def _assembled(job: Job, merged: StateDict, donor: StateDict) -> StateDict:
    """Merged tensors, aliases of merged ones, private tensors of ``donor``, constants of the base, what was added."""
    states, stored = job.states, job.specs
    coordinates = set(states.parts.coordinates)

    def read(name: str) -> Tensor:
        canonical = job.aliases.get(name, name)
        with _naming(job.paths):
            if canonical in coordinates:
                tensor = merged[canonical]
            elif name in states.carried:
                tensor = states.carried[name]
            elif states.parts.is_private(name):
                tensor = donor[name]
            else:
                tensor = states.base[name]
        return _rounded(name, tensor, stored[name].dtype)

    order = [name for name in states.order if name in stored]
    names = (*order, *(name for name in stored if name not in states.order))
    return LazyState({name: stored[name] for name in names}, read)


def write(job: Job, merged: StateDict, record: Mapping[str, Any]) -> Path:
    """Write a merge with its record, whole or not at all.

    Returns:
        What to open.

    Raises:
        CheckpointError: the disk refuses, or the target appeared meanwhile.
    """
    return _save(job, merged, record)


def _save(
    job: Job, merged: StateDict, record: Mapping[str, Any], *, fill: Fill | None = None, resume: str | None = None
) -> Path:
    spec = job.spec
    if spec.out is None:
        raise CheckpointError("there is nowhere to write to: add --out")
    source = spec.copy_files_from or spec.base or spec.experts[spec.names.index(min(spec.names))]
    return save_checkpoint(
        spec.out,
        merged,
        record,
        max_shard_size=spec.max_shard_size,
        overwrite=spec.overwrite,
        source=source if url_of(source) is not None or source.is_dir() else None,
        fill=fill,
        resume=resume,
    )


@dataclass(frozen=True)
class Resources:
    """What a merge may use.

    Attributes:
        threads: how many compute at the same time.
        max_memory: bytes of buffers at most; ``None``: what the plan needs.
        resume: go on from what an interrupted merge of the same files and settings left.
        mapped: use input files where they are, if the system can.
        streamed: by chunks, whatever the size; ``None``: where the checkpoints are large enough for that to pay.
        journal_every: bytes written between two notes of how far the merge is.
        device: where tensors are merged that are merged as a whole: ``cpu``, ``cuda``, ``cuda:1``, ...

    Raises:
        MethodError: this machine has no such device.
    """

    threads: int = 1
    max_memory: int | None = None
    resume: bool = True
    mapped: bool = True
    streamed: bool | None = None
    journal_every: int = 1 << 28
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_device(self.device)


@dataclass(frozen=True)
class Route:
    """How a merge will be made.

    Attributes:
        streamed: in chunks; ``None``: by the method's definition, see ``how``.
        how: in words.
        device: where tensors are merged that are merged as a whole.
    """

    streamed: StreamedMerge | None
    how: str
    device: str = "cpu"


def route(job: Job, resources: Resources | None = None, *, timed: bool = False) -> Route:
    """Choose between chunks and the method's definition.

    Args:
        job: the merge.
        resources: what may be used.
        timed: measure the programs, for the plan's estimate of time.

    Raises:
        MethodError: the merge does not fit into ``max_memory``, or would leave a device other than the processor idle.
    """
    given = Resources() if resources is None else resources
    large = sum(specs(state)[n].nbytes for state in job.inputs for n in job.states.parts.coordinates) >= STREAMED_FROM
    paths = [path for path in (job.spec.out, job.spec.base, *job.spec.experts) if path is not None]
    large = large or any(url_of(path) is not None for path in paths)  # read ahead; uploads that can go on
    wanted = given.streamed or (given.streamed is None and (large or given.max_memory is not None))
    if wanted:
        streamed = None if job.spec.for_expert is not None else streamed_merge(job, given, timed=timed)
        if streamed is not None:
            if all(batch.program is not None for batch in streamed.plan.batches if batch.names):
                _refuse_idle(job, given, "in chunks")
            return Route(streamed, "in chunks", given.device)
        if given.max_memory is not None:
            raise MethodError(
                f"--max-memory: method '{job.method.name}' needs all tensors at once with these settings: leave "
                "--max-memory out, or choose a method or scope that merges tensor by tensor"
            )
    if _tensorwise(job):
        return Route(None, "tensor by tensor", given.device)
    _refuse_idle(job, given, "with all tensors in memory")
    return Route(None, "all tensors at once")


def _refuse_idle(job: Job, resources: Resources, how: str) -> None:
    if resources.device != "cpu":
        raise MethodError(
            f"--device {resources.device}: method '{job.method.name}' merges these checkpoints {how}, on the "
            "processor: leave --device out, or choose a method or scope that merges tensor by tensor"
        )


def outline(job: Job, chosen: Route) -> dict[str, Any]:
    """What a merge will do, as plain data: programs, passes, bytes, memory and time.

    ``memory`` is in bytes, buffers only: of a merge in chunks an upper bound; else the inputs and the result of what is
    merged at the same time as float32, to which methods add copies of their own.  ``seconds`` is ``None`` where
    nothing was measured.
    """
    if chosen.streamed is None:
        described = [specs(state) for state in job.inputs]
        sizes = [job.specs[name].numel for name in job.parts.coordinates]
        entries = max(sizes, default=0) if chosen.how == "tensor by tensor" else sum(sizes)
        return {
            "how": chosen.how,
            "programs": [{"program": "definition", "tensors": len(sizes), "entries": sum(sizes), "passes": 1}],
            "passes": 1,
            "read": sum(found[n].nbytes for found in described for n in job.parts.coordinates if n in found),
            "written": sum(spec.nbytes for spec in job.specs.values()),
            "memory": 4 * entries * (len(job.inputs) + 1),
            "seconds": None,
            "device": chosen.device,
        }
    plan = chosen.streamed.plan
    programs = [
        {
            "program": "definition, tensor by tensor" if b.program is None else _PROGRAMS.get(_kind(b), _kind(b)),
            "tensors": len(b.names),
            "entries": sum(job.specs[name].numel for name in b.names),
            "passes": 1 if b.program is None else b.program.passes,
        }
        for b in plan.batches
        if b.names
    ]
    if chosen.streamed.copied:
        entries = sum(job.specs[name].numel for name in chosen.streamed.copied)
        programs.append({"program": "copy", "tensors": len(chosen.streamed.copied), "entries": entries, "passes": 1})
    return {
        "how": chosen.how,
        "programs": programs,
        "passes": plan.passes,
        "read": plan.read,
        "written": plan.written,
        "memory": plan.memory,
        "seconds": plan.seconds if isfinite(plan.seconds) else None,
        "threads": plan.threads,
        "chunk": plan.chunk,
        "device": chosen.device,
    }


_PROGRAMS: Mapping[str, str] = {
    "Linear": "linear combination",
    "Elected": "trim, elect, aggregate",
    "Dropped": "random masks, linear combination",
    "Largest": "largest magnitude",
    "Span": "inner products, linear combination",
    "ByDefinition": "definition, chunk by chunk",
}


def _kind(batch: Batch) -> str:
    return type(batch.program).__name__


def interrupted(job: Job) -> list[Path]:
    """Hidden files that interrupted merges left beside the target, by name."""
    out = job.spec.out
    return [] if out is None or url_of(out) is not None else leftovers(out)


def execute(
    job: Job,
    record: Mapping[str, Any],
    resources: Resources | None = None,
    tell: Stage = lambda stage: None,
    progress: Callable[[int, int], None] | None = None,
    chosen: Route | None = None,
) -> Path:
    """Merge and write: in chunks and bounded memory where the method allows it, in memory otherwise.

    Args:
        job: the merge, with a target.
        record: kept in the files.
        resources: what may be used.
        tell: called with the name of each stage.
        progress: called with the bytes of the result that are done, and how many there will be: at the start (where an
            interrupted merge had come) and whenever some are done; of merges in chunks only.
        chosen: what :func:`route` said; default: it is asked.

    Returns:
        What to open.

    Raises:
        CheckpointError: an input cannot be read or holds NaN, or the disk refuses.
        MethodError: the result overflows, or the merge does not fit into ``max_memory``.
    """
    given = Resources() if resources is None else resources
    taken = route(job, given) if chosen is None else chosen
    streamed = taken.streamed
    if streamed is None:
        return write(job, merge(job, tell, taken.device), record)
    tell(f"merging with {job.method.name}")
    with _naming(job.paths):
        return streamed.write(job, record, given, progress)


@dataclass(frozen=True)
class StreamedMerge:
    """A merge in chunks: what is merged, how, and where the rest comes from."""

    stream: Stream
    plan: Plan
    copied: Sources
    also: Mapping[str, tuple[str, ...]]

    def write(
        self,
        job: Job,
        record: Mapping[str, Any],
        resources: Resources,
        progress: Callable[[int, int], None] | None,
    ) -> Path:
        """Write the merge (see :func:`execute`)."""
        from merging.streaming.output import OutputFile
        from merging.streaming.run import key_of, run

        stored = job.specs
        key = key_of(self.stream, stored, self.plan.chunk, json.dumps(dict(record), sort_keys=True, default=str))

        def fill(files: Sequence[tuple[Path, Outline]], journal: Path | None) -> None:
            targets = [OutputFile(path, outline) for path, outline in files]
            run(
                self.stream,
                self.plan,
                stored,
                self.copied,
                targets,
                also=self.also,
                journal=journal,
                key=key,
                every=resources.journal_every,
                mapped=resources.mapped,
                progress=progress,
            )

        return _save(job, LazyState(stored, _never), record, fill=fill, resume=key if resources.resume else None)


def streamed_merge(job: Job, resources: Resources, *, timed: bool = False) -> StreamedMerge | None:
    """The merge in chunks, or ``None`` where it needs all tensors in memory at once.

    Raises:
        MethodError: it does not fit into ``max_memory``.
    """
    from merging.streaming.plan import plan

    states, stored = job.states, job.specs
    base = None if job.spec.base is None else states.base
    coordinates = set(states.parts.coordinates)
    stream = Stream(
        job.method,
        base,
        states.base,
        states.experts,
        states.parts,
        job.groups,
        job.spec.seed,
        {name: stored[name].dtype for name in states.parts.coordinates},
        resources.device,
    )
    donor = states.base if job.spec.private_from is None else states.experts[job.spec.private_from]
    copied: dict[str, tuple[StateDict, str]] = {}
    also: dict[str, tuple[str, ...]] = {}
    for name in stored:
        canonical = job.aliases.get(name, name)
        if canonical in coordinates:
            if name != canonical:
                if stored[name].dtype != stored[canonical].dtype:
                    return None
                also[canonical] = (*also.get(canonical, ()), name)
        elif name in states.carried:
            copied[name] = (states.carried, name)
        elif states.parts.is_private(name):
            copied[name] = (donor, name)
        else:
            copied[name] = (states.base, name)
    made = plan(stream, stored, copied, threads=resources.threads, max_memory=resources.max_memory, timed=timed)
    return None if made is None else StreamedMerge(stream, made, copied, also)


def _never(name: str) -> Tensor:
    raise AssertionError(f"'{name}' is written in chunks")


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


def check_output(out: Path, inputs: Sequence[Path], *, overwrite: bool = False) -> None:
    """Refuse a target that cannot be written, that exists, or that is one of the inputs, before anything is read.

    Raises:
        CheckpointError: names the target and the remedy.
    """
    if url_of(out) is not None:
        _check_remote_output(out, inputs, overwrite=overwrite)
        return
    folder = out.suffix != ".safetensors"
    if out.name.endswith((*LEGACY_SUFFIXES, ".json", ".yaml", ".yml", ".npz", ".h5", ".gguf", ".onnx")):
        raise CheckpointError(
            f"{out}: merges are written as .safetensors only: change the suffix of --out, or name a folder"
        )
    if not out.parent.is_dir():
        raise CheckpointError(f"{out}: the folder '{out.parent}' does not exist: create it first")
    target = out.resolve()
    for path in inputs:
        place = path.resolve()
        if place == target or (folder and target in place.parents) or (place.is_dir() and place in target.parents):
            raise CheckpointError(
                f"{out}: the target is one of the inputs, which are never changed: choose another --out"
            )
    if folder and out.is_file():
        raise CheckpointError(f"{out}: this is a file where a folder would be written: choose another --out")
    if not folder and out.is_dir():
        raise CheckpointError(f"{out}: this is a folder: name a file in it, or a folder without suffix")
    index = out.with_name(out.name.removesuffix(".safetensors") + SAFETENSORS_INDEX)
    exists = any(out.iterdir()) if folder and out.is_dir() else (out.exists() or (not folder and index.exists()))
    if exists and not overwrite:
        raise CheckpointError(f"{out}: this exists already: choose another --out, or add --overwrite")


def _check_remote_output(out: Path, inputs: Sequence[Path], *, overwrite: bool) -> None:
    from merging.remote_write import refuse_existing

    target = shown(out).rstrip("/")
    for path in inputs:
        place = shown(path).rstrip("/")
        if place == target or place.startswith(target + "/") or target.startswith(place + "/"):
            raise CheckpointError(
                f"{target}: the target is one of the inputs, which are never changed: choose another --out"
            )
    refuse_existing(url_of(out) or target, overwrite=overwrite)


def _check_files(out: Path, inputs: Sequence[Checkpoint]) -> None:
    """Refuse a target whose file, index or shards would replace a file of an input."""
    target = Path(shown(out)).resolve()
    stem = re.escape(target.name.removesuffix(".safetensors"))
    names = re.compile(rf"{stem}(-\d{{5}}-of-\d{{5}})?(\.safetensors|{re.escape(SAFETENSORS_INDEX)})")
    for checkpoint in inputs:
        for file in checkpoint.files:
            place = file.resolve()
            if place.parent == target.parent and names.fullmatch(place.name):
                raise CheckpointError(
                    f"{shown(out)}: the target would replace '{shown(file)}' of the inputs, which are never changed: "
                    "choose another --out"
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


def _ordered(coefficients: Any, names: Sequence[str]) -> tuple[Any, ...] | None:
    if coefficients is None:
        return None
    if isinstance(coefficients, Mapping):
        return tuple(coefficients[name] for name in names)
    return tuple(coefficients)


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if isinstance(value, bool | int | float | str)}


def _is_plain(value: Any) -> bool:
    """Whether a structure is small plain data (text, numbers, lists and mappings of these)."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(entry) for key, entry in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str)


def _rule(rule: Rule, names: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"tensors": rule.pattern}
    if rule.settings:
        found["settings"] = written(rule.settings)
    if rule.coefficients is not None:
        values = _ordered(rule.coefficients, names)
        assert values is not None
        found["alpha"] = dict(zip(names, map(written, values), strict=True))
    return found


def _without(parts: Partition, names: Mapping[str, str]) -> Partition:
    if not names:
        return parts
    return replace(
        parts,
        shared=tuple(name for name in parts.shared if name not in names),
        buffers=tuple(name for name in parts.buffers if name not in names),
    )


def _stored(spec: Spec, dtype: str | None) -> Spec:
    return replace(spec, dtype=DTYPES[dtype]) if dtype is not None and spec.floating else spec


def _widened(state: StateDict, dtype: str | None) -> StateDict:
    """The same values in at least float32, so that the only rounding is to the type asked for."""
    if dtype is None:
        return state
    wide = {
        name: replace(spec, dtype=torch.float64 if spec.dtype == torch.float64 else torch.float32)
        if spec.floating
        else spec
        for name, spec in specs(state).items()
    }
    tied = state.tied if isinstance(state, LazyState) else ()
    return LazyState(wide, lambda name: state[name].to(wide[name].dtype), tied=tied)


def _rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.dtype == dtype:
        return tensor
    stored = tensor.to(dtype)
    if bool(torch.isfinite(tensor).all()) and not bool(torch.isfinite(stored).all()):
        raise MethodError(f"tensor '{name}' overflows {dtype}: store the merge in another --dtype")
    return stored


@contextmanager
def _naming(paths: Mapping[str, Path]) -> Iterator[None]:
    """Errors that begin with an expert's name begin with its path."""
    try:
        yield
    except MergeboundError as error:
        who, colon, rest = str(error).partition(": ")
        if colon and who in paths:
            raise type(error)(f"{shown(paths[who])}: {rest}") from None
        raise


def _sha256(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "(not installed)"


__all__ = [
    "DTYPES",
    "Job",
    "Resources",
    "Route",
    "check_output",
    "describe",
    "execute",
    "group_settings",
    "interrupted",
    "merge",
    "outline",
    "prepare",
    "record_of",
    "route",
    "write",
]
