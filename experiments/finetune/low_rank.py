"""Low-rank updates of a backbone's matrices: W = W_0 + B A with B = 0 at the start (LoRA).

Hu et al., arXiv 2106.09685.  Every two-dimensional parameter of the backbone and every kernel of a convolution, seen
as a matrix (outputs, everything else), has factors B (outputs, r) and A (r, rest), r = min(rank, both sides).  There is
no further scale: LoRA's alpha / r is 1 here.  Biases, norms and embeddings of other shapes are frozen.  What is stored
of a run is the whole W, so that merging sees an ordinary checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from theory.errors import MergeboundError

_FACTORS = 0x10AA
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Factors:
    """The update of one matrix: ``up`` B (outputs, r) and ``down`` A (r, rest), trained; ``frozen`` W_0."""

    frozen: Tensor
    up: nn.Parameter
    down: nn.Parameter

    def merged(self) -> Tensor:
        """W_0 + B A in the shape of W_0."""
        return self.frozen + (self.up @ self.down).view_as(self.frozen)


def matrices(model: nn.Module, head: Iterable[str]) -> tuple[str, ...]:
    """Names of the backbone's matrices, in the order of ``named_parameters``: those that get an update.

    Args:
        head: names of the head's tensors.
    """
    own = set(head)
    kernels = {id(m.weight) for m in model.modules() if isinstance(m, _CONVOLUTIONS)}
    return tuple(n for n, p in model.named_parameters() if n not in own and (p.ndim == 2 or id(p) in kernels))


def low_rank(model: nn.Module, head: Iterable[str], rank: int, seed: int) -> Mapping[str, Factors]:
    """Factors of every matrix of the backbone, by name.

    A is uniform within 1 / sqrt(rest) (``kaiming_uniform_`` with a = sqrt(5), as the authors' code has it), from
    ``default_rng([seed, 0x10AA])``, drawn in float64 one matrix after the other; B is zero.

    Raises:
        MergeboundError: the backbone has no matrix.
    """
    rng = np.random.default_rng([seed, _FACTORS])
    parameters = dict(model.named_parameters())
    found: dict[str, Factors] = {}
    for name in matrices(model, head):
        weight = parameters[name].detach()
        outputs, rest = weight.shape[0], weight[0].numel()
        r = min(rank, outputs, rest)
        drawn = torch.from_numpy(rng.uniform(-1.0, 1.0, (r, rest)) / math.sqrt(rest)).to(weight)
        found[name] = Factors(weight, nn.Parameter(weight.new_zeros(outputs, r)), nn.Parameter(drawn))
    if not found:
        raise MergeboundError(
            f"trained = low_rank: {type(model).__name__} has no matrix outside its head; use trained = head"
        )
    return found
