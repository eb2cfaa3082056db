"""Running statistics of BatchNorm at points between and beyond networks."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from experiments.measure.backbone import EvaluationBatchNorm
from experiments.measure.subject import Subject
from merging.batchnorm import reestimate_batchnorm
from merging.partition import is_variance


def clamped(subject: Subject, vector: Tensor) -> Tensor:
    """The point with negative running variances set to zero; the same tensor where there are none."""
    pieces = [piece for name, piece in subject.networks[0].space.segments() if is_variance(name)]
    if not any(bool((vector[piece] < 0).any()) for piece in pieces):
        return vector
    out = vector.clone()
    for piece in pieces:
        out[piece] = out[piece].clamp(min=0.0)
    return out


def reestimated(subject: Subject, vector: Tensor, task: int | None = None) -> Tensor:
    """The point with BatchNorm's statistics of the calibration images: one batch per task, or one task's alone.

    Source: Izmailov et al. 2018 (arXiv:1803.05407), section 3.2, as :func:`merging.batchnorm.reestimate_batchnorm`.
    """
    space = subject.networks[0].space
    own = subject.model.state_dict()
    pieces = space.unflatten(vector)
    fitting = {name: tensor for name, tensor in pieces.items() if own[name].shape == tensor.shape}
    chosen = subject.calibration if task is None else (subject.calibration[task],)
    found = reestimate_batchnorm(
        with_batchnorm(subject.model).to(vector.dtype), {**own, **fitting}, [split.images for split in chosen]
    )
    out = vector.clone()
    for name, piece in space.segments():
        if name in subject.networks[0].partition.buffers:
            out[piece] = found[name].reshape(-1).to(out.dtype)
    return out


def with_batchnorm(model: nn.Module) -> nn.Module:
    """A copy in which BatchNorm written as its affine map (of subjects from checkpoints) is BatchNorm again."""
    twin = copy.deepcopy(model)
    for module in list(twin.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, EvaluationBatchNorm):
                setattr(module, name, _Norm(child))
    return twin


class _Norm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm of inputs of any shape, with what timm puts behind it."""

    def __init__(self, source: EvaluationBatchNorm) -> None:
        super().__init__(len(source.running_mean), eps=source.eps, affine=source.weight is not None)
        self.to(source.running_mean.dtype)
        self.load_state_dict(source.state_dict(), strict=False)
        self.drop, self.act = source.drop, source.act

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = self.act(self.drop(super().forward(input)))
        return out
