"""Where images are kept while a network trains: in memory, in a cache that is mapped, or on disk as they are."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch

from experiments.inputs.augment import Augmentation, augmentation
from experiments.inputs.cache import cached
from experiments.inputs.memory import available_bytes
from experiments.inputs.prefetch import WAIT_S
from experiments.inputs.reader import source_rows
from experiments.inputs.resident import load_resident
from experiments.inputs.resident_data import Resident
from experiments.inputs.streamed import Kind, Streamed, stream
from experiments.inputs.transforms import Views
from experiments.tasks.form import InputFormat
from experiments.tasks.images import Images

_log = logging.getLogger(__name__)

MEMORY_SHARE = 0.5
"""Share of the available memory that images may take unless a limit is given."""


def open_inputs(
    images: Images,
    form: InputFormat,
    *,
    memory_limit: int | None = None,
    cache: Path | None = None,
    views: str | Views | None = None,
    augment: str | Augmentation | None = None,
    seed: int = 0,
    name: str = "",
    first_row: int = 0,
    workers: int = 2,
    kind: Kind = "threads",
    limit_s: float = WAIT_S,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> Resident | Streamed:
    """Images in memory where they fit, else in a cache where a folder is given, else read as they are needed.

    The numbers of a batch do not depend on the choice.  It is logged with its reason.

    Args:
        images, form: the images, and what the network takes.
        memory_limit: bytes that resized images may take; default half of the memory that is available.
        cache: folder for resized images that do not fit in memory: they are decoded once, in this or an earlier run.
        views: random views of the full-size image; these are always read as they are needed.
        augment: light augmentation of the resized image.
        seed, name, first_row: name the draws.
        workers: threads (or processes) that decode.
        kind, limit_s: see :class:`experiments.inputs.streamed.Streamed`.
        device, dtype, channels_last: of the batches.  A cache is mapped on a CPU only.

    Raises:
        MergeboundError: an image cannot be read (names it), or a bad argument.
    """
    needed = len(images) * form.channels * form.height * form.width
    limit = memory_room(device) if memory_limit is None else memory_limit
    size = f"{len(images)} images of {form.channels} x {form.height} x {form.width} ({needed / 1e6:.1f} MB)"
    if views is None or views == "none":
        if limit is None or needed <= limit:
            _log.info("%s: in memory", size)
            return load_resident(
                images,
                form,
                seed=seed,
                augment=augment,
                device=device,
                threads=workers,
                limit_bytes=max(needed, 1),
                dtype=dtype,
                channels_last=channels_last,
                name=name,
                first_row=first_row,
            )
        reason = f"more than the limit of {limit / 1e6:.1f} MB"
        if cache is not None and torch.device(device).type == "cpu":
            _log.info("%s: %s, so mapped from a cache in %s", size, reason, cache)
            return Resident(
                torch.from_numpy(cached(images, form, cache, workers=workers, limit_s=limit_s)),
                torch.from_numpy(np.ascontiguousarray(images.labels, dtype=np.int64)),
                first_row + source_rows(images),
                form,
                augmentation(augment),
                seed,
                name,
                dtype,
                channels_last,
            )
    else:
        reason = "random views need the full-size images"
    _log.info("%s: %s, so read from disk by %d %s", size, reason, workers, kind)
    return stream(
        images,
        form,
        views=views,
        augment=augment,
        seed=seed,
        name=name,
        first_row=first_row,
        workers=workers,
        kind=kind,
        limit_s=limit_s,
        device=device,
        dtype=dtype,
        channels_last=channels_last,
    )


def memory_room(device: str | torch.device = "cpu") -> int | None:
    """Bytes that images may take without a stated limit; ``None`` where nothing is known."""
    free = available_bytes(torch.device(device))
    return None if free is None else int(MEMORY_SHARE * free)
