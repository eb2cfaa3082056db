"""The engine of compiled kernels, for processors."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from experiments.finetune.cohort import kernels
from experiments.finetune.cohort.chain import Chain
from experiments.finetune.cohort.feeding import Block


class Compiled:
    """Weights and buffers of M experts, trained by :func:`experiments.finetune.cohort.kernels.steps`.

    Args:
        chain: the network.
        x: (M, size) weights on the processor, trained in place.
        rule: ``SGD``, ``NESTEROV`` or ``ADAMW`` of the kernels.
        lo, hi: columns that are trained.
    """

    def __init__(self, chain: Chain, x: Tensor, rule: int, lo: int, hi: int) -> None:
        self.x = x
        self._x = x.numpy()
        self._v = np.zeros_like(self._x)
        self._square = np.zeros_like(self._x if rule == kernels.ADAMW else self._x[:, :1])
        self._rule, self._lo, self._hi = rule, lo, hi
        places = np.cumsum([0, *(layer.inputs for layer in chain.layers)])
        self._layers = np.array(
            [
                [layer.inputs, layer.outputs, layer.start, layer.bias_start, layer.activation, place]
                for layer, place in zip(chain.layers, places[:-1], strict=True)
            ],
            dtype=np.int64,
        )

    def run(
        self, block: Block, rates: np.ndarray, powers: np.ndarray, numbers: np.ndarray, alive: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """See :class:`experiments.finetune.cohort.written.Engine`."""
        from threadpoolctl import threadpool_limits

        active, length, _ = block.index.shape
        log = np.zeros((active, length, kernels.ENTRIES))
        good = np.zeros(active, dtype=np.int64)
        dtype = self._x.dtype
        table, labels = np.ascontiguousarray(block.table.numpy()), np.ascontiguousarray(block.labels.numpy())
        index, counts = np.ascontiguousarray(block.index), np.ascontiguousarray(block.counts)
        rates, powers, numbers = (np.ascontiguousarray(each, dtype=dtype) for each in (rates, powers, numbers))
        with threadpool_limits(1, user_api="blas"):
            for m in np.flatnonzero(alive):
                mine = (self._x[m], self._v[m], self._square[m])
                kept = [each.copy() for each in mine]
                seen = (table, labels, index[m], counts[m], rates[m], powers[m], numbers[m], self._layers)
                rule = (self._rule, self._lo, self._hi)
                good[m] = kernels.steps(*mine, *seen, *rule, length, log[m])
                if good[m] < length:  # once more, to where it was finite
                    for now, before in zip(mine, kept, strict=True):
                        now[:] = before
                    kernels.steps(*mine, *seen, *rule, good[m], log[m])
        return log, good
