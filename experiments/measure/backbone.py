"""A network as a function of one flat parameter vector, with Jacobian products.

The merged coordinates x (shared parameters and BatchNorm running statistics) are one vector; features are what the
task's own linear head is applied to.  Forward-mode products do not pass through BatchNorm's running statistics nor
through fused attention kernels, so a copy of the model is used in which BatchNorm is its affine map in evaluation mode
(exactly the same function) and attention is written out.  LayerNorm is written out too: torch's own keeps its mean and
scale fixed in second derivatives that are taken forward over forward, and in forward-over-``jacrev`` Hessian products,
which are then wrong without a warning (checked against differences with torch 2.15; other normalisations are right).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp, vmap

from experiments.models import forward_backbone, head_prefix
from merging.flat import FlatSpace
from merging.merge import flat_space
from merging.partition import Partition, partition

CHUNK_IMAGES = 1024
CHUNK_DIRECTIONS = 16


class EvaluationBatchNorm(nn.Module):
    """BatchNorm in evaluation mode, differentiable in its running statistics (same tensors, same names)."""

    def __init__(self, source: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__()
        self.eps = float(source.eps)
        self.weight = source.weight
        self.bias = source.bias
        self.register_buffer("running_mean", source.running_mean)
        self.register_buffer("running_var", source.running_var)
        self.register_buffer("num_batches_tracked", source.num_batches_tracked)
        self.drop = getattr(source, "drop", nn.Identity())
        self.act = getattr(source, "act", nn.Identity())

    running_mean: Tensor
    running_var: Tensor

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1) + (1,) * (x.ndim - 2)
        scale = torch.rsqrt(self.running_var + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        shift = -self.running_mean * scale
        if self.bias is not None:
            shift = shift + self.bias
        out: Tensor = self.act(self.drop(x * scale.view(shape) + shift.view(shape)))
        return out


class WrittenLayerNorm(nn.Module):
    """LayerNorm from elementary operations (same tensors, same names), over the last dimensions or the channels."""

    def __init__(self, source: nn.LayerNorm, channels: bool) -> None:
        super().__init__()
        self.eps = float(source.eps)
        self.dims = (1,) if channels else tuple(range(-len(source.normalized_shape), 0))
        self.weight = source.weight
        self.bias = source.bias

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(dim=self.dims, keepdim=True)
        out = centred * torch.rsqrt(centred.square().mean(dim=self.dims, keepdim=True) + self.eps)
        shape = (-1,) + (1,) * (x.ndim - 2) if self.dims == (1,) else None
        for tensor, multiply in ((self.weight, True), (self.bias, False)):
            if tensor is not None:
                own = tensor if shape is None else tensor.view(shape)
                out = out * own if multiply else out + own
        return out


def _written(source: nn.LayerNorm) -> nn.Module:
    from timm.layers import LayerNorm, LayerNorm2d

    if isinstance(source, LayerNorm2d):
        return WrittenLayerNorm(source, channels=True)
    plain = type(source).forward in (nn.LayerNorm.forward, LayerNorm.forward)
    return WrittenLayerNorm(source, channels=False) if plain else source


def differentiable_copy(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode through which forward-mode products pass; tensor names are unchanged.

    Norms of other kinds than BatchNorm and LayerNorm are kept as they are.

    Raises:
        ValueError: a BatchNorm layer keeps no running statistics.
    """
    twin = copy.deepcopy(model).eval()
    for module in list(twin.modules()):
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]
        for name, child in list(module.named_children()):
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                if child.running_mean is None:
                    raise ValueError(f"{name}: BatchNorm without running statistics has no evaluation mode")
                setattr(module, name, EvaluationBatchNorm(child))
            elif isinstance(child, nn.LayerNorm):
                setattr(module, name, _written(child))
    return twin.requires_grad_(False)


class _Features(nn.Module):
    def __init__(self, model: nn.Module, pooled: bool) -> None:
        super().__init__()
        self.model = model
        self.pooled = pooled

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = forward_backbone(self.model, images) if self.pooled else self.model(images)
        return out


@dataclass(frozen=True)
class Readout:
    """What turns features into logits: a task's own linear head, or nothing when the head is merged too."""

    weight: Tensor | None = None
    bias: Tensor | None = None

    def logits(self, features: Tensor) -> Tensor:
        """(..., n, features) to (..., n, C)."""
        if self.weight is None:
            return features
        out = features @ self.weight.T
        return out if self.bias is None else out + self.bias

    def products(self, features: Tensor) -> Tensor:
        """The linear part alone, for Jacobian products."""
        return features if self.weight is None else features @ self.weight.T


@dataclass(frozen=True)
class Backbone:
    """Features as a function of the merged coordinates.

    Attributes:
        module: differentiable copy of the network.
        space: layout of the coordinates x in one vector of length P.
        partition: shared, private, buffer and constant tensors.
        constants: every tensor that is not a coordinate.
        head: prefix of the private head's tensors; empty if the head is shared.
    """

    module: nn.Module
    space: FlatSpace
    partition: Partition
    constants: Mapping[str, Tensor]
    head: str

    @classmethod
    def of(cls, model: nn.Module, base: Mapping[str, Tensor], *, shared_head: bool = False) -> Backbone:
        """Split ``model`` at its linear head; with ``shared_head`` the head is merged like everything else."""
        prefix = "" if shared_head else head_prefix(model)
        parts = partition(dict(base), private=(prefix + "*",) if prefix else ())
        twin = differentiable_copy(model)
        space = flat_space(dict(base), parts)
        coordinates = set(space.names)
        constants = {f"model.{name}": tensor.detach() for name, tensor in base.items() if name not in coordinates}
        return cls(_Features(twin, pooled=bool(prefix)), space, parts, constants, prefix)

    def vector(self, state: Mapping[str, Tensor]) -> Tensor:
        """The coordinates x of a checkpoint, (P,)."""
        return self.space.flatten(dict(state))

    def readout(self, state: Mapping[str, Tensor]) -> Readout:
        """The head of a checkpoint."""
        if not self.head:
            return Readout()
        return Readout(state[self.head + "weight"].detach(), state.get(self.head + "bias"))

    def call(self, vector: Tensor, images: Tensor) -> Tensor:
        """Features at the coordinates ``vector``; differentiable, can be vmapped."""
        named = {f"model.{name}": tensor for name, tensor in self._views(vector).items()}
        out: Tensor = functional_call(self.module, {**self.constants, **named}, (images,))
        return out

    def _views(self, vector: Tensor) -> dict[str, Tensor]:
        lengths = [b - a for a, b in zip(self.space.offsets, self.space.offsets[1:], strict=False)]
        pieces = torch.split(vector, lengths)
        return {name: p.view(s) for name, p, s in zip(self.space.names, pieces, self.space.shapes, strict=True)}

    @torch.no_grad()
    def features(self, vector: Tensor, images: Tensor) -> Tensor:
        """Features of n images, (n, d), in evaluation mode."""
        return torch.cat([self.call(vector, part) for part in torch.split(images, CHUNK_IMAGES)])

    @torch.no_grad()
    def products(self, vector: Tensor, directions: Tensor, images: Tensor) -> Tensor:
        """J(x) d for each row d of ``directions`` (D, P): (D, n, d)."""

        def one(direction: Tensor) -> Tensor:
            return jvp(lambda v: self.call(v, images), (vector,), (direction,))[1]  # type: ignore[no-any-return]

        parts = [vmap(one)(part) for part in torch.split(directions, CHUNK_DIRECTIONS)]
        return torch.cat(parts)

    @torch.no_grad()
    def products_at(self, vectors: Tensor, directions: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features and J(x_k) d_k for K points (K, P), directions (K, P) and image sets (K, n, ...): (K, n, d) each."""

        def one(vector: Tensor, direction: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
            features, product = jvp(lambda v: self.call(v, batch), (vector,), (direction,))[:2]
            return features, product

        chunks = (torch.split(t, CHUNK_DIRECTIONS) for t in (vectors, directions, images))
        parts = [vmap(one)(v, d, x) for v, d, x in zip(*chunks, strict=True)]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def smoothness(
    backbone: Backbone, vector: Tensor, readout: Readout, images: Tensor, *, iterations: int = 6, seed: int = 0
) -> float:
    """Largest Gauss-Newton eigenvalue of the mean cross-entropy in (coordinates, head), by power iteration.

    An estimate of the smoothness L at one point, from below (tier *estimated*).
    """
    found = smoothness_many(backbone, vector[None], (readout,), images[None], iterations=iterations, seed=seed)
    return float(found[0])


@torch.no_grad()
def smoothness_many(
    backbone: Backbone,
    vectors: Tensor,
    readouts: Sequence[Readout],
    images: Tensor,
    *,
    iterations: int = 6,
    seed: int = 0,
) -> Tensor:
    """:func:`smoothness` at K points at once.

    Args:
        vectors: (K, P).
        readouts: K heads of one shape.
        images: (K, n, channels, height, width), the n images of each point.

    Returns:
        (K,) estimates.
    """
    generator = torch.Generator().manual_seed(seed)
    points: tuple[Tensor, ...] = (vectors,)
    first = readouts[0]
    if first.weight is not None:
        weights = torch.stack([_head(r)[0] for r in readouts])
        points += (weights, torch.stack([_head(r)[1] for r in readouts]))
    start = tuple(torch.randn(p.shape[1:], generator=generator, dtype=p.dtype) for p in points)

    def one(batch: Tensor, *point: Tensor) -> Tensor:
        def logits(*parameters: Tensor) -> Tensor:
            features = backbone.call(parameters[0], batch)
            return features if len(parameters) == 1 else features @ parameters[1].T + parameters[2]

        direction, _ = _unit(start)
        out, pull = vjp(logits, *point)[:2]
        p = torch.softmax(out, dim=-1)
        value = torch.zeros((), dtype=out.dtype)
        for _ in range(iterations):
            change = jvp(logits, point, direction)[1]
            product = pull(p * (change - (p * change).sum(-1, keepdim=True)) / len(batch))
            direction, value = _unit(product)
        return value

    chunks = zip(*(torch.split(t, CHUNK_DIRECTIONS) for t in (images, *points)), strict=True)
    return torch.cat([vmap(one)(*chunk) for chunk in chunks])


def _head(readout: Readout) -> tuple[Tensor, Tensor]:
    assert readout.weight is not None
    bias = torch.zeros_like(readout.weight[:, 0]) if readout.bias is None else readout.bias
    return readout.weight, bias


def _unit(parts: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
    """Scale a tuple of tensors to joint norm one (zero stays zero); also the norm it had."""
    norm = torch.stack([part.square().sum() for part in parts]).sum().sqrt()
    return tuple(part / norm.clamp(min=1e-30) for part in parts), norm
