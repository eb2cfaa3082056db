"""Coupled runs of logistic regression and MLPs: all twins see the same batch, so the first layer is one product.

The matrices of M twins stand side by side as [inputs + 1, M, outputs] (the last line is the bias), and the batch X,
which they share, meets them in one product X W and one X' E: large ones, near the processor's peak, where a loop makes
M tiny ones.  A twin whose fresh sample is in the batch gets its own line of X W, and X' E the correction (x' - x) e'.
Layers above are batched products.  Updates are one compiled pass (:mod:`experiments.measure.twins.fused`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.finetune.cohort.chain import GELU, NOTHING, RELU, TANH, Chain, read_chain
from experiments.finetune.cohort.stack import DTYPES
from experiments.finetune.schedules import schedule
from experiments.grid.run_spec import RunSpec
from experiments.measure.twins.pairs import Batch
from experiments.measure.twins.stack import Snapshot
from theory.errors import MergeboundError

_CLIP_EPSILON = 1e-6
_LEAST_NORM = 1e-12


@dataclass
class _Tensor:
    """One tensor of M rows with gradient and buffers, as lines [lines, M columns] of which the first m count.

    Attributes:
        x, g: (lines, M, columns).
        buffers: of the optimizer, of that shape.
        start: of its numbers in a row of the chain.
        trained: whether it is.
    """

    x: Tensor
    g: Tensor
    buffers: list[Tensor]
    start: int
    trained: bool

    @property
    def count(self) -> int:
        """Numbers of one row."""
        return self.x.shape[0] * self.x.shape[2]


class ChainStack:
    """A chain of linear layers; an :class:`~.stack.Engine`.

    Args:
        run: hyperparameters that all rows share.
        network: one that :func:`~experiments.finetune.cohort.chain.read_chain` reads.
        start: full state dict x_0.
        device: where the images are.

    Raises:
        MergeboundError: another network, or what is not written out (bfloat16, low-rank factors).
    """

    name = "written"

    def __init__(self, run: RunSpec, network: nn.Module, start: Mapping[str, Tensor], device: torch.device) -> None:
        chain = read_chain(network)
        if isinstance(chain, str):
            raise MergeboundError(f"{run.architecture}: its backward pass is not written out: {chain}")
        if run.precision == "bfloat16" or run.trained == "low_rank":
            raise MergeboundError("twins: bfloat16 and low-rank updates are not written out; use float32 and full")
        self.run, self._chain, self._start = run, chain, start
        self.shared, self.size, self.dtype = chain.shared, chain.size, DTYPES[run.precision]
        self._x0 = chain.rows([start], self.dtype, device)[0]
        self._factor = schedule(run.schedule, run.steps, warm_up=run.warm_up)
        self._buffers = 2 if run.optimizer == "adamw" else int(run.momentum > 0)
        self._device = device
        self.row_bytes = self.size * (2 + self._buffers) * self.dtype.itemsize
        self._rows = 0
        self._tensors: list[_Tensor] = []

    def begin(self) -> Snapshot:
        """See :class:`~.stack.Engine`."""
        return Snapshot(self._x0.clone(), tuple(torch.zeros_like(self._x0) for _ in range(self._buffers)))

    def open(self, capacity: int) -> None:
        """See :class:`~.stack.Engine`."""
        self._rows, self._tensors = 0, []
        lo, hi = self._chain.trained(self.run.trained)

        def add(lines: int, columns: int, start: int) -> None:
            parts = [
                torch.zeros(lines, capacity, columns, dtype=self.dtype, device=self._device)
                for _ in range(2 + self._buffers)
            ]
            self._tensors.append(_Tensor(parts[0], parts[1], parts[2:], start, lo <= start < hi))

        for number, layer in enumerate(self._chain.layers):
            if number == 0:
                add(layer.inputs + bool(layer.bias), layer.outputs, layer.start)
                continue
            add(1, layer.inputs * layer.outputs, layer.start)
            if layer.bias:
                add(1, layer.outputs, layer.bias_start)
        self._places: list[tuple[int, int]] = []  # of each layer above the first: its matrix, its bias or -1
        place = 1
        for layer in self._chain.layers[1:]:
            self._places.append((place, place + 1 if layer.bias else -1))
            place += 2 if layer.bias else 1

    def join(self, snapshot: Snapshot, count: int) -> None:
        """See :class:`~.stack.Engine`."""
        rows = slice(self._rows, self._rows + count)
        for tensor in self._tensors:
            for mine, theirs in zip((tensor.x, *tensor.buffers), (snapshot.x, *snapshot.buffers), strict=True):
                part = theirs[tensor.start : tensor.start + tensor.count]
                mine[:, rows] = part.view(mine.shape[0], 1, mine.shape[2])
        self._rows += count

    def step(self, step: int, batch: Batch, *, loss: bool = False) -> Tensor | None:
        """See :class:`~.stack.Engine`."""
        run = self.run
        found = self._gradients(batch, loss)
        if run.optimizer == "sam":
            norm = self._norms().clamp(min=_LEAST_NORM)
            before = [tensor.x[:, : self._rows].clone() for tensor in self._tensors]
            for tensor in self._trained():
                tensor.x[:, : self._rows] += tensor.g[:, : self._rows] * (run.sam_radius / norm)[None, :, None]
            self._gradients(batch, False)
            for tensor, kept in zip(self._tensors, before, strict=True):
                tensor.x[:, : self._rows] = kept
        if run.clip_norm is not None:
            factors = (run.clip_norm / (self._norms() + _CLIP_EPSILON)).clamp(max=1.0)
            for tensor in self._trained():
                tensor.g[:, : self._rows] *= factors[None, :, None]
        rate = run.learning_rate * self._factor(step)
        for tensor in self._trained():
            self._update(tensor, rate, step + 1)
        return found

    def snapshot(self, row: int) -> Snapshot:
        """See :class:`~.stack.Engine`."""
        x, *buffers = (
            torch.cat([self._part(tensor, k)[:, row].reshape(-1) for tensor in self._tensors])
            for k in range(1 + self._buffers)
        )
        return Snapshot(x, tuple(buffers))

    def vectors(self) -> Tensor:
        """See :class:`~.stack.Engine`."""
        m = self._rows
        return torch.cat([tensor.x[:, :m].transpose(0, 1).reshape(m, -1) for tensor in self._tensors], dim=1)

    def vector(self, snapshot: Snapshot) -> Tensor:
        """See :class:`~.stack.Engine`."""
        return snapshot.x

    def state(self, snapshot: Snapshot, steps: int) -> dict[str, Tensor]:
        """See :class:`~.stack.Engine`."""
        return self._chain.state(snapshot.x, self._start)

    # --- one step ---

    def _gradients(self, batch: Batch, loss: bool) -> Tensor | None:
        """Gradients of all rows into ``g``; the first row's loss, if wanted."""
        chain, rows = self._chain, self._rows
        count, classes = len(batch.labels), chain.layers[-1].outputs
        targets = self._targets(torch.cat([batch.labels, batch.other_labels]), classes)
        below, logits, x, others = self._forward(batch, count, rows)
        last_first = len(chain.layers) == 1  # logits [b, M, C] then, else [M, b, C]
        errors = torch.softmax(logits, dim=-1)
        found = None
        if loss:
            one = logits[:, 0] if last_first else logits[0]
            own = targets[:count].clone()
            mine = batch.twins == 0
            own[batch.places[mine]] = targets[count:][mine]
            found = -(own * F.log_softmax(one, dim=-1)).sum(-1).mean()
        shift = targets[:count][batch.places] - targets[count:]
        if last_first:
            errors.sub_(targets[:count].unsqueeze(1))
            errors.index_put_((batch.places, batch.twins), shift, accumulate=True)
        else:
            errors.sub_(targets[:count])
            errors.index_put_((batch.twins, batch.places), shift, accumulate=True)
            errors = self._backward(errors, below, 1.0 / count)
        if self._tensors[0].trained:
            self._first_gradient(errors, x, others, batch, 1.0 / count)
        return found

    def _forward(self, batch: Batch, count: int, rows: int) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        """Inputs of the layers above the first ([M, b, .]), the logits, X and x' with a one where there is a bias."""
        chain = self._chain
        first, matrix = chain.layers[0], self._tensors[0].x
        x = _with_one(batch.images.reshape(count, -1).to(self.dtype), bool(first.bias))
        others = _with_one(batch.other_images.reshape(len(batch.twins), x.shape[1] - bool(first.bias)).to(self.dtype),
                           bool(first.bias))  # fmt: skip
        lines, _, columns = matrix.shape
        out = (x @ matrix.view(lines, -1)[:, : rows * columns]).view(count, rows, columns)
        if len(batch.twins):
            out[batch.places, batch.twins] = torch.einsum("sd,dso->so", others, matrix[:, batch.twins])
        self._slopes: list[Tensor] = []
        inputs: list[Tensor] = []
        if len(chain.layers) == 1:
            return inputs, out, x, others
        out = self._activate(out, first.activation).transpose(0, 1)
        for layer, (place, bias) in zip(chain.layers[1:], self._places, strict=True):
            inputs.append(out)
            weights = self._tensors[place].x[0, :rows].view(rows, layer.inputs, layer.outputs)
            if bias < 0:
                out = torch.bmm(out, weights)
            else:
                out = torch.baddbmm(self._tensors[bias].x[0, :rows].unsqueeze(1), out, weights)
            if layer.activation != NOTHING:
                out = self._activate(out, layer.activation)
        return inputs, out, x, others

    def _activate(self, z: Tensor, kind: int) -> Tensor:
        """a(z), perhaps in place; notes a'(z)."""
        if kind == RELU:
            z = z.relu_()
            self._slopes.append(z > 0)
        elif kind == TANH:
            z = z.tanh_()
            self._slopes.append(1 - z * z)
        elif kind == GELU:
            self._slopes.append(torch.ops.aten.gelu_backward(torch.ones_like(z), z))
            z = F.gelu(z)
        else:
            self._slopes.append(torch.ones_like(z))
        return z

    def _backward(self, errors: Tensor, inputs: list[Tensor], share: float) -> Tensor:
        """From errors [M, b, C] of the logits to those of the first layer [b, M, .]; gradients on the way."""
        rows = self._rows
        for number in range(len(inputs) - 1, -1, -1):
            layer = self._chain.layers[number + 1]
            place, bias = self._places[number]
            if self._tensors[place].trained:
                out = self._tensors[place].g[0, :rows].view(rows, layer.inputs, layer.outputs)
                torch.baddbmm(out, inputs[number].transpose(1, 2), errors, beta=0, alpha=share, out=out)
                if bias >= 0:
                    torch.sum(errors, dim=1, out=self._tensors[bias].g[0, :rows]).mul_(share)
            if not any(tensor.trained for tensor in self._tensors[:place]):
                return errors
            weights = self._tensors[place].x[0, :rows].view(rows, layer.inputs, layer.outputs)
            errors = torch.bmm(errors, weights.transpose(1, 2))
            if number == 0:
                return torch.mul(errors.transpose(0, 1), self._slopes[0]).contiguous()
            errors.mul_(self._slopes[number])
        return errors

    def _first_gradient(self, errors: Tensor, x: Tensor, others: Tensor, batch: Batch, share: float) -> None:
        gradient = self._tensors[0].g
        lines, _, columns = gradient.shape
        out = gradient.view(lines, -1)[:, : self._rows * columns]
        torch.addmm(out, x.t(), errors.reshape(len(x), -1), beta=0, alpha=share, out=out)
        if len(batch.twins):
            away = (others - x[batch.places]) * share
            pushes = torch.einsum("sd,so->dso", away, errors[batch.places, batch.twins])
            gradient.index_add_(1, batch.twins, pushes)

    def _targets(self, labels: Tensor, classes: int) -> Tensor:
        smoothing = self.run.label_smoothing
        targets = torch.full((len(labels), classes), smoothing / classes, dtype=self.dtype, device=labels.device)
        targets.scatter_(1, labels[:, None], 1.0 - smoothing + smoothing / classes)
        return targets

    # --- updates ---

    def _trained(self) -> list[_Tensor]:
        return [tensor for tensor in self._tensors if tensor.trained]

    def _part(self, tensor: _Tensor, k: int) -> Tensor:
        return tensor.x if k == 0 else tensor.buffers[k - 1]

    def _norms(self) -> Tensor:
        squares = [tensor.g[:, : self._rows].square().sum(dim=(0, 2)) for tensor in self._trained()]
        return torch.stack(squares).sum(0).sqrt()

    def _update(self, tensor: _Tensor, rate: float, count: int) -> None:
        run = self.run
        lines, _, columns = tensor.x.shape
        used = self._rows * columns
        x, g, *buffers = (each.view(lines, -1)[:, :used] for each in (tensor.x, tensor.g, *tensor.buffers))
        powers = (1.0 - run.momentum**count, float(np.sqrt(1.0 - run.beta2**count)))
        if self._device.type == "cpu":
            _compiled(run, x.numpy(), g.numpy(), [each.numpy() for each in buffers], rate, powers)
        else:
            _plain(run, x, g, buffers, rate, powers)


def _with_one(x: Tensor, bias: bool) -> Tensor:
    return torch.cat([x, x.new_ones(len(x), 1)], dim=1) if bias else x


def _compiled(
    run: RunSpec, x: np.ndarray, g: np.ndarray, buffers: list[np.ndarray], rate: float, powers: tuple[float, float]
) -> None:
    from experiments.measure.twins import fused

    typed = x.dtype.type
    if run.optimizer == "adamw":
        numbers = (1 - run.momentum, run.beta2, 1 - run.beta2, run.epsilon, 1 - rate * run.weight_decay, *powers)
        fused.adamw(x, *buffers, g, typed(rate), np.array(numbers, dtype=x.dtype))
    elif buffers:
        fused.heavy_ball(x, buffers[0], g, typed(rate), typed(run.momentum), typed(run.weight_decay), run.nesterov)
    else:
        fused.plain(x, g, typed(rate), typed(run.weight_decay))


def _plain(run: RunSpec, x: Tensor, g: Tensor, buffers: list[Tensor], rate: float, powers: tuple[float, float]) -> None:
    if run.optimizer == "adamw":
        mean, square = buffers
        x.mul_(1.0 - rate * run.weight_decay)
        mean.lerp_(g, 1.0 - run.momentum)
        square.mul_(run.beta2).addcmul_(g, g, value=1.0 - run.beta2)
        x.addcdiv_(mean, square.sqrt().div_(powers[1]).add_(run.epsilon), value=-rate / powers[0])
        return
    g.add_(x, alpha=run.weight_decay)
    if not buffers:
        x.sub_(g, alpha=rate)
        return
    buffer = buffers[0].mul_(run.momentum).add_(g)
    x.sub_(torch.add(g, buffer, alpha=run.momentum) if run.nesterov else buffer, alpha=rate)
