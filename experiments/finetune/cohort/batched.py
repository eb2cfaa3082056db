"""The engine of batched matrix products: one step of all experts at once, on any device, without autograd."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from experiments.finetune.cohort.chain import GELU, RELU, TANH, Chain
from experiments.finetune.cohort.feeding import Block
from experiments.finetune.cohort.kernels import ADAMW, ENTRIES, NESTEROV


class Batched:
    """Weights and buffers of M experts; arguments as of :class:`experiments.finetune.cohort.compiled.Compiled`."""

    def __init__(self, chain: Chain, x: Tensor, rule: int, lo: int, hi: int) -> None:
        self.x = x
        self._chain, self._rule, self._lo, self._hi = chain, rule, lo, hi
        self._v = torch.zeros_like(x)
        self._square = torch.zeros_like(x) if rule == ADAMW else None

    @torch.no_grad()
    def run(
        self, block: Block, rates: np.ndarray, powers: np.ndarray, numbers: np.ndarray, alive: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """See :class:`experiments.finetune.cohort.written.Engine`."""
        active, length = block.counts.shape
        buffers = [t[:active] for t in (self.x, self._v, self._square) if t is not None]
        kept = [t.clone() for t in buffers]
        steps = _Steps(self._chain, buffers, self._rule, self._lo, self._hi, block, rates, powers, numbers)
        for step in range(length):
            steps.step(step)
        log = steps.log.cpu().numpy()
        finite = np.isfinite(log).all(axis=(1, 2)) & torch.isfinite(self.x[:active]).all(1).cpu().numpy()
        good = np.where(alive, length, 0)
        if (finite | ~alive).all():
            return np.where(alive[:, None, None], log, 0.0), good
        for now, before in zip(buffers, kept, strict=True):  # the same again, with a look after every step
            now.copy_(before)
        running = torch.as_tensor(alive, device=self.x.device).clone()
        for step in range(length):
            previous = [t.clone() for t in buffers]
            steps.step(step)
            sound = torch.isfinite(steps.log[:, step]).all(1) & torch.isfinite(buffers[0]).all(1)
            for m in torch.nonzero(running & ~sound)[:, 0].tolist():
                good[m] = step
                kept[0][m] = previous[0][m]
                running[m] = False
            for t in buffers:  # those that are over rest at zero, where all numbers are finite
                t[~running] = 0
        buffers[0][~running] = kept[0][~running]
        return np.where(alive[:, None, None], steps.log.cpu().numpy(), 0.0), good


class _Steps:
    """One block: views, work space and constants made once."""

    def __init__(
        self,
        chain: Chain,
        buffers: list[Tensor],
        rule: int,
        lo: int,
        hi: int,
        block: Block,
        rates: np.ndarray,
        powers: np.ndarray,
        numbers: np.ndarray,
    ) -> None:
        self.x, self.v = buffers[0], buffers[1]
        self.square = buffers[2] if len(buffers) > 2 else None
        self.rule, self.lo, self.hi = rule, lo, hi
        device, dtype = self.x.device, self.x.dtype
        active, length, width = block.index.shape
        self.layers = chain.layers
        self.shared = chain.shared
        self.first = len(chain.layers) - 1 if lo == chain.shared else 0
        self.table, self.labels = block.table, block.labels
        self.index = torch.from_numpy(np.ascontiguousarray(block.index.swapaxes(0, 1))).to(device)
        count = torch.from_numpy(np.ascontiguousarray(block.counts.T)).to(device)
        inside = torch.arange(width, device=device) < count[..., None]
        self.weights = inside.to(dtype) / count[..., None]  # (steps, M, batch)

        def column(values: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(values)).to(device, dtype)[..., None]

        self.rates, self.first_power = column(rates.T), column(powers[:, :, 0].T)
        self.second_power = column(powers[:, :, 1].T)
        names = ("beta", "decay", "smoothing", "largest", "beta2", "epsilon", "apart", "radius")
        self.number = {name: column(numbers[:, k]) for k, name in enumerate(names)}
        self.has = {name: bool(numbers[:, k].any()) for k, name in enumerate(names)}
        self.log = torch.zeros(active, length, ENTRIES, dtype=torch.float64, device=device)
        self.gradient = torch.zeros_like(self.x)
        self.values = [torch.empty(active, width, layer.outputs, dtype=dtype, device=device) for layer in self.layers]
        self.inputs = [torch.empty_like(value) for value in self.values]  # before the activation
        self.errors = [torch.empty_like(value) for value in self.values]
        self.images = torch.empty(active, width, self.layers[0].inputs, dtype=dtype, device=device)

    def step(self, step: int) -> None:
        """One step of all experts."""
        number, g, lo, hi = self.number, self.gradient[:, self.lo : self.hi], self.lo, self.hi
        x, v = self.x[:, lo:hi], self.v[:, lo:hi]
        rows = self.index[step]
        torch.index_select(self.table, 0, rows.reshape(-1), out=self.images.view(-1, self.images.shape[2]))
        labels = self.labels[rows]
        loss = self._differentiate(labels, self.weights[step])
        if self.has["radius"]:
            here = x.clone()
            x.add_(g * (number["radius"] / torch.linalg.vector_norm(g, dim=1, keepdim=True).clamp_min(1e-12)))
            worst = self._differentiate(labels, self.weights[step])
            x.copy_(here)
            loss = torch.where(torch.isfinite(worst), loss, worst)
        self.log[:, step, 0] = loss
        clip = None
        if self.has["largest"]:
            self._norms(step, 1, torch.addcmul(g, x, number["decay"]))
            whole = torch.linalg.vector_norm(g, dim=1, keepdim=True)
            clip = (number["largest"] / (whole + 1e-6)).clamp_max(1.0)
            clip = torch.where(number["largest"] > 0, clip, torch.ones_like(clip))
            g.mul_(clip)
        if self.has["decay"]:
            g.addcmul_(x, number["decay"])
        self._norms(step, 4 if clip is not None else 1, g)
        if clip is not None:
            self.log[:, step, 3] = clip[:, 0]
        else:
            self.log[:, step, 3] = 1.0
            self.log[:, step, 4:6] = self.log[:, step, 1:3]
        self._update(step, x, v, g)

    def _norms(self, step: int, entry: int, g: Tensor) -> None:
        """Norms of the shared part and the head of a gradient by the trained columns."""
        cut = min(max(self.shared - self.lo, 0), self.hi - self.lo)
        if cut:
            self.log[:, step, entry] = torch.linalg.vector_norm(g[:, :cut], dim=1)
        if cut < g.shape[1]:
            self.log[:, step, entry + 1] = torch.linalg.vector_norm(g[:, cut:], dim=1)

    def _update(self, step: int, x: Tensor, v: Tensor, g: Tensor) -> None:
        number, rate = self.number, self.rates[step]
        if self.rule == ADAMW:
            assert self.square is not None
            square = self.square[:, self.lo : self.hi]
            x.mul_(1.0 - rate * number["apart"])
            v.lerp_(g, 1.0 - number["beta"])
            square.mul_(number["beta2"]).add_(g * g * (1.0 - number["beta2"]))
            divisor = square.sqrt().div_(self.second_power[step]).add_(number["epsilon"])
            x.sub_(v / divisor * (rate / self.first_power[step]))
            return
        if self.has["beta"]:
            v.mul_(number["beta"]).add_(g)
        else:
            v.copy_(g)
        x.addcmul_(torch.addcmul(g, v, number["beta"]) if self.rule == NESTEROV else v, -rate)

    def _differentiate(self, labels: Tensor, weights: Tensor) -> Tensor:
        """Losses (M,) at x; gradients are in ``self.gradient`` afterwards."""
        last = len(self.layers) - 1
        seen = self.images
        for l, layer in enumerate(self.layers):
            z = self.inputs[l] if l < last and layer.activation else self.values[l]
            matrix = self._matrix(self.x, l)
            if layer.bias:
                torch.baddbmm(self.x[:, None, layer.bias_start : layer.stop], seen, matrix, out=z)
            else:
                torch.bmm(seen, matrix, out=z)
            if l < last:
                self._activate(l, z)
                seen = self.values[l]
        error = self.errors[last]
        loss = self._loss(self.values[last], labels, weights, error)
        for l in range(last, self.first - 1, -1):
            below = self.images if l == 0 else self.values[l - 1]
            torch.bmm(below.transpose(1, 2), error, out=self._matrix(self.gradient, l))
            if self.layers[l].bias:
                torch.sum(error, 1, out=self.gradient[:, self.layers[l].bias_start : self.layers[l].stop])
            if l > self.first:
                torch.bmm(error, self._matrix(self.x, l).transpose(1, 2), out=self.errors[l - 1])
                error = self.errors[l - 1]
                self._descend(l - 1, error)
        return loss

    def _matrix(self, rows: Tensor, l: int) -> Tensor:
        layer = self.layers[l]
        return rows[:, layer.start : layer.start + layer.inputs * layer.outputs].view(
            *rows.shape[:-1], layer.inputs, layer.outputs
        )

    def _loss(self, logits: Tensor, labels: Tensor, weights: Tensor, error: Tensor) -> Tensor:
        classes = logits.shape[2]
        smoothing = self.number["smoothing"]
        logs = torch.log_softmax(logits, 2)
        at_label = logs.gather(2, labels[..., None])[..., 0]
        each = (
            -((1.0 - smoothing) * at_label + smoothing / classes * logs.sum(2)) if self.has["smoothing"] else -at_label
        )
        torch.exp(logs, out=error)
        if self.has["smoothing"]:
            error.sub_((smoothing / classes)[..., None])
        error.scatter_add_(2, labels[..., None], (smoothing - 1.0)[..., None].expand(*labels.shape, 1))
        error.mul_(weights[..., None])
        # a row behind a short batch is no sample: it must not make the loss infinite either
        return torch.where(weights > 0, each * weights, torch.zeros_like(each)).sum(1)

    def _activate(self, l: int, z: Tensor) -> None:
        kind, out = self.layers[l].activation, self.values[l]
        if kind == RELU:
            torch.clamp_min(z, 0, out=out)
        elif kind == GELU:
            torch.ops.aten.gelu.out(z, out=out)
        elif kind == TANH:
            torch.tanh(z, out=out)

    def _descend(self, l: int, error: Tensor) -> None:
        """From the error behind an activation to the error before it, in place."""
        kind = self.layers[l].activation
        if kind == RELU:
            torch.ops.aten.threshold_backward.grad_input(error, self.values[l], 0, grad_input=error)
        elif kind == GELU:
            torch.ops.aten.gelu_backward.grad_input(error, self.inputs[l], grad_input=error)
        elif kind == TANH:
            torch.ops.aten.tanh_backward.grad_input(error, self.values[l], grad_input=error)
