"""Coupled runs of logistic regression and MLPs: all twins see the same batch, so the first layer is one product.

The matrices of M twins stand side by side as [inputs + 1, M, outputs] (the last line is the bias; [.., outputs, M] in
logistic regression).  The batch X, which they share, meets them in one product X W and one X' E: large ones, near the
processor's peak, where a loop makes M tiny ones.  A twin whose fresh sample is in the batch gets its own line of X W,
and X' E the correction (x' - x) e'.  Layers above are batched products.  Updates are one compiled pass
(:mod:`experiments.measure.twins.fused`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.finetune.cohort.chain import GELU, RELU, TANH, read_chain
from experiments.finetune.cohort.stack import DTYPES
from experiments.finetune.schedules import schedule
from experiments.grid.run_spec import RunSpec
from experiments.measure.twins.pairs import Batch
from experiments.measure.twins.stack import Snapshot
from experiments.measure.twins.written_steps import CLIP_EPSILON, LEAST_NORM, compiled, plain
from theory.errors import MergeboundError


@dataclass
class _Tensor:
    """One tensor of M rows with its optimizer's buffers, each contiguous.

    Attributes:
        parts: the tensor and its buffers, (lines, M, columns), or (lines, columns, M) where ``axis`` is 2.
        gradient: of that shape.
        axis: of the rows.
        start, count: of its numbers in a row of the chain.
        trained: whether it is.
    """

    parts: list[Tensor]
    gradient: Tensor
    axis: int
    start: int
    count: int
    trained: bool

    @property
    def x(self) -> Tensor:
        """The numbers themselves."""
        return self.parts[0]

    def join(self, numbers: Sequence[Tensor], count: int) -> None:
        """Append rows: (P,) numbers and buffers of a snapshot."""
        for k, vector in enumerate(numbers):
            old = self.parts[k]
            shape = [old.shape[0], old.shape[3 - self.axis]]
            new = vector[self.start : self.start + self.count].view(shape).unsqueeze(self.axis)
            wide = [-1, -1, -1]
            wide[self.axis] = count
            self.parts[k] = torch.cat([old, new.expand(wide)], dim=self.axis)
        self.gradient = torch.empty_like(self.parts[0])

    def along(self, values: Tensor) -> Tensor:
        """One number per row, shaped to multiply the parts."""
        return values[None, :, None] if self.axis == 1 else values[None, None, :]


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
        self._alone = len(chain.layers) == 1
        self._rows = 0
        self._tensors: list[_Tensor] = []

    def begin(self) -> Snapshot:
        """See :class:`~.stack.Engine`."""
        return Snapshot(self._x0.clone(), tuple(torch.zeros_like(self._x0) for _ in range(self._buffers)))

    def open(self, capacity: int) -> None:
        """See :class:`~.stack.Engine`."""
        self._rows, self._tensors = 0, []
        lo, hi = self._chain.trained(self.run.trained)

        def add(lines: int, columns: int, start: int, axis: int = 1) -> None:
            shape = [lines, columns]
            shape.insert(axis, 0)
            parts = [torch.empty(shape, dtype=self.dtype, device=self._device) for _ in range(1 + self._buffers)]
            self._tensors.append(_Tensor(parts, parts[0], axis, start, lines * columns, lo <= start < hi))

        self._places: list[tuple[int, int]] = []  # of each layer above the first: its matrix, its bias or -1
        for number, layer in enumerate(self._chain.layers):
            if number == 0:
                add(layer.inputs + bool(layer.bias), layer.outputs, layer.start, 2 if self._alone else 1)
                continue
            place = len(self._tensors)
            add(1, layer.inputs * layer.outputs, layer.start)
            if layer.bias:
                add(1, layer.outputs, layer.bias_start)
            self._places.append((place, place + 1 if layer.bias else -1))

    def join(self, snapshot: Snapshot, count: int) -> None:
        """See :class:`~.stack.Engine`."""
        for tensor in self._tensors:
            tensor.join((snapshot.x, *snapshot.buffers), count)
        self._rows += count

    def step(self, step: int, batch: Batch, *, loss: bool = False) -> Tensor | None:
        """See :class:`~.stack.Engine`."""
        run = self.run
        found = self._gradients(batch, loss)
        if run.optimizer == "sam":
            norm = self._norms().clamp(min=LEAST_NORM)
            before = [tensor.x.clone() for tensor in self._tensors]
            for tensor in self._trained():
                tensor.x.add_(tensor.gradient * tensor.along(run.sam_radius / norm))
            self._gradients(batch, False)
            for tensor, kept in zip(self._tensors, before, strict=True):
                tensor.x.copy_(kept)
        if run.clip_norm is not None:
            factors = (run.clip_norm / (self._norms() + CLIP_EPSILON)).clamp(max=1.0)
            for tensor in self._trained():
                tensor.gradient.mul_(tensor.along(factors))
        rate = run.learning_rate * self._factor(step)
        for tensor in self._trained():
            self._update(tensor, rate, step + 1)
        return found

    def snapshot(self, row: int) -> Snapshot:
        """See :class:`~.stack.Engine`."""
        x, *buffers = (
            torch.cat([tensor.parts[k].select(tensor.axis, row).reshape(-1) for tensor in self._tensors])
            for k in range(1 + self._buffers)
        )
        return Snapshot(x, tuple(buffers))

    def vectors(self) -> Tensor:
        """See :class:`~.stack.Engine`."""
        rows = [tensor.x.movedim(tensor.axis, 0).reshape(self._rows, -1) for tensor in self._tensors]
        return torch.cat(rows, dim=1)

    def vector(self, snapshot: Snapshot) -> Tensor:
        """See :class:`~.stack.Engine`."""
        return snapshot.x

    def state(self, snapshot: Snapshot, steps: int) -> dict[str, Tensor]:
        """See :class:`~.stack.Engine`."""
        return self._chain.state(snapshot.x, self._start)

    # --- one step ---

    def _gradients(self, batch: Batch, loss: bool) -> Tensor | None:
        """Gradients of all rows; the first row's loss, if wanted.  Logits: [b, C, M] of one layer, else [M, C, b]."""
        count = len(batch.labels)
        targets = self._targets(torch.cat([batch.labels, batch.other_labels]), self._chain.layers[-1].outputs)
        own, others = targets[:count], targets[count:]
        x, fresh = self._samples(batch.images), self._samples(batch.other_images)
        below, logits = self._forward(x, fresh, batch)
        errors = torch.softmax(logits, dim=1)
        found = self._loss(logits, own, others, batch) if loss else None
        shift = own[batch.places] - others
        if self._alone:
            errors.sub_(own.unsqueeze(2))
            errors.transpose(1, 2).index_put_((batch.places, batch.twins), shift, accumulate=True)
        else:
            errors.sub_(own.t())
            errors.transpose(1, 2).index_put_((batch.twins, batch.places), shift, accumulate=True)
            errors = self._backward(errors.transpose(1, 2), below, 1.0 / count)
        if self._tensors[0].trained:
            self._first_gradient(errors, x, fresh, batch, 1.0 / count)
        return found

    def _samples(self, images: Tensor) -> Tensor:
        """Samples as lines, with a one at the end where there is a bias."""
        x = images.reshape(len(images), self._chain.layers[0].inputs).to(self.dtype)
        return torch.cat([x, x.new_ones(len(x), 1)], dim=1) if self._chain.layers[0].bias else x

    def _loss(self, logits: Tensor, own: Tensor, others: Tensor, batch: Batch) -> Tensor:
        one = logits[:, :, 0] if self._alone else logits[0].t()
        mine = batch.twins == 0
        seen = own.index_put((batch.places[mine],), others[mine])
        return -(seen * F.log_softmax(one, dim=-1)).sum(-1).mean()

    def _forward(self, x: Tensor, fresh: Tensor, batch: Batch) -> tuple[list[Tensor], Tensor]:
        """Inputs of the layers above the first, [M, b, .], and the logits."""
        layers, rows, first = self._chain.layers, self._rows, self._tensors[0]
        lines = first.x.shape[0]
        out = (x @ first.x.view(lines, -1)).view(len(x), *first.x.shape[1:])
        if len(batch.twins):
            matrices = first.x.movedim(first.axis, 1)[:, batch.twins]
            mine = out.movedim(first.axis, 1)
            mine[batch.places, batch.twins] = torch.einsum("sd,dso->so", fresh, matrices)
        self._slopes: list[Tensor] = []
        inputs: list[Tensor] = []
        if self._alone:
            return inputs, out
        out = self._activate(out, layers[0].activation).transpose(0, 1)
        for layer, (place, bias) in zip(layers[1:], self._places, strict=True):
            inputs.append(out)
            weights = self._tensors[place].x.view(rows, layer.inputs, layer.outputs)
            if layer is layers[-1]:
                product = torch.bmm(weights.transpose(1, 2), out.transpose(1, 2))
                return inputs, product if bias < 0 else product.add_(self._tensors[bias].x[0].unsqueeze(2))
            out = torch.bmm(out, weights)
            out = out if bias < 0 else out.add_(self._tensors[bias].x[0].unsqueeze(1))
            out = self._activate(out, layer.activation)
        return inputs, out

    def _activate(self, z: Tensor, kind: int) -> Tensor:
        """a(z), perhaps in place; notes what its slope needs."""
        if kind == RELU:
            z = z.relu_()
        elif kind == TANH:
            z = z.tanh_()
        self._slopes.append(z)
        return F.gelu(z) if kind == GELU else z

    def _back_through(self, errors: Tensor, number: int) -> Tensor:
        """Errors times a'(z) of a layer."""
        z, kind = self._slopes[number], self._chain.layers[number].activation
        if kind == RELU:
            return torch.ops.aten.threshold_backward(errors, z, 0)  # type: ignore[no-any-return]
        if kind == TANH:
            return torch.ops.aten.tanh_backward(errors, z)  # type: ignore[no-any-return]
        return torch.ops.aten.gelu_backward(errors, z) if kind == GELU else errors

    def _backward(self, errors: Tensor, inputs: list[Tensor], share: float) -> Tensor:
        """From errors [M, b, C] of the logits to those of the first layer [b, M, .]; gradients on the way."""
        rows = self._rows
        for number in range(len(inputs) - 1, -1, -1):
            layer = self._chain.layers[number + 1]
            place, bias = self._places[number]
            if self._tensors[place].trained:
                out = self._tensors[place].gradient.view(rows, layer.inputs, layer.outputs)
                torch.baddbmm(out, inputs[number].transpose(1, 2), errors, beta=0, alpha=share, out=out)
                if bias >= 0:
                    torch.sum(errors, dim=1, out=self._tensors[bias].gradient[0])
                    self._tensors[bias].gradient.mul_(share)
            if not any(tensor.trained for tensor in self._tensors[:place]):
                return errors
            weights = self._tensors[place].x.view(rows, layer.inputs, layer.outputs)
            errors = torch.bmm(errors, weights.transpose(1, 2))
            if number == 0:
                return self._back_through(errors.transpose(0, 1), 0).contiguous()
            errors = self._back_through(errors, number)
        return errors

    def _first_gradient(self, errors: Tensor, x: Tensor, fresh: Tensor, batch: Batch, share: float) -> None:
        first = self._tensors[0]
        out = first.gradient.view(first.gradient.shape[0], -1)
        torch.addmm(out, x.t(), errors.reshape(len(x), -1), beta=0, alpha=share, out=out)
        if len(batch.twins):
            away = (fresh - x[batch.places]) * share
            at = errors.movedim(first.axis, 1)[batch.places, batch.twins]
            pushes = torch.einsum("sd,so->dso", away, at)
            first.gradient.index_add_(first.axis, batch.twins, pushes.movedim(1, first.axis))

    def _targets(self, labels: Tensor, classes: int) -> Tensor:
        smoothing = self.run.label_smoothing
        targets = torch.full((len(labels), classes), smoothing / classes, dtype=self.dtype, device=labels.device)
        targets.scatter_(1, labels[:, None], 1.0 - smoothing + smoothing / classes)
        return targets

    # --- updates ---

    def _trained(self) -> list[_Tensor]:
        return [tensor for tensor in self._tensors if tensor.trained]

    def _norms(self) -> Tensor:
        """Norms of the rows' gradients, (M,)."""
        squares = [tensor.gradient.square().sum(dim=(0, 3 - tensor.axis)) for tensor in self._trained()]
        return torch.stack(squares).sum(0).sqrt()

    def _update(self, tensor: _Tensor, rate: float, count: int) -> None:
        run = self.run
        x, *buffers = (part.view(-1) for part in tensor.parts)
        g = tensor.gradient.view(-1)
        powers = (1.0 - run.momentum**count, float(np.sqrt(1.0 - run.beta2**count)))
        if self._device.type == "cpu":
            compiled(run, x.numpy(), g.numpy(), [each.numpy() for each in buffers], rate, powers)
        else:
            plain(run, x, g, buffers, rate, powers)
