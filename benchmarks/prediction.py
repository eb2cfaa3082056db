"""What a prediction costs against evaluating the merge: seconds, ratio, and from how many coefficients on it pays.

Experts are the base plus seeded noise (timing does not depend on training).  Collection, pricing and evaluation take
turns (A B C A B C ...), one thread, medians.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # the packages first, not `merging.py` beside this file
    here, root = Path(__file__).resolve().parent, Path(__file__).resolve().parents[1]
    sys.path[:] = [str(root), *(entry for entry in sys.path if not entry or Path(entry).resolve() != here)]

import numpy as np
import torch
from torch import Tensor

from experiments.measure.backbone import Backbone, Readout
from experiments.measure.function_space import GroupStatistics, collect, sweep
from experiments.models import build_model

IMAGES, ROUNDS, MANY = 64, 5, 256


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@dataclass(frozen=True)
class Case:
    """One network and N experts with their images."""

    backbone: Backbone
    base: Tensor
    head: Readout
    experts: list[Tensor]
    images: list[Tensor]
    labels: list[Tensor]
    alphas: np.ndarray

    def collect(self, tangents: bool) -> GroupStatistics:
        heads = [self.head] * len(self.experts)
        return collect(
            self.backbone,
            self.base,
            self.experts,
            heads,
            self.images,
            self.labels,
            base_tangent=tangents,
            own_tangent=False,
        )

    def evaluate(self) -> None:
        merged = torch.stack(self.experts).mean(dim=0)
        for x in self.images:
            self.head.logits(self.backbone.features(merged, x))


def build(architecture: str, size: int) -> Case:
    model = build_model(architecture)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    backbone = Backbone.of(model, state)
    base, generator = backbone.vector(state), torch.Generator().manual_seed(0)
    return Case(
        backbone,
        base,
        backbone.readout(state),
        [base + 0.01 * torch.randn(base.shape, generator=generator) for _ in range(size)],
        [torch.randn(IMAGES, 1, 8, 8, generator=generator) for _ in range(size)],
        [torch.randint(0, 10, (IMAGES,), generator=generator) for _ in range(size)],
        np.random.default_rng(0).dirichlet(np.ones(size), MANY),
    )


def time_case(case: Case, kind: str, tangents: bool) -> tuple[float, float, float]:
    """Median seconds to collect, to price one coefficient vector, and to form and evaluate one merge."""
    stats = case.collect(tangents)
    rounds = [
        (
            seconds(lambda: case.collect(tangents)),
            seconds(lambda: sweep(stats, case.alphas, [kind])) / MANY,
            seconds(case.evaluate),
        )
        for _ in range(ROUNDS)
    ]
    collecting, pricing, evaluating = (statistics.median(column) for column in zip(*rounds, strict=True))
    return collecting, pricing, evaluating


def main() -> None:
    torch.set_num_threads(1)
    print("network     N predictor      collect s  price 1 s  evaluate s  pays from")
    for architecture in ("vit", "resnet_gn"):
        for size in (2, 4, 8):
            case = build(architecture, size)
            for kind, tangents in (("secant", False), ("second_order", True)):
                collecting, pricing, evaluating = time_case(case, kind, tangents)
                pays = f"{collecting / (evaluating - pricing):.0f}" if evaluating > pricing else "never"
                costs = f"{collecting:>12.4f} {pricing:>10.5f} {evaluating:>11.4f} {pays:>10}"
                print(f"{architecture:<10} {size:>2} {kind:<12} {costs}")


if __name__ == "__main__":
    main()
