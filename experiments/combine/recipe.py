"""How groups are merged and measured: a method with its settings, and what is evaluated; both name stored rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from experiments.combine.groups import Group, Member
from experiments.spec import NUMERICS_VERSION
from merging.errors import MethodError
from merging.method import Method
from merging.registry import get
from theory.errors import MergeboundError


@dataclass(frozen=True)
class MergeMethod:
    """A merging method with its settings.

    Attributes:
        name: as :func:`merging.registry.methods` lists it.
        settings: of the method; the others have their defaults.
        coefficients: per expert in the order of tasks, or one for every expert; for methods that take them.
        seed: for methods with random masks.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    coefficients: tuple[float, ...] | float | None = None
    seed: int = 0

    @property
    def method(self) -> Method:
        """The method itself."""
        return get(self.name)

    @property
    def filled(self) -> dict[str, Any]:
        """Settings with their defaults.

        Raises:
            MethodError: an unknown setting, or one outside its domain.
        """
        return self.method.settings(self.settings)

    @property
    def used_seed(self) -> int:
        """The seed; 0 where the method draws nothing."""
        return 0 if self.method.deterministic else self.seed

    @property
    def label(self) -> str:
        """The method and the settings that were given, as text."""
        given = [f"{name}={value}" for name, value in sorted(self.settings.items())]
        if self.coefficients is not None:
            given.append(f"coefficients={self.coefficients}")
        return f"{self.name}({', '.join(given)})" if given else self.name

    def for_size(self, size: int) -> tuple[float, ...] | None:
        """One coefficient per expert of a group; ``None`` without coefficients."""
        if self.coefficients is None:
            return None
        if isinstance(self.coefficients, int | float):
            return (float(self.coefficients),) * size
        return tuple(float(value) for value in self.coefficients)

    def check(self, sizes: Iterable[int]) -> None:
        """Everything that can be refused before a checkpoint is read.

        Raises:
            MergeboundError: an unknown method or setting; a method that needs data or another number of experts.
        """
        method = self.method
        _ = self.filled
        if method.needs_data or "evaluate" in method.extras:
            raise MethodError(
                f"method '{self.name}' needs data beyond the checkpoints; choose one without, or merge single groups "
                "with `mergebound collect` and `mergebound merge`"
            )
        least, most = method.experts
        for size in sizes:
            if size < least or (most is not None and size > most):
                many = f"{least} or more" if most is None else f"{least}" if least == most else f"{least} to {most}"
                raise MethodError(f"method '{self.name}' merges {many} experts, not {size}; change the sizes")
            weights = self.for_size(size)
            if weights is not None and len(weights) != size:
                raise MethodError(
                    f"method '{self.name}': {len(weights)} coefficients for groups of {size}; give one per expert, or "
                    "one for all"
                )
        if self.coefficients is None and method.coefficients == "required":
            raise MethodError(f"method '{self.name}' needs coefficients; give one per expert, or one for all")
        if self.coefficients is not None and method.coefficients == "none":
            raise MethodError(f"method '{self.name}' takes no coefficients; leave them out")


@dataclass(frozen=True)
class Evaluate:
    """What is measured on a merge.

    Attributes:
        batch_size: test images in a forward pass.
        images: of every test set, drawn by the seed of its split; ``None`` for all.
        batchnorm: running statistics ``merged`` as the method says, or ``reestimated`` on calibration images.
        calibration: validation images of each task of the group for ``reestimated``, one batch per task.
        fast: use the fastest path that is close enough (:mod:`experiments.evaluate.fast`) instead of plain float32.
        bins: of the calibration error.
    """

    batch_size: int = 256
    images: int | None = None
    batchnorm: Literal["merged", "reestimated"] = "merged"
    calibration: int = 256
    fast: bool = False
    bins: int = 15

    def check(self) -> None:
        """Refuse numbers that cannot be.

        Raises:
            MergeboundError: names the field.
        """
        for name in ("batch_size", "calibration", "bins"):
            if getattr(self, name) < 1:
                raise MergeboundError(f"{name} = {getattr(self, name)}: give 1 or more")
        if self.images is not None and self.images < 1:
            raise MergeboundError(f"images = {self.images}: give 1 or more, or leave it out for all test images")
        if self.batchnorm not in ("merged", "reestimated"):
            raise MergeboundError(f"batchnorm = {self.batchnorm!r}: choose merged or reestimated")

    @property
    def text(self) -> str:
        """Canonical JSON; calibration images count only where they are used."""
        content = asdict(self)
        if self.batchnorm == "merged":
            del content["calibration"]
        return json.dumps(content, sort_keys=True)


def merge_key(group: Group, method: MergeMethod, evaluation: Evaluate) -> str:
    """SHA-256 that names one measured merge: experts and splits, method with all settings, evaluation, numerics."""
    content = {
        "numerics": NUMERICS_VERSION,
        "group": group.digest,
        "method": method.name,
        "settings": json.dumps(method.filled, sort_keys=True, default=str),
        "coefficients": method.for_size(len(group.members)),
        "seed": method.used_seed,
        "evaluation": evaluation.text,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def reference_key(member: Member, base: str, evaluation: Evaluate) -> str:
    """SHA-256 that names the measurement of one expert and of the base through its head.

    An expert keeps its own BatchNorm statistics, so how merges come by theirs does not count.
    """
    content = json.loads(evaluation.text)
    for name in ("batchnorm", "calibration"):
        content.pop(name, None)
    known = ["reference", NUMERICS_VERSION, base, member.task, member.split, member.run, member.step, content]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def as_methods(methods: Sequence[str | MergeMethod]) -> tuple[MergeMethod, ...]:
    """Methods by name, or with settings.

    Raises:
        MergeboundError: none, or one twice.
    """
    found = tuple(MergeMethod(one) if isinstance(one, str) else one for one in methods)
    if not found:
        raise MergeboundError("no method is given; name at least one (see mergebound methods)")
    twice = next((one.label for k, one in enumerate(found) if one in found[:k]), None)
    if twice is not None:
        raise MergeboundError(f"method {twice} is given twice; name it once")
    return found
