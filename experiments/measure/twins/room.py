"""How many twins fit into memory at once, and the engine that trains them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from experiments.finetune.cohort.chain import read_chain
from experiments.finetune.cohort.probe import expert_bytes
from experiments.grid.run_spec import RunSpec
from experiments.inputs.training_data import TrainingData
from experiments.measure.twins.stack import Engine, NetworkStack
from experiments.measure.twins.written import ChainStack
from theory.errors import MergeboundError

WRITTEN_CHUNK, WRITTEN_BYTES, NETWORK_CHUNK = 512, 1 << 22, 8
"""Twins at a time by default: written out, as many as stay near the processor; of other networks a few."""


@dataclass(frozen=True)
class Room:
    """What a measurement takes besides its data.

    Attributes:
        chunk: twins at a time.
        snapshots: of the base run that are kept.
        bytes: the most that rows, snapshots and checkpoints take together.
    """

    chunk: int
    snapshots: int
    bytes: int


def make_engine(
    run: RunSpec,
    network: nn.Module,
    start: Mapping[str, Tensor],
    sample: TrainingData,
    *,
    way: str = "auto",
    channels_last: bool = False,
) -> Engine:
    """What trains the rows; see :func:`train_twins`."""
    device = sample.labels.device
    fits = not isinstance(read_chain(network), str) and run.precision != "bfloat16" and run.trained != "low_rank"
    if way == "written" or (way == "auto" and fits):
        return ChainStack(run, network, start, device)
    return NetworkStack(run, network, start, device, way=way, channels_last=channels_last)


def make_room(
    run: RunSpec,
    network: nn.Module,
    sample: TrainingData,
    engine: Engine,
    snapshot_bytes: int,
    stops: int,
    twins: int,
    starts: int,
    *,
    chunk: int | None = None,
    memory: int | None = None,
) -> Room:
    """How many twins at a time, and how many snapshots.

    A row takes what the cohort's planner counts for one expert (weights, gradient, buffers and two copies of every
    layer's output for a batch).

    Raises:
        MergeboundError: not even one row fits.
    """
    row = max(expert_bytes(run, (network, {"x": torch.empty(engine.size, device="meta")}, sample)), engine.row_bytes)
    fixed = (stops + 2) * engine.size * engine.dtype.itemsize
    near = min(WRITTEN_CHUNK, max(NETWORK_CHUNK, WRITTEN_BYTES // engine.row_bytes))
    most = chunk if chunk is not None else (near if engine.name == "written" else NETWORK_CHUNK)
    if most < 1:
        raise MergeboundError(f"chunk = {chunk}: give 1 or more")
    rows, kept = min(most, twins), starts
    if memory is not None:
        free = memory - fixed
        if free < 2 * row + snapshot_bytes:
            raise MergeboundError(
                f"memory = {memory} bytes: one twin of this network needs {fixed + 2 * row + snapshot_bytes}; give "
                "that or more, or fewer checkpoints"
            )
        rows = int(max(1, min(rows, (free - snapshot_bytes) // row - 1)))
        kept = int(max(1, min(starts, (free - (rows + 1) * row) // snapshot_bytes)))
    return Room(rows, kept, fixed + (rows + 1) * row + kept * snapshot_bytes)
