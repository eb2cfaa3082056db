"""One architecture and base, ready to measure merged vectors: weights into the same network, test images kept ready."""

from __future__ import annotations

import copy
import glob
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from experiments.bases.base import Base
from experiments.combine.groups import Group, Member
from experiments.combine.recipe import Evaluate
from experiments.combine.testing import Opener, TestSet, TestSets
from experiments.evaluate.evaluate import apply_head, combine, evaluation, scored
from experiments.evaluate.fast import FastModel, fast_evaluator, plain_evaluator
from experiments.evaluate.many import without_scores
from experiments.evaluate.results import Evaluation, JointEvaluation
from experiments.models import head_logits, head_tensors, input_format, replace_head
from experiments.models.parts import head_units
from merging.batchnorm import reestimate_batchnorm
from merging.flat import FlatSpace
from merging.merge import flat_space
from merging.partition import Partition, partition
from theory.errors import MergeboundError

TEST_MEMORY = 2 << 30
"""Bytes of test images that are kept ready."""


class HeadOf(nn.Module):
    """A head that is no single linear layer, applied to features."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, features: Tensor) -> Tensor:
        """Logits, (n, classes)."""
        return head_logits(self.network, features)


class Bench:
    """A base with its network, layout and test sets.

    Attributes:
        base: x_0 and the architecture.
        space: layout of what is merged.
        partition: what is merged; the head is private.
        origin: x_0 as one vector, (P,).
        tests: test sets of the tasks.
    """

    def __init__(
        self,
        base: Base,
        evaluate: Evaluate,
        open_task: Opener,
        *,
        double: bool = False,
        device: str = "cpu",
        memory: int = TEST_MEMORY,
    ) -> None:
        self.base = base
        self.evaluate = evaluate
        self._network = base.model().to(device)
        names = head_tensors(self._network)
        self._head_names = names
        if not any(name not in names and tensor.is_floating_point() for name, tensor in base.state.items()):
            raise MergeboundError(
                f"{base.architecture}: has no layers before its head, which stays private to its task: nothing is left "
                "to merge; take another network (--fix architecture=NAME), or run the grid with one with hidden layers"
            )
        self.partition: Partition = partition(base.state, private=[glob.escape(name) for name in names])
        like = {name: tensor.double() for name, tensor in base.state.items() if tensor.is_floating_point()}
        self.space: FlatSpace = flat_space(base.state, self.partition, {"": {**base.state, **like}} if double else None)
        self.origin = self.space.flatten(base.state)
        self._heads: dict[int, nn.Module] = {}
        self._plain = plain_evaluator(self._network, heads=(nn.Identity(),))
        self._fast: FastModel | None = None
        self._open = open_task
        self._memory = memory
        self.tests = TestSets(input_format(self._network), evaluate, open_task, self._plain, memory)
        if evaluate.batchnorm == "reestimated" and not self.partition.buffers:
            raise MergeboundError(
                f"{base.architecture}: has no BatchNorm statistics to re-estimate; measure it with batchnorm='merged'"
            )

    def head_of(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The head's tensors of an expert."""
        return {name: state[name].detach().clone() for name in self._head_names}

    def vector(self, state: Mapping[str, Tensor]) -> Tensor:
        """An expert's merged coordinates x, (P,)."""
        return self.space.flatten(state)

    def measure(
        self,
        vectors: Sequence[Tensor],
        groups: Sequence[Group],
        heads: Mapping[str, Mapping[str, Tensor]],
        *,
        reestimate: bool = True,
    ) -> list[JointEvaluation]:
        """Evaluate merged vectors, each on the test sets of its group's tasks through its experts' heads.

        Tasks are gone through one after the other, so that every test set is read once.

        Args:
            vectors: (P,) each.
            groups: one for each vector.
            heads: tensors by the experts' names.
            reestimate: re-estimate BatchNorm statistics where the evaluation says so.
        """
        if reestimate and self.evaluate.batchnorm == "reestimated":
            vectors = [self.reestimated(vector, group) for vector, group in zip(vectors, groups, strict=True)]
        found: list[dict[str, Evaluation]] = [{} for _ in groups]
        wanted: dict[tuple[str, int], list[tuple[int, Member]]] = {}
        for index, group in enumerate(groups):
            for member in group.members:
                wanted.setdefault((member.task, member.split_seed), []).append((index, member))
        checked: dict[int, bool] = {}
        for _, pairs in sorted(wanted.items()):
            test = self.tests.of(pairs[0][1])
            fast = self._path(test, heads[pairs[0][1].name])
            loaded = -1
            for index, member in pairs:
                if index != loaded:
                    self._load(fast, vectors[index])
                    loaded = index
                used = fast
                if fast.path != "fp32":
                    if index not in checked:
                        checked[index] = fast.check().holds(fast.path)
                    used = fast if checked[index] else fast.as_plain()
                found[index][member.task] = self._score(used, test, self._head(heads[member.name], test.classes))
        return [
            without_scores(combine([own[member.task] for member in group.members], resamples=0))
            for own, group in zip(found, groups, strict=True)
        ]

    def base_through(
        self, members: Sequence[Member], heads: Mapping[str, Mapping[str, Tensor]]
    ) -> dict[str, Evaluation]:
        """The base through the heads of experts of one task, by the experts' names; features are computed once."""
        test = self.tests.of(members[0])
        fast = self._plain
        self._load(fast, self.origin)
        features = [(fast.run(images), labels) for images, labels in test.batches(fast)]
        out = {}
        for member in members:
            head = self._head(heads[member.name], test.classes)
            parts = [(apply_head(head, rows), labels) for rows, labels in features]
            out[member.name] = self._evaluation(test, parts, fast.path)
        return out

    def reestimated(self, vector: Tensor, group: Group) -> Tensor:
        """The vector with BatchNorm statistics of the calibration images of the group's tasks, one batch each."""
        batches = []
        for member in group.members:
            calibration = self.tests.of(member).calibration
            assert calibration is not None  # asked for by the evaluation
            batches.append(calibration)
        state = {**self.base.state, **self.space.unflatten(vector)}
        return self.space.flatten(reestimate_batchnorm(self._network, state, batches))

    def _path(self, test: TestSet, head: Mapping[str, Tensor]) -> FastModel:
        if not self.evaluate.fast:
            return self._plain
        if self._fast is None:  # chosen once, on the first task's images
            sample = next(iter(test.batches(self._plain)))[0]
            judge = copy.deepcopy(self._head(head, test.classes))
            self._fast = fast_evaluator(self._plain.plain, sample, heads=(judge,))
            self.tests = TestSets(input_format(self._network), self.evaluate, self._open, self._fast, self._memory)
        return self._fast

    def _load(self, fast: FastModel, vector: Tensor) -> None:
        if fast.path != "fp32":
            fast.load(self.space.unflatten(vector))
            return
        network: nn.Module = getattr(fast.plain, "model", fast.plain)
        own = dict(network.named_parameters(remove_duplicate=False)) | dict(network.named_buffers())
        pieces = self.space.unflatten(vector)
        with torch.no_grad():
            torch._foreach_copy_([own[name].data for name in pieces], list(pieces.values()))

    def _score(self, fast: FastModel, test: TestSet, head: nn.Module) -> Evaluation:
        parts = [(apply_head(head, fast.run(images)), labels) for images, labels in test.batches(fast)]
        return self._evaluation(test, parts, fast.path)

    def _evaluation(self, test: TestSet, parts: Sequence[tuple[Tensor, Tensor]], path: str) -> Evaluation:
        """Heads read batch by batch, as a plain evaluation does; images are scored all at once."""
        logits, labels = (torch.cat([pair[side] for pair in parts]) for side in (0, 1))
        return evaluation(test.data, scored(logits, labels, test.data.name), path, bins=self.evaluate.bins, resamples=0)

    def _head(self, state: Mapping[str, Tensor], classes: int) -> nn.Module:
        """The module of a head of so many classes, with these weights; one module per number of classes."""
        if classes not in self._heads:
            network = replace_head(self.base.model(), classes, 0)
            units = head_units(network)
            linear = len(units) == 1 and isinstance(network.get_submodule(units[0]), nn.Linear)
            module = copy.deepcopy(network.get_submodule(units[0])) if linear else HeadOf(network)
            self._heads[classes] = module.to(next(self._network.parameters()).device).eval().requires_grad_(False)
        module = self._heads[classes]
        whole = isinstance(module, HeadOf)
        own = module.network.state_dict() if isinstance(module, HeadOf) else module.state_dict()
        with torch.no_grad():
            for name, tensor in state.items():
                target = own[name if whole else name.rpartition(".")[2]]
                if target.shape != tensor.shape:
                    raise MergeboundError(
                        f"tensor '{name}' of an expert's head has shape {tuple(tensor.shape)}, but the task has "
                        f"{classes} classes; the store and the data do not belong together"
                    )
                target.copy_(tensor)
        return module
