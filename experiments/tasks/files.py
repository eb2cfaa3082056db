"""The user's own images: ``.npz`` files and folders of class-named sub-folders.

``.npz``: ``x_<split>`` and ``y_<split>`` (or plain ``x``, ``y``), optionally ``class_names``.  ``x`` is uint8, grey
``(n, h, w)`` or colour ``(n, h, w, 1 | 3)``, which is scaled to [0, 1] and normalised; or floating, ``(n, h, w)`` or
``(n, c, h, w)``, which is taken as normalised already.  Folders: one sub-folder per class, classes numbered in the
order of their names, optionally below ``train/``, ``val/`` and so on.

Arrays of another size are resized to the network's; photographs in folders are scaled on their short side and cut out
of the middle, as timm evaluates.  Nothing in a file is executed (``allow_pickle=False``).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiments.tasks.fit import fit
from experiments.tasks.folders import IMAGE_SUFFIXES, find_files, visible_folders
from experiments.tasks.form import InputFormat
from experiments.tasks.images import read_image
from experiments.tasks.local import check_pairs
from experiments.tasks.npz import read_array, read_headers, read_names
from experiments.tasks.types import Split
from theory.errors import MergeboundError

_log = logging.getLogger(__name__)

SPLITS = ("calibration", "val", "valid", "validation", "test", "train")
"""Names of splits, in the order in which they are preferred: training images last."""


@dataclass(frozen=True)
class LoadedImages:
    """Images of one task, ready for the network.

    Attributes:
        split: images (n, channels, height, width) float32, labels (n,), row numbers in the source.
        name: the name of the split that was read (empty where the source has none).
        total: images that the source has in this split.
        class_names: names by label; empty if the source gives none.
    """

    split: Split
    name: str
    total: int
    class_names: tuple[str, ...]


def load_images(
    path: Path, form: InputFormat, *, images: int = 128, seed: int = 0, split: str | None = None
) -> LoadedImages:
    """A random subset of a data set.

    Args:
        path: an ``.npz`` file or a folder.
        form: what the network takes.
        images: how many images at most.
        seed: names the subset; sources with equally many images give the same rows.
        split: which part; default the first of :data:`SPLITS` that is there.

    Raises:
        MergeboundError: names the file, the field and the remedy.
    """
    if images < 1:
        raise MergeboundError(f"images = {images}: give a positive number of calibration images")
    if path.is_dir():
        return _from_folder(path, form, images, seed, split)
    if not path.exists():
        raise MergeboundError(f"{path}: there is no such file or folder; check the path of --data")
    if path.suffix != ".npz":
        raise MergeboundError(f"{path}: not an .npz file nor a folder of class-named sub-folders; convert the images")
    return _from_npz(path, form, images, seed, split)


def check_labels(path: Path, labels: Tensor, classes: int, head: str) -> None:
    """Check that every label is a class of the head.

    Raises:
        MergeboundError: names the data file and the checkpoint whose head is too small.
    """
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise MergeboundError(
            f"{path}: label {low if low < 0 else high} is out of range for the head of {head}, which has {classes} "
            "classes numbered from 0; give the data in the order of --experts, or renumber the labels"
        )


def subset(count: int, images: int, seed: int) -> np.ndarray:
    """Row numbers of a random subset without replacement, ascending, (min(count, images),)."""
    if count <= images:
        return np.arange(count)
    return np.sort(np.random.default_rng([seed, 0xF11E]).permutation(count)[:images])


# --- npz -------------------------------------------------------------------------------------------------------------


def _from_npz(path: Path, form: InputFormat, images: int, seed: int, split: str | None) -> LoadedImages:
    headers = read_headers(path)
    x_key, y_key, name = _keys(path, tuple(headers), split)
    check_pairs(path, x_key, headers[x_key].shape, headers[y_key])
    x, y = read_array(path, x_key), read_array(path, y_key)
    names = read_names(path, headers)
    rows = subset(len(y), images, seed)
    batch = _array_to_batch(path, x_key, x[rows], form)
    labels = torch.from_numpy(y[rows].astype(np.int64))
    return LoadedImages(Split(batch, labels, rows), name, len(y), names)


def _keys(path: Path, keys: Sequence[str], split: str | None) -> tuple[str, str, str]:
    pairs = {key[2:]: (key, f"y_{key[2:]}") for key in keys if key.startswith("x_") and f"y_{key[2:]}" in keys}
    if "x" in keys and "y" in keys:
        pairs[""] = ("x", "y")
    if not pairs:
        raise MergeboundError(
            f"{path}: no images among its arrays ({', '.join(keys) or 'none'}); name them x_<split> and y_<split>, as "
            "x_test and y_test"
        )
    name = _choose(path, tuple(pairs), split)
    return (*pairs[name], name)


def _choose(path: Path, found: Sequence[str], split: str | None) -> str:
    if split is not None:
        if split not in found:
            raise MergeboundError(
                f"{path}: no split {split!r}; choose --split among {', '.join(found) or '(there are no splits)'}"
            )
        return split
    chosen = next((name for name in (*SPLITS, "") if name in found), found[0])
    if chosen == "test":
        _log.warning(
            "%s: images of the test split are used, so test results are optimistic afterwards: see --split", path
        )
    return chosen


def _array_to_batch(path: Path, key: str, x: np.ndarray, form: InputFormat) -> Tensor:
    """(n, channels, height, width) float32, normalised."""
    if x.dtype == np.uint8:
        if x.ndim == 3:
            x = x[..., None]
        if x.ndim != 4 or x.shape[-1] not in (1, 3):
            raise MergeboundError(
                f"{path}: {key} is uint8 of shape {x.shape}; store (n, height, width) or (n, height, width, 3)"
            )
        batch = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
        scaled = _resize(batch.float() / 255.0, form).clamp(0.0, 1.0)
        return _normalise(_channels(path, scaled, form), form)
    if x.dtype.kind == "f":
        if x.ndim == 3:
            x = x[:, None]
        if x.ndim != 4 or x.shape[1] not in (1, form.channels):
            raise MergeboundError(
                f"{path}: {key} is {x.dtype} of shape {x.shape}; store (n, height, width) or (n, channels, height, "
                f"width) with 1 or {form.channels} channel(s), already normalised"
            )
        if not np.isfinite(x).all():
            raise MergeboundError(f"{path}: {key} holds NaN or infinite pixels; repair or remove those images")
        return _channels(path, _resize(torch.from_numpy(x.astype(np.float32)), form), form)
    raise MergeboundError(f"{path}: {key} has type {x.dtype}; store uint8 images, or floating ones already normalised")


def _channels(path: Path, batch: Tensor, form: InputFormat) -> Tensor:
    if batch.shape[1] == form.channels:
        return batch
    if batch.shape[1] == 1:
        return batch.expand(-1, form.channels, -1, -1).contiguous()
    raise MergeboundError(
        f"{path}: the images have {batch.shape[1]} channels but the network takes {form.channels}; convert them to grey"
    )


def _resize(batch: Tensor, form: InputFormat) -> Tensor:
    if batch.shape[-2:] == (form.height, form.width):
        return batch
    mode = form.interpolation if form.interpolation in ("bilinear", "bicubic") else "bicubic"
    return torch.nn.functional.interpolate(
        batch, size=(form.height, form.width), mode=mode, align_corners=False, antialias=True
    )


def _normalise(batch: Tensor, form: InputFormat) -> Tensor:
    mean = torch.tensor(form.mean, dtype=torch.float32).view(1, -1, 1, 1)
    std = torch.tensor(form.std, dtype=torch.float32).view(1, -1, 1, 1)
    return (batch - mean) / std


# --- folders ---------------------------------------------------------------------------------------------------------


def _from_folder(path: Path, form: InputFormat, images: int, seed: int, split: str | None) -> LoadedImages:
    folders = visible_folders(path)
    splits = [folder.name for folder in folders if folder.name in SPLITS and visible_folders(folder)]
    root, name = path, ""
    if split is not None or (splits and len(splits) == len(folders)):
        name = _choose(path, splits if split is None else [folder.name for folder in folders], split)
        root = path / name
    classes = visible_folders(root)
    files = [(folder / file, label) for label, folder in enumerate(classes) for file in find_files(folder).images]
    if not files:
        raise MergeboundError(
            f"{root}: no images in class-named sub-folders; put them as {root.name}/<class>/<image> "
            f"({', '.join(IMAGE_SUFFIXES[:3])}, ...)"
        )
    rows = subset(len(files), images, seed)
    batch = torch.stack([_read_photo(files[row][0], form) for row in rows])
    labels = torch.tensor([files[row][1] for row in rows], dtype=torch.int64)
    loaded = Split(_normalise(batch, form), labels, rows)
    return LoadedImages(loaded, name, len(files), tuple(folder.name for folder in classes))


def _read_photo(path: Path, form: InputFormat) -> Tensor:
    """One photograph, (channels, height, width) in [0, 1]: short side scaled, middle cut out."""
    if form.channels == 1:
        _check_grey(path)
    image = fit(read_image(path, grey=form.channels == 1), form)
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float() / 255.0


def _check_grey(path: Path) -> None:
    from PIL import Image

    try:
        with Image.open(path) as opened:
            bands, mode = len(opened.getbands()), opened.mode
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return  # reading the image says what is wrong with it
    if bands > 1:
        raise MergeboundError(f"{path}: a {mode} image, but the network takes one channel; convert the images to grey")
