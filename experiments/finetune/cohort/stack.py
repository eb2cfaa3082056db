"""M experts' tensors side by side: trained ones as rows of one matrix, the rest stacked by name."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from experiments.finetune.low_rank import low_rank
from experiments.finetune.trained import set_modes, trains
from experiments.grid.run_spec import RunSpec
from experiments.models.parts import head_tensors
from theory.errors import MergeboundError

DTYPES = {"float32": torch.float32, "bfloat16": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Entry:
    """A trained tensor's place in an expert's row.

    Attributes:
        name: of the tensor in the state dict.
        shape: as it lies in the row: a linear layer's matrix as (in, out) where the way wants it so.
        start: of its numbers in the row.
        factor: ``""`` for the tensor itself, ``"up"`` or ``"down"`` for its low-rank factors.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    factor: str = ""

    @property
    def stop(self) -> int:
        """Where the next one starts."""
        return self.start + torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Layout:
    """Rows of trained numbers: the shared part first, the head last.

    Attributes:
        entries: trained tensors, in order.
        shared: numbers of the shared part.
        total: numbers of a row, P.
        transposed: names of the matrices that lie as (in, out).
    """

    entries: tuple[Entry, ...]
    shared: int
    total: int
    transposed: frozenset[str]

    def leaves(self, x: Tensor) -> list[Tensor]:
        """Views [M, ...] of rows [M, P], to differentiate by."""
        rows = x.detach()
        return [rows[:, e.start : e.stop].view(len(x), *e.shape).requires_grad_() for e in self.entries]

    def tensors(self, leaves: Sequence[Tensor], frozen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every parameter of the network by name, [M, ...], matrices as ``transposed`` says; low-rank updates added."""
        found = dict(frozen)
        ups: dict[str, Tensor] = {}
        for entry, leaf in zip(self.entries, leaves, strict=True):
            if entry.factor == "up":
                ups[entry.name] = leaf
            elif entry.factor == "down":
                update = torch.bmm(ups[entry.name], leaf)
                kept = frozen[entry.name]
                update = update.transpose(1, 2) if entry.name in self.transposed else update
                found[entry.name] = kept + update.reshape(kept.shape)
            else:
                found[entry.name] = leaf
        return found


@dataclass
class Experts:
    """M experts in the middle of their training.

    Attributes:
        x: trained numbers, [M, P].
        frozen: the other parameters (and what low-rank updates are added to), [M, ...] by name.
        statistics: running statistics that move, in one vector: expert by expert within each tensor.
        layout: of the rows.
    """

    x: Tensor
    frozen: dict[str, Tensor]
    statistics: Statistics
    layout: Layout

    def select(self, kept: Tensor) -> Experts:
        """Some of the experts, copied."""
        frozen = {name: tensor[kept] for name, tensor in self.frozen.items()}
        return Experts(self.x[kept], frozen, self.statistics.select(kept), self.layout)


class Statistics:
    """Running statistics [M, C] by name, each contiguous, all in one vector.

    Args:
        tensors: [M, C] by name; copied.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._names = tuple(tensors)
        self._shapes = [tensors[name].shape for name in self._names]
        self.flat = torch.cat([tensors[name].reshape(-1) for name in self._names]) if tensors else torch.empty(0)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Views by name."""
        parts = torch.split(self.flat, [shape.numel() for shape in self._shapes]) if self._names else ()
        return {name: part.view(s) for name, part, s in zip(self._names, parts, self._shapes, strict=True)}

    def copy(self) -> Statistics:
        """The same numbers elsewhere."""
        return Statistics(self.tensors)

    def select(self, kept: Tensor) -> Statistics:
        """Those of some experts, copied."""
        return Statistics({name: tensor[kept] for name, tensor in self.tensors.items()})

    def put(self, rows: Tensor, other: Statistics) -> None:
        """Overwrite those of some experts."""
        mine = self.tensors
        for name, tensor in other.tensors.items():
            mine[name][rows] = tensor

    def finite(self) -> Tensor:
        """Which experts' are finite, (M,) bool on the processor; empty where there are none."""
        if not self._names or bool(torch.isfinite(self.flat).all()):
            return torch.ones(0, dtype=torch.bool)
        good = [torch.isfinite(tensor).flatten(1).all(1) for tensor in self.tensors.values()]
        return torch.stack(good).all(0).cpu()


def moving(model: nn.Module) -> tuple[str, ...]:
    """Names of the running statistics that a forward pass changes, given the modes that the modules are in."""
    found = []
    for prefix, module in model.named_modules():
        if _moves(module):
            found += [f"{prefix}.{end}" if prefix else end for end in ("running_mean", "running_var")]
    return tuple(found)


def counters(model: nn.Module) -> tuple[str, ...]:
    """Names of the counters that a forward pass advances by one."""
    return tuple(
        f"{prefix}.num_batches_tracked" if prefix else "num_batches_tracked"
        for prefix, module in model.named_modules()
        if _moves(module) and getattr(module, "num_batches_tracked", None) is not None
    )


def _moves(module: nn.Module) -> bool:
    tracked = getattr(module, "track_running_stats", False) and getattr(module, "running_mean", None) is not None
    return bool(tracked and module.training)


def prepared(
    network: nn.Module, runs: Sequence[RunSpec], starts: Sequence[Mapping[str, Tensor]], device: torch.device
) -> nn.Module:
    """A copy of the network in the modes and the type of numbers of the runs, with the first start's tensors.

    Raises:
        MergeboundError: starts that differ in a buffer that is neither trained nor a running statistic.
    """
    model = copy.deepcopy(network).to(device, DTYPES[runs[0].precision])
    model.load_state_dict(dict(starts[0]))
    set_modes(model, runs[0].trained)
    stacked_too = {name for name, _ in model.named_parameters()} | {*moving(model), *counters(model)}
    for name in set(starts[0]) - stacked_too - set(_fixed_statistics(model)):
        if name.endswith("num_batches_tracked"):
            continue
        if any(not torch.equal(start[name], starts[0][name]) for start in starts[1:]):
            raise MergeboundError(f"{name}: experts of one cohort share this buffer, but these differ; use way = loop")
    return model


def make_layout(model: nn.Module, run: RunSpec, transposed: frozenset[str]) -> Layout:
    """The rows' layout; the order is the reference's up to transposed matrices.

    Args:
        transposed: names of the matrices that lie as (in, out).
    """
    head = set(head_tensors(model))
    found: list[Entry] = []
    place = 0

    def add(name: str, shape: tuple[int, ...], factor: str = "") -> None:
        nonlocal place
        found.append(Entry(name, shape, place, factor))
        place = found[-1].stop

    parameters = dict(model.named_parameters())
    if run.rank is not None:
        for name, factors in low_rank(model, head, run.rank, run.seed).items():
            add(name, tuple(factors.up.shape), "up")
            add(name, tuple(factors.down.shape), "down")
    for in_head in (False, True):
        if in_head:
            shared = place
        for name, parameter in parameters.items():
            if (name in head) == in_head and trains(run.trained, in_head):
                shape = tuple(parameter.shape)
                add(name, shape[::-1] if name in transposed else shape)
    return Layout(tuple(found), shared, place, transposed)


def stacked(
    model: nn.Module,
    runs: Sequence[RunSpec],
    starts: Sequence[Mapping[str, Tensor]],
    layout: Layout,
    device: torch.device,
) -> Experts:
    """The experts at their starts, on the device and in the runs' type of numbers.

    Args:
        model: in the modes in which it is trained, with the runs' type of numbers.
    """
    dtype = DTYPES[runs[0].precision]
    own = {entry.name for entry in layout.entries if not entry.factor}

    def turned(name: str, tensor: Tensor) -> Tensor:
        return tensor.t() if name in layout.transposed else tensor

    def gathered(name: str) -> Tensor:
        return torch.stack([turned(name, start[name]).to(device=device, dtype=dtype) for start in starts])

    names = [name for name, _ in model.named_parameters()]
    frozen = {name: gathered(name) for name in names if name not in own}
    frozen |= {name: gathered(name) for name in _fixed_statistics(model)}
    statistics = Statistics({name: gathered(name) for name in moving(model)})
    x = torch.empty(len(runs), layout.total, dtype=dtype, device=device)
    factors = [_factors(model, run) if run.rank is not None else {} for run in runs]
    for entry in layout.entries:
        for m, start in enumerate(starts):
            value = (
                factors[m][f"{entry.name}:{entry.factor}"] if entry.factor else turned(entry.name, start[entry.name])
            )
            x[m, entry.start : entry.stop].view(entry.shape).copy_(value)
    return Experts(x, frozen, statistics, layout)


def _fixed_statistics(model: nn.Module) -> list[str]:
    """Running statistics that a forward pass reads and leaves as they are."""
    return [
        f"{prefix}.{end}" if prefix else end
        for prefix, module in model.named_modules()
        if getattr(module, "running_mean", None) is not None and not _moves(module)
        for end in ("running_mean", "running_var")
    ]


def _factors(model: nn.Module, run: RunSpec) -> dict[str, Tensor]:
    """The reference's factors of a run at its start, by ``name:up`` and ``name:down``."""
    assert run.rank is not None
    found: dict[str, Tensor] = {}
    for name, each in low_rank(model, head_tensors(model), run.rank, run.seed).items():
        found[f"{name}:up"], found[f"{name}:down"] = each.up.detach(), each.down.detach()
    return found


def state_of(
    experts: Experts, row: int, start: Mapping[str, Tensor], counted: Sequence[str], steps: int, statistics: Statistics
) -> dict[str, Tensor]:
    """One expert's full state dict on the processor, copied.

    Args:
        row: of the expert.
        start: its x_0, which has the order of names and what never changes.
        counted: names of counters of batches.
        steps: that it has made.
        statistics: running statistics, perhaps those of before the last forward pass.
    """
    layout = experts.layout
    with torch.no_grad():
        leaves = [leaf.detach() for leaf in layout.leaves(experts.x[row : row + 1])]
        frozen = {name: tensor[row : row + 1] for name, tensor in experts.frozen.items()}
        found = {name: tensor[0] for name, tensor in layout.tensors(leaves, frozen).items()}
    found |= {name: tensor[row] for name, tensor in statistics.tensors.items()}
    state: dict[str, Tensor] = {}
    for name, tensor in start.items():
        value = found.get(name)
        if value is None:
            typed = experts.x.dtype if tensor.is_floating_point() else tensor.dtype
            kept = tensor.to("cpu", typed, copy=True)
            state[name] = kept + steps if name in counted else kept
        else:
            turned = value.t() if name in layout.transposed else value
            state[name] = turned.to("cpu", copy=True).contiguous()
    return state
