"""Merge checkpoint files as a :class:`~merging.config.MergeSpec` says: check, plan, merge, record, write.

Nothing is written before the merge is complete, an existing target is refused before anything is read, and the inputs
are only ever read.  In the order of a merge: :func:`prepare`, :func:`route`, :func:`outline`, :func:`record_of`,
:func:`execute`.
"""

from __future__ import annotations

from experiments.merge_job.executing import execute
from experiments.merge_job.job import DTYPES, Job
from experiments.merge_job.preparing import prepare
from experiments.merge_job.records import describe, group_settings, record_of
from experiments.merge_job.resources import Resources
from experiments.merge_job.routes import Route, outline, route
from experiments.merge_job.targets import check_output
from experiments.merge_job.whole import merge
from experiments.merge_job.writing import interrupted, write

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
