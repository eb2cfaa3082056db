"""Whether two tools merged the same thing: their outputs, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor


@dataclass(frozen=True)
class Agreement:
    """How the output of a tool compares with ours.

    Attributes:
        case, tool, dtype: what was compared.
        difference: largest absolute difference.
        change: largest absolute difference of our output from the base, as a scale.
        beyond: share of entries that differ by more than a thousandth of ``change`` (a 256th for bfloat16).
        spread: ratio of the root mean squares of (output - base), theirs over ours: what random masks leave alone.
        zeros: share of entries that are the base's, theirs minus ours.
        random: only the distributions are meant to agree.
    """

    case: str
    tool: str
    dtype: str
    difference: float
    change: float
    beyond: float
    spread: float
    zeros: float
    random: bool

    @property
    def agrees(self) -> bool:
        """float32: differences of rounding, save for one entry in 10,000 on the other side of a threshold.

        bfloat16: all but 2 % of the entries, and the spread within 1 %, since differences of bfloat16 weights take few
        values, so that many entries are equal at the threshold of TIES and tools keep others of them, and FusionBench
        sums in bfloat16.  Random masks: spread and zeros within 1 %.
        """
        if self.random:
            return abs(self.spread - 1.0) < 0.01 and abs(self.zeros) < 0.01
        if self.dtype == "bfloat16":
            return self.beyond <= 0.02 and abs(self.spread - 1.0) < 0.01
        return self.beyond <= 1e-4


def compare(
    case: str, tool: str, dtype: str, base: Path, ours: Sequence[Path], theirs: Sequence[Path], *, random: bool
) -> Agreement:
    """Compare two outputs.

    Raises:
        ValueError: they do not hold the same tensors.
    """
    left, right = _places(ours), _places(theirs)
    if left.keys() != right.keys():
        odd = sorted(left.keys() ^ right.keys())[:4]
        raise ValueError(f"{tool} and ours did not write the same tensors: {', '.join(odd)}")
    level = 1e-3 if dtype == "float32" else 2.0**-8
    difference = change = 0.0
    total = same_ours = same_theirs = 0
    squares_ours = squares_theirs = 0.0
    changes = []
    for name in left:
        start, a, b = _read(base, name), _read(left[name], name), _read(right[name], name)
        if a.shape != b.shape:
            raise ValueError(f"{tool} and ours disagree about the shape of '{name}'")
        gap = (a - b).abs()
        moved_ours, moved_theirs = a - start, b - start
        difference = max(difference, float(gap.max()))
        change = max(change, float(moved_ours.abs().max()))
        total += a.numel()
        same_ours += int((moved_ours == 0).sum())
        same_theirs += int((moved_theirs == 0).sum())
        squares_ours += float(moved_ours.square().sum(dtype=torch.float64))
        squares_theirs += float(moved_theirs.square().sum(dtype=torch.float64))
        changes.append((name, a, b) if a.numel() <= 1 << 16 else (name, None, None))
    beyond = 0
    for name, a, b in changes:  # a second pass, now that the scale is known
        one = _read(left[name], name) if a is None else a
        other = _read(right[name], name) if b is None else b
        slack = level * change + (one.abs() * level if dtype != "float32" else 0.0)
        beyond += int(((one - other).abs() > slack).sum())
    return Agreement(
        case,
        tool,
        dtype,
        difference,
        change,
        beyond / total,
        sqrt(squares_theirs / squares_ours) if squares_ours else float("nan"),
        (same_theirs - same_ours) / total,
        random,
    )


def _places(files: Sequence[Path]) -> Mapping[str, Path]:
    found = {}
    for file in files:
        with safe_open(file, framework="pt") as handle:
            found.update(dict.fromkeys(handle.keys(), file))
    return found


def _read(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as handle:
        tensor: Tensor = handle.get_tensor(name).float()
    return tensor
