"""Names for the two mappings that everything in :mod:`merging` is about."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from torch import Tensor

StateDict: TypeAlias = Mapping[str, Tensor]
"""Tensor name to tensor, as ``module.state_dict()`` returns it."""

TaskVector: TypeAlias = Mapping[str, Tensor]
"""Tensor name to ``x_i - x_0``, over the tensors that are merged."""
