"""Scores of every point on every task and test image, as tables: what intervals can be computed from again."""

from __future__ import annotations

import numpy as np
import pandas as pd

from experiments.studies.scale.runner import Measured

_DIGITS = 6
POINT = ("architecture", "base", "point")
ABOUT = (*POINT, "kind", "method", "experts", "chain", "seed", "members")
SCORES = (*POINT, "task", "scored_by", "images", "accuracy", "loss", "correct")


def score_points(measured: Measured) -> pd.DataFrame:
    """What every point is: ``architecture``, ``base``, ``point`` (its number in the cell), ``kind``, ``method``,
    ``experts``, ``chain``, ``seed``, ``members``."""
    return _rows(measured).drop_duplicates(list(POINT))[list(ABOUT)].reset_index(drop=True)


def scores_table(measured: Measured) -> pd.DataFrame:
    """One row per cell, point, task and way of scoring.

    Returns:
        ``architecture``, ``base``, ``point`` (see :func:`score_points`), ``task``, ``scored_by`` (``head`` or a
        transfer), ``images``, ``accuracy``, ``loss`` (nats, heads only), ``correct``: the test images in order, one bit
        each (1: right), as hexadecimal digits, the last filled with zeros; :func:`unpacked` reads them.
    """
    rows = _rows(measured)
    lines = (line for points in measured.points.values() for line in points.correct)
    rows["correct"] = [packed(line[~np.isnan(line)]) for line in lines]
    return rows[list(SCORES)].round({"accuracy": _DIGITS, "loss": _DIGITS})


def _rows(measured: Measured) -> pd.DataFrame:
    parts = [
        points.rows.assign(architecture=cell.architecture, base=cell.base) for cell, points in measured.points.items()
    ]
    return pd.concat(parts, ignore_index=True)


def images_table(measured: Measured) -> pd.DataFrame:
    """Which test images tasks share: ``task``, ``image`` (its place), ``source`` (equal numbers: one original)."""
    points = next(iter(measured.points.values()))
    parts = [
        pd.DataFrame({"task": task, "image": np.arange(len(source)), "source": source})
        for task, source in points.sources.items()
    ]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def packed(correct: np.ndarray) -> str:
    """Right or wrong (n,) as hexadecimal digits."""
    return bytes(np.packbits(correct.astype(bool))).hex()


def unpacked(text: str, images: int) -> np.ndarray:
    """The other way: (images,) of booleans."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8))[:images].astype(bool)
