"""What a merge is once it has been checked: method, checkpoints, and every tensor's settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from merging.config import MergeSpec
from merging.keys import Harmonised
from merging.lazy import Spec, specs
from merging.method import Method
from merging.partition import Partition
from merging.remote_path import shown
from merging.settings import Resolved, Rule
from merging.types import StateDict
from theory.errors import MergeboundError

DTYPES: Mapping[str, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
"""Types that a merge can be stored in."""

Stage = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """A merge that has been checked as far as that is possible without reading weights.

    Attributes:
        spec: what was asked for.
        method: the method.
        states: checkpoints that fit together.
        settings: the method's settings and extras.
        coefficients: one per expert, in the order of ``spec.names``.
        rules: settings of some tensors.
        groups: the tensors that share settings, all of them together what the method acts on.
        aliases: tied tensors, alias to canonical name; merged once.
        paths: name to path, ``"base"`` included.
        hashes: SHA-256 of files that had to be known already.
    """

    spec: MergeSpec
    method: Method
    states: Harmonised
    settings: Mapping[str, Any]
    coefficients: tuple[Any, ...] | None
    rules: tuple[Rule, ...]
    groups: tuple[Resolved, ...]
    aliases: Mapping[str, str]
    paths: Mapping[str, Path]
    hashes: Mapping[Path, str]

    @property
    def inputs(self) -> tuple[StateDict, ...]:
        """What is read: the base, if there is one, and the experts."""
        base = () if self.spec.base is None else (self.states.base,)
        return (*base, *self.states.experts.values())

    @property
    def parts(self) -> Partition:
        """Which tensors are merged."""
        return self.states.parts

    @property
    def specs(self) -> dict[str, Spec]:
        """Shape and type of every tensor of the result that is known beforehand."""
        known = {**specs(self.states.carried), **specs(self.states.base)}
        donor = self.spec.for_expert or self.spec.private_from
        if donor is not None:
            found = specs(self.states.experts[donor])
            known = {n: s for n, s in known.items() if not self.parts.is_private(n) or n in found}
            known |= {name: spec for name, spec in found.items() if self.parts.is_private(name)}
        return {name: _stored(spec, self.spec.dtype) for name, spec in known.items()}


def _stored(spec: Spec, dtype: str | None) -> Spec:
    return replace(spec, dtype=DTYPES[dtype]) if dtype is not None and spec.floating else spec


def ordered(coefficients: Any, names: Sequence[str]) -> tuple[Any, ...] | None:
    if coefficients is None:
        return None
    if isinstance(coefficients, Mapping):
        return tuple(coefficients[name] for name in names)
    return tuple(coefficients)


@contextmanager
def naming(paths: Mapping[str, Path]) -> Iterator[None]:
    """Errors that begin with an expert's name begin with its path."""
    try:
        yield
    except MergeboundError as error:
        who, colon, rest = str(error).partition(": ")
        if colon and who in paths:
            raise type(error)(f"{shown(paths[who])}: {rest}") from None
        raise
