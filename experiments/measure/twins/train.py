"""A base run and its twins: the base is trained once, twins start where their sample is first drawn, in chunks.

*Exact.* Until its sample is in a batch a twin does what the base run does, so it is started there from a snapshot of
the base run; batches, epochs and augmentation draws are shared.  With fewer snapshots than starts a twin begins at the
last snapshot before its own start, which costs steps and changes nothing.

*Memory.* Data: S once, and one fresh image per twin.  Beyond that at most :attr:`Room.bytes`: the base run's weights at
the checkpoints, the snapshots, and one chunk of rows; with ``memory`` given, chunk and snapshots are made to fit.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from experiments.grid.run_spec import RunSpec
from experiments.inputs.training_data import TrainingData
from experiments.measure.twins.pairs import NEVER, Coupling, Pairs, batch_of, couple, fresh_rows, sample_of
from experiments.measure.twins.room import Room, make_engine, make_room
from experiments.measure.twins.stack import Engine, Snapshot
from theory.errors import MergeboundError

PARTS = ("all", "shared", "private")
"""What a distance is over: all trained numbers, those that are merged, the head."""
Collect = Callable[[int, int, Mapping[str, Tensor]], None]
"""``collect(twin, step, state)`` with the twin's full state dict; twin -1 is the base run, which comes first."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class TwinRun:
    """One base run and its T twins.

    Attributes:
        run: of the base and of all twins.
        n: samples of S.
        pairs: what was exchanged.
        steps: (C,) int64 checkpoints, ascending.
        distances: (T, C, 3) float64 norms of x(S) - x(S^(j)) over :data:`PARTS`; infinite where a twin diverged.
        drift: (C, 3) norms of x(S) - x_0.
        rounding: (C,) distance of a row that exchanges nothing from the base run, where one was trained along: below
            it a distance is rounding; NaN otherwise.
        starts: (T,) step at which a twin leaves the base run, ``NEVER`` where it does not.
        counts: (T,) how often its sample is drawn.
        losses: (K,) batch losses of the base run before each step.
        state: the base run's final state dict.
        trained_steps: steps of twins that were really trained, of T K.
        room: memory.
        way: how the rows were trained.
        seconds: in all.
    """

    run: RunSpec
    n: int
    pairs: Pairs
    steps: np.ndarray
    distances: np.ndarray
    drift: np.ndarray
    rounding: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    losses: np.ndarray
    state: Mapping[str, Tensor]
    trained_steps: int
    room: Room
    way: str
    seconds: float


def train_twins(
    run: RunSpec,
    network: nn.Module,
    start: Mapping[str, Tensor],
    data: TrainingData,
    fresh: TrainingData,
    pairs: Pairs,
    *,
    steps: Sequence[int] | None = None,
    way: str = "auto",
    chunk: int | None = None,
    memory: int | None = None,
    control: bool = True,
    once: bool = False,
    channels_last: bool = False,
    collect: Collect | None = None,
) -> TwinRun:
    """Train the base run on S and its twins on S^(j), and measure how far they end apart.

    Args:
        run: what to do; ``checkpoints`` are where distances are taken unless ``steps`` says otherwise.
        network: of the run's architecture; it is left as it is.
        start: full state dict x_0, head included.
        data: the training part, of which ``run.data_share`` is S (as :func:`experiments.finetune.reference.train_run`).
        fresh: held-back data of the same task, from which samples are replaced.
        pairs: what is exchanged (:func:`~.pairs.draw_pairs`); positions in S.
        way: ``written`` (logistic regression, MLPs), ``folded``, ``vmap`` or ``auto``.
        chunk: twins at a time; default up to 512 where written out, else 8.
        memory: bytes that all but the data may take.
        control: train one more row that exchanges nothing with the first chunk, which shows the rounding.
        once: the fresh sample is seen in the first batch only: one kick, then the same batches (the growth of a small
            difference under common batches, theory.md section 1).
        channels_last: memory order of images.
        collect: is called for the base run and for every twin that has left it, at every checkpoint.

    Raises:
        MergeboundError: no way takes the network, a batch larger than S, too little memory, or a base run that leaves
            the finite numbers.
    """
    began = time.perf_counter()
    sample = sample_of(run, data)
    coupling = couple(run, len(sample), pairs)
    exchanged = fresh_rows(sample, fresh, pairs)
    engine = make_engine(run, network, start, sample, way=way, channels_last=channels_last)
    stops = _stops(run, steps)
    first = engine.begin()
    leaving = np.flatnonzero(coupling.starts != NEVER)
    distinct = np.unique(coupling.starts[leaving])
    room = make_room(
        run, network, sample, engine, first.bytes, len(stops), max(1, len(leaving)), max(1, len(distinct)),
        chunk=chunk, memory=memory,
    )  # fmt: skip
    kept = distinct[np.unique(np.linspace(0, len(distinct), room.snapshots, endpoint=False).astype(int))]
    base = _train_base(engine, sample, exchanged, coupling, first, {int(k) for k in kept}, stops, collect)
    distances = np.zeros((len(pairs), len(stops), len(PARTS)))
    rounding = np.full(len(stops), np.nan)
    order = leaving[np.argsort(coupling.starts[leaving], kind="stable")]
    trained = 0
    for begin in range(0, len(order), room.chunk):
        members = order[begin : begin + room.chunk]
        with_control = control and begin == 0
        found, steps_made = _train_chunk(
            engine, sample, exchanged, coupling, pairs.samples, members, base, stops,
            control=with_control, once=once, collect=collect,
        )  # fmt: skip
        distances[members] = found[int(with_control) :]
        if with_control:
            rounding = found[0, :, 0]
        trained += steps_made
        _log.info("%d of %d twins", begin + len(members), len(order))
    return TwinRun(
        run=run,
        n=len(sample),
        pairs=pairs,
        steps=np.array(stops, dtype=np.int64),
        distances=distances,
        drift=_parts(torch.stack([base.vectors[k] for k in stops]), engine.vector(first), engine.shared),
        rounding=rounding,
        starts=coupling.starts,
        counts=coupling.counts,
        losses=base.losses,
        state=base.state,
        trained_steps=trained,
        room=room,
        way=engine.name,
        seconds=time.perf_counter() - began,
    )


@dataclass(frozen=True, eq=False)
class _Base:
    """The base run: snapshots by step, vectors (P,) at the checkpoints, its losses and final state."""

    snapshots: Mapping[int, Snapshot]
    vectors: Mapping[int, Tensor]
    losses: np.ndarray
    state: Mapping[str, Tensor]


def _train_base(
    engine: Engine,
    sample: TrainingData,
    exchanged: TrainingData,
    coupling: Coupling,
    first: Snapshot,
    wanted: set[int],
    stops: Sequence[int],
    collect: Collect | None,
) -> _Base:
    engine.open(1)
    engine.join(first, 1)
    snapshots: dict[int, Snapshot] = {}
    vectors: dict[int, Tensor] = {}
    losses = np.empty(len(coupling.rows))
    none = np.zeros(0, dtype=np.int64)
    for step in range(len(coupling.rows)):
        if step in wanted:
            snapshots[step] = engine.snapshot(0)
        loss = engine.step(step, batch_of(sample, exchanged, coupling, step, none, none), loss=True)
        losses[step] = float("nan") if loss is None else float(loss)
        if step + 1 in stops:
            vectors[step + 1] = engine.vector(engine.snapshot(0))
            if not (np.isfinite(losses[: step + 1]).all() and bool(torch.isfinite(vectors[step + 1]).all())):
                raise MergeboundError(
                    f"the base run leaves the finite numbers before step {step + 1}; lower learning_rate, or measure "
                    "twins of a run that finishes"
                )
            if collect is not None:
                collect(-1, step + 1, engine.state(engine.snapshot(0), step + 1))
    return _Base(snapshots, vectors, losses, engine.state(engine.snapshot(0), len(coupling.rows)))


def _train_chunk(
    engine: Engine,
    sample: TrainingData,
    exchanged: TrainingData,
    coupling: Coupling,
    samples: np.ndarray,
    members: np.ndarray,
    base: _Base,
    stops: Sequence[int],
    *,
    control: bool,
    once: bool,
    collect: Collect | None,
) -> tuple[np.ndarray, int]:
    """Distances (rows, C, 3) of a chunk, a control in front if wanted, and how many steps its twins made."""
    kept = np.array(sorted(base.snapshots))
    begins = kept[np.searchsorted(kept, coupling.starts[members], side="right") - 1]
    offset = int(control)
    engine.open(len(members) + offset)
    if control:
        engine.join(base.snapshots[int(begins[0])], 1)
    distances = np.zeros((len(members) + offset, len(stops), len(PARTS)))
    joined = made = 0
    for step in range(int(begins[0]), len(coupling.rows)):
        new = int(np.count_nonzero(begins[joined:] == step))
        if new:
            engine.join(base.snapshots[step], new)
            joined += new
        batch = batch_of(sample, exchanged, coupling, step, members[:joined], samples, offset, once=once)
        engine.step(step, batch)
        made += joined
        if step + 1 in stops:
            where = stops.index(step + 1)
            distances[: joined + offset, where] = _parts(engine.vectors(), base.vectors[step + 1], engine.shared)
            if collect is not None:
                for row, twin in enumerate(members[:joined]):
                    if coupling.starts[twin] <= step:
                        collect(int(twin), step + 1, engine.state(engine.snapshot(row + offset), step + 1))
    return distances, made


def _parts(rows: Tensor, origin: Tensor, shared: int) -> np.ndarray:
    """Norms (m, 3) of rows minus origin, over :data:`PARTS`; infinite where a row is not finite."""
    found = np.empty((len(rows), len(PARTS)))
    for number, row in enumerate(rows):
        away = (row - origin).double()
        inner, outer = float(away[:shared].norm()), float(away[shared:].norm())
        found[number] = (float(np.hypot(inner, outer)), inner, outer)
    return np.where(np.isfinite(found), found, np.inf)


def _stops(run: RunSpec, steps: Sequence[int] | None) -> list[int]:
    stops = sorted(set(run.checkpoints if steps is None else steps) | {run.steps})
    if stops[0] < 1 or stops[-1] > run.steps:
        raise MergeboundError(f"steps = {list(stops)}: checkpoints lie in 1 .. {run.steps}")
    return stops
