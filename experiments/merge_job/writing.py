"""Write a merge with its record, whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.merge_job.job import Job
from merging.errors import CheckpointError
from merging.remote_path import url_of
from merging.save import save_checkpoint
from merging.types import StateDict
from merging.unfinished import Fill, leftovers


def write(job: Job, merged: StateDict, record: Mapping[str, Any]) -> Path:
    """Write a merge with its record, whole or not at all.

    Returns:
        What to open.

    Raises:
        CheckpointError: the disk refuses, or the target appeared meanwhile.
    """
    return save_merge(job, merged, record)


def save_merge(
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


def interrupted(job: Job) -> list[Path]:
    """Hidden files that interrupted merges left beside the target, by name."""
    out = job.spec.out
    return [] if out is None or url_of(out) is not None else leftovers(out)
