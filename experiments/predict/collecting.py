"""What a group's networks compute: logits, Jacobian products, smoothness."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.func import jvp

from experiments.measure.backbone import Readout, smoothness
from experiments.measure.function_space import GroupStatistics
from experiments.predict_group import Group, Progress
from merging.flat import FlatSpace
from theory.errors import MergeboundError
from theory.function_space import Array

BATCH_VALUES = 2**22

SMOOTHNESS_IMAGES = 32


def image_batches(group: Group, j: int) -> Iterator[Tensor]:
    values = group.form.channels * group.form.height * group.form.width
    yield from torch.split(group.data[j].split.images, max(1, min(256, BATCH_VALUES // values)))


def logits_at(group: Group, vector: Tensor, j: int) -> Array:
    """h_j at the coordinates ``vector``, (n, C): one forward pass over task j's images, in batches."""
    with torch.no_grad():
        parts = [group.networks[j].call(vector, batch) for batch in image_batches(group, j)]
    return _wide(torch.cat(parts))


def product_at(group: Group, anchor: Tensor, direction: Tensor, j: int) -> Array:
    """J_j(anchor) direction, (n, C), in batches.

    Raises:
        MergeboundError: a layer of the network has no forward-mode derivative.
    """
    network = group.networks[j]
    try:
        with torch.no_grad():
            parts = [
                jvp(lambda v, x=batch: network.call(v, x), (anchor,), (direction,))[1]
                for batch in image_batches(group, j)
            ]
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise MergeboundError(
            f"--tangent: {group.architecture!r} has no forward-mode derivatives ({reason}); pass --no-tangent"
        ) from error
    return _wide(torch.cat(parts))


def _wide(tensor: Tensor) -> Array:
    return np.asarray(tensor.detach().double().numpy())


def collect_group(group: Group, tangent: bool, progress: Progress) -> GroupStatistics:
    """Logits of the base and of every expert on every task, and with ``tangent`` the products J_j(x_0) Delta_i."""
    n = group.size
    total, done = n * (n + 1) + (n * n if tangent else 0), 0
    base_logits, expert_logits, products = [], [], []
    for j in range(n):
        base_logits.append(logits_at(group, group.base, j))
        rows = []
        for vector in group.vectors:
            rows.append(logits_at(group, vector, j))
            done += 1
            progress(f"forward passes on {group.data_paths[j].name}", done, total)
        expert_logits.append(np.stack(rows))
        done += 1
        columns = []
        for vector in group.vectors if tangent else ():
            columns.append(product_at(group, group.base, vector - group.base, j))
            done += 1
            progress(f"Jacobian products on {group.data_paths[j].name}", done, total)
        if tangent:
            products.append(np.stack(columns))
        for what, values in (("the base", base_logits[-1]), *zip(group.names, expert_logits[-1], strict=True)):
            if not np.isfinite(values).all():
                raise MergeboundError(
                    f"{group.data_paths[j]}: the logits of {what} are not finite on these images; check --mean, --std "
                    "and the checkpoint"
                )
    gram = np.array([[_inner(group, i, k) for k in range(n)] for i in range(n)])
    labels = tuple(item.split.labels.numpy() for item in group.data)
    return GroupStatistics(labels, tuple(base_logits), tuple(expert_logits), tuple(products), (), gram)


def _inner(group: Group, i: int, k: int) -> float:
    a, b = group.vectors[i] - group.base, group.vectors[k] - group.base
    return float(torch.dot(a.double(), b.double()))


def measured_smoothness(group: Group, j: int, seed: int) -> float:
    """Largest Gauss-Newton eigenvalue of task j's loss in (coordinates, private tensors), at the base and at x_j."""
    network, own = group.networks[j], group.private[j]
    floating = {name: tensor for name, tensor in own.items() if tensor.is_floating_point()}
    heads = FlatSpace.of(floating)
    space = FlatSpace(
        network.space.names + heads.names,
        network.space.shapes + heads.shapes,
        network.space.offsets + tuple(offset + network.space.size for offset in heads.offsets[1:]),
        torch.float32,
    )
    constants = {name: v for name, v in network.constants.items() if name.removeprefix("model.") not in floating}
    joint = replace(network, space=space, constants=constants)
    tail = heads.flatten(floating) if floating else torch.zeros(0)
    some = group.data[j].split.images[: min(SMOOTHNESS_IMAGES, next(image_batches(group, j)).shape[0])]
    points = (group.base, group.vectors[j])
    return max(
        smoothness(joint, torch.cat((point, tail)), Readout(), some, iterations=4, seed=seed) for point in points
    )


def smoothness_of_tasks(group: Group, seed: int, progress: Progress) -> Array:
    values = []
    for j in range(group.size):
        try:
            values.append(measured_smoothness(group, j, seed))
        except (RuntimeError, NotImplementedError) as error:
            reason = str(error).partition("\n")[0]
            raise MergeboundError(
                f"--bound: the smoothness of {group.architecture!r} cannot be measured ({reason}); pass --no-bound"
            ) from error
        progress("smoothness", j + 1, group.size)
    return np.array(values)
