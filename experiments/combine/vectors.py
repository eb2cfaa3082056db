"""Task vectors of experts as one matrix, in memory or in a file without a name that the system may page out."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiments.combine.bench import Bench
from experiments.combine.groups import Member
from experiments.combine.source import Source
from theory.errors import MergeboundError

MEMORY = 2 << 30
"""Bytes of task vectors that are kept in memory."""


class TaskVectors:
    """Delta_i = x_i - x_0 and the head of every expert, read from the store when they are first asked for.

    Rows are in the order of the experts' names, as merges take them.

    Args:
        source: the store.
        bench: layout and base.
        members: experts.
        memory: bytes; a larger matrix is a memory-mapped file.
        scratch: folder of that file, which is gone as soon as the process ends, however it ends.

    Raises:
        MergeboundError: the file does not fit on the disk.
    """

    def __init__(
        self,
        source: Source,
        bench: Bench,
        members: Sequence[Member],
        *,
        memory: int = MEMORY,
        scratch: Path | None = None,
    ) -> None:
        self._source, self._bench = source, bench
        self.members = {member.name: member for member in sorted(members, key=lambda member: member.name)}
        self._place = {name: index for index, name in enumerate(self.members)}
        self._there = [False] * len(self.members)
        self._head: dict[str, dict[str, Tensor]] = {}
        width, dtype = bench.space.size, bench.space.dtype
        needed = len(self.members) * width * dtype.itemsize
        self.mapped = needed > memory
        if not self.mapped:
            self._matrix = torch.empty((len(self.members), width), dtype=dtype)
            return
        folder = Path(tempfile.gettempdir()) if scratch is None else scratch
        try:
            free = shutil.disk_usage(folder).free
            if needed > free:
                raise MergeboundError(
                    f"{folder}: {len(self.members)} task vectors take {needed / 2**30:.1f} GiB, but {free / 2**30:.1f} "
                    "GiB are free; give another scratch folder, more memory, or fewer groups at a time"
                )
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (open as long as the matrix)
            self._file.truncate(needed)
            kind = np.float64 if dtype == torch.float64 else np.float32
            mapped = np.memmap(self._file, dtype=kind, mode="r+", shape=(len(self.members), width))
        except OSError as error:
            raise MergeboundError(
                f"{folder}: cannot be written ({error.strerror}); give another scratch folder"
            ) from error
        self._matrix = torch.from_numpy(mapped)

    def rows(self, members: Sequence[Member]) -> Tensor:
        """Task vectors (n, P) of some experts, which should be in the order of their names; a copy unless all."""
        places = [self._ready(member) for member in members]
        if places == list(range(len(self.members))) and not self.mapped:
            return self._matrix
        return self._matrix[places]

    def heads(self, members: Sequence[Member]) -> Mapping[str, Mapping[str, Tensor]]:
        """Heads by the experts' names."""
        for member in members:
            self._ready(member)
        return {member.name: self._head[member.name] for member in members}

    def _ready(self, member: Member) -> int:
        place = self._place[member.name]
        if not self._there[place]:
            state = self._source.state(member.run, member.step)
            torch.sub(self._bench.vector(state), self._bench.origin, out=self._matrix[place])
            self._head[member.name] = self._bench.head_of(state)
            self._there[place] = True
        return place
