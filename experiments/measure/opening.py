"""Subjects from checkpoints on the disk, and from the experts of a finished grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.engines.workplace import Job, Workplace
from experiments.inputs.resident_data import Resident
from experiments.inputs.shares import nested_subset
from experiments.inputs.training_data import TrainingData
from experiments.measure.backbone import Backbone
from experiments.measure.subject import Subject, draw
from experiments.models import head_tensors
from experiments.predict_group import Group, load_group
from experiments.store import Store
from merging.flat import FlatSpace
from merging.merge import flat_space
from merging.partition import partition
from theory.errors import MergeboundError

_IMAGES = 256


def from_group(group: Group) -> Subject:
    """A subject from checkpoints that :func:`experiments.predict_group.load_group` read; its images are calibration."""
    model = group.networks[0].module.model
    assert isinstance(model, nn.Module)
    return Subject(
        names=group.names,
        tasks=tuple(path.stem for path in group.data_paths),
        architecture=group.architecture,
        model=model,
        networks=group.networks,
        base=group.base,
        vectors=group.vectors,
        heads=group.private,
        calibration=tuple(item.split for item in group.data),
    )


def from_checkpoints(base: Path, experts: Sequence[Path], data: Sequence[Path], **options: Any) -> Subject:
    """A subject from files; see :func:`experiments.predict_group.load_group` for the options and errors."""
    return from_group(load_group(base, experts, data, **options))


def from_store(
    store: Store | str | Path,
    runs: Sequence[str],
    *,
    images: int = _IMAGES,
    seed: int = 0,
    root: str | Path | None = None,
    step: int | None = None,
    part: str = "validation",
    workplace: Workplace | None = None,
    dtype: torch.dtype = torch.float32,
) -> Subject:
    """Experts of a grid that was run.

    Args:
        store: open, or its folder.
        runs: digests (or beginnings of 8 letters or more) of finished runs of one base.
        images: calibration images of each task.
        seed: names their draw.
        root: folder of the data sets; default: what ``MERGEBOUND_DATA`` names.
        step: which checkpoint; default the last.
        part: where calibration images are drawn from: ``validation`` or ``train``.
        workplace: of this process, where it has one already (tasks and images are kept).
        dtype: of coordinates and images.

    Raises:
        MergeboundError: a run that is unknown, unfinished or of another base, or data that are missing or changed.
    """
    if not isinstance(store, Store):
        with Store.open(store, "r") as opened:
            return from_store(
                opened,
                runs,
                images=images,
                seed=seed,
                root=root,
                step=step,
                part=part,
                workplace=workplace,
                dtype=dtype,
            )
    if part not in ("validation", "train"):
        raise MergeboundError(f"part = {part!r}: calibration images come from validation or train")
    digests = [_whole(store, run) for run in runs]
    if not digests:
        raise MergeboundError("runs: give at least one")
    bases = {store.digests(digest)[0] for digest in digests}
    if len(bases) > 1:
        raise MergeboundError(f"runs start from {len(bases)} different bases; experts that are merged share one")
    place = workplace or Workplace(store.base, root)
    jobs = [place.job(store.spec(digest), *store.digests(digest)) for digest in digests]
    states = [store.state(digest, step) for digest in digests]
    base = store.base(next(iter(bases)))
    private = head_tensors(jobs[0].network)
    parts = partition(base.state, private=[_literal(name) for name in private])
    layout = flat_space(base.state, parts)
    space = FlatSpace(layout.names, layout.shapes, layout.offsets, dtype)
    whole = Backbone.of(base.model(), base.state, shared_head=True)
    if dtype == torch.float64:
        whole.module.double()
    fixed = {n: base.state[n] for n in parts.constants}
    heads = [_cast({name: state[name] for name in private}, dtype) for state in states]
    networks = tuple(
        replace(
            whole,
            space=space,
            partition=parts,
            constants={f"model.{n}": t for n, t in {**_cast(fixed, dtype), **head}.items()},
        )
        for head in heads
    )
    return Subject(
        names=_names(jobs, digests),
        tasks=tuple(job.run.task for job in jobs),
        architecture=base.architecture,
        model=base.model().eval(),
        networks=networks,
        base=space.flatten(base.state).to(dtype),
        vectors=torch.stack([space.flatten(state).to(dtype) for state in states]),
        heads=tuple(heads),
        calibration=tuple(
            draw(_plain(job.validation if part == "validation" else job.train, dtype), images, seed) for job in jobs
        ),
        start_heads=tuple(_cast({name: job.start[name] for name in private}, dtype) for job in jobs),
        train=tuple(_sample(job, dtype) for job in jobs),
        test=tuple(_plain(job.test, dtype) for job in jobs),
        runs=tuple(job.run for job in jobs),
        logs=tuple(store.log(digest) for digest in digests),
    )


def _whole(store: Store, run: str) -> str:
    found = [digest for digest in store.runs() if digest.startswith(run)] if len(run) >= 8 else []
    if len(found) != 1:
        raise MergeboundError(f"run {run!r}: {len(found)} runs of {store.folder} begin so; give a digest of its table")
    if store.outcome(found[0]) != "finished":
        raise MergeboundError(f"run {run[:12]}: did not finish ({store.outcome(found[0])}); leave it out")
    return found[0]


def _names(jobs: Sequence[Job], digests: Sequence[str]) -> tuple[str, ...]:
    tasks = [job.run.task for job in jobs]
    return tuple(t if tasks.count(t) == 1 else f"{t} {d[:8]}" for t, d in zip(tasks, digests, strict=True))


def _literal(name: str) -> str:
    import glob

    return glob.escape(name)


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {n: t.detach().to(dtype) if t.is_floating_point() else t.detach() for n, t in tensors.items()}


def _sample(job: Job, dtype: torch.dtype) -> TrainingData:
    """S_i: the share of the training part that the run saw."""
    return _plain(job.train, dtype).take(nested_subset(len(job.train), job.run.data_share, job.run.seed))


def _plain(data: TrainingData, dtype: torch.dtype) -> TrainingData:
    """Without augmentation, in the wanted type."""
    from experiments.inputs.augment import NOTHING

    return replace(data, augmentation=NOTHING, dtype=dtype) if isinstance(data, Resident) else data
