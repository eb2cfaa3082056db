"""A tiny base with three experts in float64, and what was collected of them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from experiments.measure.backbone import Backbone
from experiments.measure.predictors import KINDS, FieldStatistics, collect_fields, point_at
from experiments.measure.subject import Subject
from experiments.tasks.types import Split
from merging.flat import FlatSpace
from merging.merge import flat_space
from merging.partition import partition
from theory.function_space import Array

torch.set_num_threads(1)
IMAGES, EXPERTS = 5, 3


class Net(nn.Module):
    """Two layers and a private head on 6 inputs; without activation the logits are quadratic in the two layers."""

    def __init__(self, smooth: bool, norm: bool = False) -> None:
        super().__init__()
        self.one = nn.Linear(6, 4)
        self.norm = nn.BatchNorm1d(4) if norm else nn.Identity()
        self.act = nn.Tanh() if smooth else nn.Identity()
        self.two = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def get_classifier(self) -> nn.Linear:
        return self.head

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.head(self.two(self.act(self.norm(self.one(images.flatten(1))))))
        return out


@cache
def subject(smooth: bool = False, norm: bool = False, experts: int = EXPERTS) -> Subject:
    torch.manual_seed(0)
    model = Net(smooth, norm).double().eval()
    base = {n: t.clone() for n, t in model.state_dict().items()}
    parts = partition(base, private=("head.*",))
    layout = flat_space(base, parts)
    space = FlatSpace(layout.names, layout.shapes, layout.offsets, torch.float64)
    whole = Backbone.of(model, base, shared_head=True)
    fixed = {f"model.{n}": base[n] for n in parts.constants}
    x0 = space.flatten(base)
    heads = [{n: torch.randn_like(base[n]) for n in ("head.weight", "head.bias")} for _ in range(experts)]
    splits = [
        Split(torch.randn(IMAGES, 1, 2, 3, dtype=torch.float64), torch.randint(0, 3, (IMAGES,)), np.arange(IMAGES))
        for _ in range(experts)
    ]
    return Subject(
        names=tuple(f"e{i}" for i in range(experts)),
        tasks=tuple(f"t{i}" for i in range(experts)),
        architecture="net",
        model=model,
        networks=tuple(
            replace(whole, space=space, partition=parts, constants=fixed | {f"model.{n}": t for n, t in h.items()})
            for h in heads
        ),
        base=x0,
        vectors=x0 + 0.3 * torch.randn(experts, x0.numel(), dtype=torch.float64).abs(),
        heads=tuple(heads),
        calibration=tuple(splits),
    )


@cache
def collected(smooth: bool = False, by: str = "all") -> FieldStatistics:
    return collect_fields(subject(smooth), kinds=tuple(KINDS), by=by, seed=7)


def true_logits(s: Subject, j: int, alpha: Array) -> Array:
    return s.networks[j].features(point_at(s, alpha), s.calibration[j].images).numpy()
