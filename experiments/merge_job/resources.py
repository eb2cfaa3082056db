"""What a merge may use: threads, memory, a device."""

from __future__ import annotations

from dataclasses import dataclass

from merging.device import check_device


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
