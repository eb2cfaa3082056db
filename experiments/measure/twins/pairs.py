"""Which samples are exchanged, for what, and when a twin leaves its base run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from experiments.finetune.loop import batches
from experiments.grid.run_spec import RunSpec
from experiments.inputs.order import with_epochs
from experiments.inputs.resident_data import Resident
from experiments.inputs.shares import nested_subset
from experiments.inputs.training_data import TrainingData
from experiments.tasks.types import Split
from theory.errors import MergeboundError

_EXCHANGED = 0x7713
_BATCHES = 0xBA7C
NEVER = -1
"""Where a twin leaves that never does: its sample is in no batch, and it equals the base run."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """T exchanges: sample ``samples[t]`` of S is replaced by row ``fresh[t]`` of other data.

    Attributes:
        samples: (T,) int64 positions in S, 0 .. n - 1, distinct unless a sample meets several fresh ones.
        fresh: (T,) int64 rows of the fresh data.
        seed: that drew them; -1 where they were given.
    """

    samples: np.ndarray
    fresh: np.ndarray
    seed: int = -1

    def __post_init__(self) -> None:
        if self.samples.ndim != 1 or self.samples.shape != self.fresh.shape or not len(self.samples):
            raise MergeboundError(
                f"twins: samples of shape {self.samples.shape} and fresh rows of shape {self.fresh.shape}; give as "
                "many of one as of the other, and at least one"
            )

    def __len__(self) -> int:
        return len(self.samples)

    def choose(self, rows: np.ndarray) -> Pairs:
        """Some of them."""
        return replace(self, samples=self.samples[rows], fresh=self.fresh[rows])


def draw_pairs(n: int, fresh: int, twins: int, seed: int) -> Pairs:
    """Samples drawn from S without repetition, each with a fresh row of its own, all at random.

    Means over the drawn samples estimate means over all n without bias.

    Args:
        n: samples of S.
        fresh: rows of the fresh data.
        twins: how many exchanges; at most ``n``.
        seed: names the draw; fewer twins of one seed are the beginning of more.

    Raises:
        MergeboundError: more twins than samples or fresh rows.
    """
    if not 1 <= twins <= min(n, fresh):
        raise MergeboundError(
            f"twins = {twins}: the sample has {n} rows and there are {fresh} fresh ones; choose 1 to {min(n, fresh)}"
        )
    rng = np.random.default_rng([seed, _EXCHANGED])
    samples, others = rng.permutation(n)[:twins], rng.permutation(fresh)[:twins]
    return Pairs(samples.astype(np.int64), others.astype(np.int64), seed)


@dataclass(frozen=True, eq=False)
class Coupling:
    """What a base run and its twins share: batches, epochs, and when each twin leaves.

    Attributes:
        rows: for each step, (b_k,) int64 positions in S.
        epochs: (K,) epoch of each batch, which names the augmentation's draws.
        starts: (T,) first step whose batch holds the twin's sample; ``NEVER`` where none does.
        counts: (T,) how often the sample is drawn in all.
    """

    rows: tuple[np.ndarray, ...]
    epochs: np.ndarray
    starts: np.ndarray
    counts: np.ndarray


def couple(run: RunSpec, n: int, pairs: Pairs) -> Coupling:
    """The batches of a run on n samples (its share is taken already), and where its twins leave it.

    Raises:
        MergeboundError: a batch larger than the sample, or a sample that is not in it.
    """
    if pairs.samples.min() < 0 or pairs.samples.max() >= n:
        raise MergeboundError(f"twins: sample {pairs.samples.max()} is not among the {n} samples of S")
    rng = np.random.default_rng([run.seed, _BATCHES])
    order = list(with_epochs(batches(n, run.batch_size, run.steps, run.sampling, rng), n))
    first = np.full(n, NEVER, dtype=np.int64)
    drawn = np.zeros(n, dtype=np.int64)
    for step, (rows, _) in enumerate(order):
        np.add.at(drawn, rows, 1)
        first[rows[first[rows] == NEVER]] = step
    epochs = np.array([epoch for _, epoch in order], dtype=np.int64)
    return Coupling(tuple(rows for rows, _ in order), epochs, first[pairs.samples], drawn[pairs.samples])


def sample_of(run: RunSpec, data: TrainingData) -> TrainingData:
    """S: the share of the training part that a run sees, in the order in which its batches count it."""
    return data.take(nested_subset(len(data), run.data_share, run.seed))


def fresh_rows(sample: TrainingData, fresh: TrainingData, pairs: Pairs) -> TrainingData:
    """The fresh images of T pairs as T samples, seen as the replaced ones are: with their augmentation draws.

    Only T images are copied, none of S.

    Raises:
        MergeboundError: fresh images of another form.
    """
    rows = fresh.take(pairs.fresh)
    if not isinstance(sample, Resident):
        return rows
    if not isinstance(rows, Resident) or rows.form != sample.form:
        raise MergeboundError("twins: the fresh images have another form than the sample's; open both alike")
    stored = rows.images
    if stored.shape[1] != sample.store.shape[1]:
        stored = stored.expand(-1, sample.store.shape[1], -1, -1)
    return replace(
        sample,
        store=stored.contiguous(),
        store_labels=rows.labels,
        store_source=sample.source[pairs.samples],
        rows=None,
    )


def replaced(sample: TrainingData, exchanged: TrainingData, pairs: Pairs, twin: int) -> TrainingData:
    """S^(j) of one twin as data of its own (a copy of the pixels): for checks, not for many twins.

    Args:
        exchanged: of :func:`fresh_rows`.
    """
    j = int(pairs.samples[twin])
    if isinstance(sample, Resident) and isinstance(exchanged, Resident):
        store, labels = sample.images.clone(), sample.labels.clone()
        store[j], labels[j] = exchanged.images[twin], exchanged.labels[twin]
        return replace(sample, store=store, store_labels=labels, store_source=sample.source.copy(), rows=None)
    images, labels = (tensor.clone() for tensor in sample.batch(np.arange(len(sample)), 0))
    image, label = exchanged.batch(np.array([twin]), 0)
    images[j], labels[j] = image[0], label[0]
    return Split(images, labels, np.arange(len(sample)))


@dataclass(frozen=True, eq=False)
class Batch:
    """One step's samples: the base run's, and what some twins see in their place.

    Attributes:
        images: (b, ...), labels: (b,) of the base run.
        twins: (s,) rows (of the stack) of twins that see something else.
        places: (s,) where in the batch.
        others: (s, ...) images and (s,) labels that they see.
    """

    images: Tensor
    labels: Tensor
    twins: Tensor
    places: Tensor
    other_images: Tensor
    other_labels: Tensor


def batch_of(
    sample: TrainingData,
    exchanged: TrainingData,
    coupling: Coupling,
    step: int,
    members: Sequence[int] | np.ndarray,
    samples: np.ndarray,
    offset: int = 0,
    *,
    once: bool = False,
) -> Batch:
    """The batch of a step for a stack of twins.

    Args:
        sample, exchanged: S, and the fresh images by twin.
        coupling: of the run.
        step: k.
        members: twins in the stack, in order.
        samples: (T,) which sample each twin exchanges.
        offset: rows before them.
        once: a twin sees its fresh sample in the first batch only (one kick).
    """
    rows, epoch = coupling.rows[step], int(coupling.epochs[step])
    images, labels = sample.batch(rows, epoch)
    chosen = np.asarray(members, dtype=np.int64)
    kicked = coupling.starts[chosen] == step if once else np.ones(len(chosen), dtype=bool)
    hits = (samples[chosen][:, None] == rows[None, :]) & kicked[:, None]
    who, where = np.nonzero(hits)
    if len(who):
        other_images, other_labels = exchanged.batch(chosen[who], epoch)
    else:
        other_images, other_labels = images[:0], labels[:0]
    device = labels.device
    return Batch(
        images,
        labels,
        torch.from_numpy(who + offset).to(device),
        torch.from_numpy(where).to(device),
        other_images,
        other_labels,
    )
