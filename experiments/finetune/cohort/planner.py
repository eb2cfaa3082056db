"""How a grid's runs are grouped, and the way in which each group is trained: measured, chosen, and said why.

Runs that share a network (head included), what is trained, update rule, precision and batch size make a group: padding
batches would waste work and corrupt BatchNorm's statistics.  Within a group runs are sorted by steps, longest first, so
that few of a cohort are over before the others.

The ways are probed once per network, batch size and precision (:mod:`experiments.finetune.cohort.choosing`).
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from experiments.finetune.cohort.choosing import Choice, choose_by
from experiments.finetune.cohort.probe import Candidate, Opened, Probe, measure
from experiments.grid.result import Cohort, Plan
from experiments.grid.run_spec import RunSpec
from experiments.inputs.memory import available_bytes
from theory.errors import MergeboundError

LOOPED = 8
"""Runs of a cohort that is trained one after the other."""
SHARE_OF_MEMORY = 0.5
_log = logging.getLogger(__name__)


def make_plan(
    runs: Mapping[str, RunSpec],
    *,
    open_network: Callable[[RunSpec], Opened],
    device: str = "cpu",
    seed: int = 0,
    probe_seconds: float = 20.0,
    memory: int | None = None,
    probe: Probe | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Plan:
    """Group runs into cohorts and choose the fastest way for each.

    Args:
        runs: by digest.
        open_network: gives a run's network, x_0 and training images on the device; called once per base, task and
            split, and once per kind of runs that is probed.
        device: where they will be trained.
        seed: of the probe.
        probe_seconds: after that many seconds for one kind of runs, or a seventh of what the loop would take for all
            of them, nothing more is tried; nor is a way that is expected to need more for itself.
        memory: bytes that one cohort may take; default: half of what is available, divided among one-thread workers.
        probe: stands in for :func:`experiments.finetune.cohort.probe.measure`.
        clock: of ``probe_seconds``.

    Returns:
        The plan: cohorts with most work first, each with its reason; JSON data throughout.

    Raises:
        MergeboundError: no runs, or a run that cannot be trained at all (a batch larger than its data, for one).
    """
    if not runs:
        raise MergeboundError("there are no runs to plan; check the grid's specification")
    limit = memory if memory is not None else memory_of(device)
    timed = probe or partial(measure, seed=seed)
    groups = _groups(runs, open_network)
    choices: dict[str, Choice] = {}
    cohorts: list[Cohort] = []
    for _, members in groups:
        first = runs[members[0]]
        kind = kind_of(first)
        if kind not in choices:
            most = max(len(others) for _, others in groups if kind_of(runs[others[0]]) == kind)
            steps = sum(run.steps for run in runs.values() if kind_of(run) == kind)
            choices[kind] = choose_by(first, open_network(first), most, limit, timed, probe_seconds, clock, steps)
            _log.info("%s, batch %d: %s", first.architecture, first.batch_size, choices[kind].reason)
        cohorts += _cohorts(members, choices[kind], first, len(cohorts))
    return Plan(tuple(cohorts), device, machine(device), seed)


def machine(device: str) -> str:
    """Processor or accelerator and PyTorch's version, as text."""
    if torch.device(device).type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, PyTorch {torch.__version__}"
    from experiments.evaluate.cpu import cpu

    return f"{cpu()}, PyTorch {torch.__version__}"


def memory_of(device: str) -> int | None:
    """Bytes that one cohort may take: half of what is available, divided among one-thread workers."""
    free = available_bytes(torch.device(device))
    if free is None:
        return None
    workers = (os.cpu_count() or 1) if torch.device(device).type == "cpu" else 1
    return int(SHARE_OF_MEMORY * free / workers)


def kind_of(run: RunSpec) -> str:
    """What decides how fast a run's steps are, but for the number of its classes."""
    return json.dumps(
        [
            *(run.base.architecture, run.base.options, run.base.kind == "clip", run.batch_size, run.precision),
            *(run.optimizer, run.nesterov, run.trained, run.rank, run.clip_norm is None, run.augment),
        ],
        sort_keys=True,
    )


def _groups(
    runs: Mapping[str, RunSpec], open_network: Callable[[RunSpec], Opened]
) -> list[tuple[tuple[str, str], list[str]]]:
    """Digests of the runs that may be trained together, longest first; most work first."""
    shapes: dict[tuple[str, str, int], str] = {}
    sizes: dict[str, int] = {}
    found: dict[tuple[str, str], list[str]] = {}
    for digest, run in runs.items():
        place = (run.task, run.base.model_dump_json(), run.split_seed)
        if place not in shapes:
            start = open_network(run)[1]
            shapes[place] = json.dumps([[name, list(tensor.shape)] for name, tensor in start.items()])
            sizes[shapes[place]] = sum(tensor.numel() for tensor in start.values())
        found.setdefault((kind_of(run), shapes[place]), []).append(digest)
    for members in found.values():
        members.sort(key=lambda digest: (-runs[digest].steps, runs[digest].task, runs[digest].data_share, digest))

    def work(item: tuple[tuple[str, str], list[str]]) -> tuple[float, tuple[str, str]]:
        (kind, shape), members = item
        samples = max(runs[digest].steps * runs[digest].batch_size for digest in members)
        return (-float(sizes[shape]) * samples, (kind, shape))

    return sorted(found.items(), key=work)


def _cohorts(members: Sequence[str], choice: Choice, run: RunSpec, before: int) -> list[Cohort]:
    candidate = choice.candidate
    size = cohort_size(candidate)
    parts = [tuple(members[k : k + size]) for k in range(0, len(members), size)]
    names = [f"{before + number:05d}-{run.architecture}-b{run.batch_size}" for number in range(len(parts))]
    chunk = candidate.chunk
    return [
        Cohort(name, part, candidate.way, min(chunk, len(part)), dict(candidate.options), choice.reason)
        for name, part in zip(names, parts, strict=True)
    ]


def most_together(run: RunSpec, runs: Sequence[RunSpec]) -> int:
    """How many of some runs may be trained together with one of them, heads of one size taken for granted."""
    kind = kind_of(run)
    return sum(kind_of(one) == kind for one in runs)


def cohort_size(candidate: Candidate) -> int:
    """Runs of one cohort, at most."""
    return LOOPED if candidate.way == "loop" else candidate.chunk
