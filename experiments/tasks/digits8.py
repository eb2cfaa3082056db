"""The embedded family ``digits8``: 1,797 handwritten 8x8 digits under fixed transformations.

The images are scikit-learn's bundled copy of the UCI optical digits test set (Alpaydin, Kaynak 1998), so nothing is
downloaded.  A task is the digits seen through one fixed, invertible transformation; all tasks have ten classes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from experiments.tasks.types import Family, Split, Task
from theory.errors import MergeboundError

EIGHT = ("identity", "rotate90", "rotate180", "rotate270", "flip", "transpose", "checkerboard", "roll")
"""The default eight transformations, in order; :func:`transformations` has four more."""
MORE = ("invert", "antitranspose", "upside_down", "blocks")
"""The other four: tasks that the default eight are held against (study of scale)."""
TWELVE = (*EIGHT, *MORE)
"""All transformations, in order."""


def transformations() -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Twelve fixed, invertible transformations of images in [0, 1] of shape (n, 8, 8)."""
    board = np.indices((8, 8)).sum(axis=0) % 2
    blocks = np.random.default_rng(8).permutation(16)

    def move_blocks(x: np.ndarray) -> np.ndarray:
        tiles = x.reshape(-1, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 16, 2, 2)[:, blocks]
        return tiles.reshape(-1, 4, 4, 2, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 8, 8)

    return {
        "identity": lambda x: x,
        "rotate90": lambda x: np.rot90(x, 1, (1, 2)),
        "rotate180": lambda x: np.rot90(x, 2, (1, 2)),
        "rotate270": lambda x: np.rot90(x, 3, (1, 2)),
        "flip": lambda x: x[:, :, ::-1],
        "transpose": lambda x: x.transpose(0, 2, 1),
        "checkerboard": lambda x: np.where(board == 1, 1.0 - x, x),
        "roll": lambda x: np.roll(x, (4, 4), (1, 2)),
        "invert": lambda x: 1.0 - x,
        "antitranspose": lambda x: np.rot90(x, 2, (1, 2)).transpose(0, 2, 1),
        "upside_down": lambda x: x[:, ::-1, :],
        "blocks": move_blocks,
    }


def digits8(
    *,
    seed: int = 0,
    tasks: tuple[str, ...] = EIGHT,
    share_images: bool = False,
    train_per_task: int = 80,
    pretraining: int = 500,
    calibration: int = 256,
    calibration_per_task: int = 128,
    test: int = 400,
) -> Family:
    """Build the family: pretraining, training, calibration and test images are disjoint.

    Args:
        seed: names the one random permutation that makes all splits.
        tasks: transformation names.
        share_images: ``False``: every task trains on its own images (assumption A1 can hold); ``True``: all tasks
            train on the same ``train_per_task * len(tasks)`` images under their own transformation (A1 fails).
        train_per_task: training images per task when they are not shared.
        pretraining, calibration, test: numbers of images in these pools, common to all tasks.
        calibration_per_task: each task's own random subset of the calibration pool.

    Raises:
        MergeboundError: unknown transformation, or more images asked for than the 1,797 there are.
    """
    from sklearn.datasets import load_digits

    known = transformations()
    unknown = [name for name in tasks if name not in known]
    if unknown:
        raise MergeboundError(f"tasks: unknown digit transformation {unknown[0]!r}; choose from {', '.join(known)}")
    raw = load_digits()
    images, labels = raw.images.astype(np.float32) / 16.0, raw.target.astype(np.int64)
    wanted = pretraining + calibration + test + train_per_task * len(tasks)
    if wanted > len(labels):
        raise MergeboundError(
            f"digits8 has {len(labels)} images but {wanted} were asked for; lower train_per_task ({train_per_task}), "
            f"pretraining ({pretraining}), calibration ({calibration}) or test ({test})"
        )
    if calibration_per_task > calibration:
        raise MergeboundError(
            f"calibration_per_task ({calibration_per_task}) exceeds the calibration pool ({calibration}); lower it"
        )
    rng = np.random.default_rng([seed, 0xD161])
    order = rng.permutation(len(labels))
    cuts = np.cumsum([pretraining, calibration, test])
    pre_rows, cal_rows, test_rows, train_rows = np.split(order, cuts)

    def split(rows: np.ndarray, transform: Callable[[np.ndarray], np.ndarray]) -> Split:
        x = np.ascontiguousarray(transform(images[rows]), dtype=np.float32)
        x = (x - 0.5) / 0.5
        return Split(torch.from_numpy(x).unsqueeze(1), torch.from_numpy(labels[rows]), rows)

    built: dict[str, Task] = {}
    for number, name in enumerate(tasks):
        if share_images:
            own = train_rows[: train_per_task * len(tasks)]
        else:
            own = train_rows[number * train_per_task : (number + 1) * train_per_task]
        own_cal = cal_rows[rng.permutation(calibration)[:calibration_per_task]]
        transform = known[name]
        built[name] = Task(name, split(own, transform), split(own_cal, transform), split(test_rows, transform), 10)
    return Family("digits8", split(pre_rows, known["identity"]), built, share_images, seed)
