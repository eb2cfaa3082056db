"""Passes of a network: values, Jacobian products and second directional derivatives of its logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vmap

from experiments.measure.backbone import Backbone

STEP = 0.05
"""Default step of finite differences, in units of the direction."""


@torch.no_grad()
def values(network: Backbone, points: Tensor, images: Tensor) -> Tensor:
    """Logits at each row of ``points`` (D, P), one point after the other: (D, n, C)."""
    return torch.stack([network.call(point, images) for point in points])


@torch.no_grad()
def products(network: Backbone, point: Tensor, directions: Tensor, images: Tensor) -> Tensor:
    """J(x) d for each row d of ``directions`` (D, P), all in one pass: (D, n, C)."""

    def one(direction: Tensor) -> Tensor:
        out: tuple[Any, ...] = jvp(lambda v: network.call(v, images), (point,), (direction,))
        product: Tensor = out[1]
        return product

    found: Tensor = vmap(one)(directions)
    return found


@torch.no_grad()
def second_products(network: Backbone, point: Tensor, first: Tensor, other: Tensor, images: Tensor) -> Tensor:
    """D^2 h(x)[d, e] for the rows d of ``first`` and e of ``other``, (D, P) each, forward over forward: (D, n, C)."""

    def one(d: Tensor, e: Tensor) -> Tensor:
        def slope(v: Tensor) -> Tensor:
            inner: tuple[Any, ...] = jvp(lambda w: network.call(w, images), (v,), (e,))
            first_order: Tensor = inner[1]
            return first_order

        outer: tuple[Any, ...] = jvp(slope, (point,), (d,))
        second_order: Tensor = outer[1]
        return second_order

    found: Tensor = vmap(one)(first, other)
    return found


@torch.no_grad()
def second_differences(
    network: Backbone, point: Tensor, first: Tensor, other: Tensor, images: Tensor, step: float = STEP
) -> tuple[Tensor, Tensor]:
    """The same by central differences of Jacobian products, with its error.

    Returns:
        D^2 h(x)[d, e], (D, n, C), from steps ``step`` and ``2 step`` extrapolated to zero, and by how much the
        extrapolation changed it: the size of its error.
    """

    def central(t: float) -> Tensor:
        rows = [
            products(network, point + t * d, e[None], images) - products(network, point - t * d, e[None], images)
            for d, e in zip(first, other, strict=True)
        ]
        return torch.cat(rows) / (2.0 * t)

    near, far = central(step), central(2.0 * step)
    correction = (near - far) / 3.0
    return near + correction, correction.abs()
