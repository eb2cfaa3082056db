"""Update rules on one flat vector of parameters, as theory.md writes them: the learning rate outside the buffer.

A rule is a function ``update(x, gradient, rate)`` that changes ``x`` in place; its buffers live as long as it does.
Weight decay of :func:`heavy_ball` is coupled (the caller adds omega x to the gradient), that of :func:`adamw` is
decoupled.  Tests hold each of them against ``torch.optim`` in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Update = Callable[[Tensor, Tensor, float], None]
"""``update(x, gradient, rate)`` moves x; all vectors have one shape."""

_CLIP_EPSILON = 1e-6
"""Added to the norm that divides, as ``torch.nn.utils.clip_grad_norm_`` does."""
_LEAST_NORM = 1e-12
"""A gradient shorter than this gives a shorter ascent step than rho, and a zero gradient none."""


def heavy_ball(like: Tensor, momentum: float, *, nesterov: bool = False) -> Update:
    """SGD with momentum: v <- beta v + g, x <- x - eta v; Nesterov's form: x <- x - eta (g + beta v).

    Both are ``torch.optim.SGD``'s with dampening 0 (Sutskever et al., ICML 2013, with eta outside the buffer).
    """
    buffer = torch.zeros_like(like)

    def update(x: Tensor, gradient: Tensor, rate: float) -> None:
        buffer.mul_(momentum).add_(gradient)
        x.sub_(torch.add(gradient, buffer, alpha=momentum) if nesterov else buffer, alpha=rate)

    return update


def adamw(like: Tensor, beta1: float, beta2: float, epsilon: float, weight_decay: float) -> Update:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101, as ``torch.optim.AdamW``), at step t = 1, 2, ...

        x <- (1 - eta omega) x,   m <- beta1 m + (1 - beta1) g,   s <- beta2 s + (1 - beta2) g^2,
        x <- x - eta m / (1 - beta1^t) / (sqrt(s / (1 - beta2^t)) + epsilon)

    eta is the scheduled learning rate in both places.
    """
    mean, square = torch.zeros_like(like), torch.zeros_like(like)
    steps = 0

    def update(x: Tensor, gradient: Tensor, rate: float) -> None:
        nonlocal steps
        steps += 1
        x.mul_(1.0 - rate * weight_decay)
        mean.lerp_(gradient, 1.0 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
        divisor = square.sqrt().div_(math.sqrt(1.0 - beta2**steps)).add_(epsilon)
        x.addcdiv_(mean, divisor, value=-rate / (1.0 - beta1**steps))

    return update


def ascent(gradient: Tensor, radius: float) -> Tensor:
    """SAM's step to the worst neighbour, rho g / ||g||, over all trained parameters together.

    Foret, Kleiner, Mobahi and Neyshabur, arXiv 2010.01412, algorithm 1.  The gradient is that of the batch loss alone:
    weight decay does not steer the ascent.
    """
    return gradient * (radius / max(float(gradient.norm()), _LEAST_NORM))


def clip_factor(gradient: Tensor, largest: float) -> float:
    """What a gradient is multiplied by so that its norm is at most ``largest``: min(1, largest / (||g|| + 1e-6)).

    As ``torch.nn.utils.clip_grad_norm_`` on all trained parameters.
    """
    return min(1.0, largest / (float(gradient.norm()) + _CLIP_EPSILON))
