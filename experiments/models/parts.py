"""Where a network's backbone ends and its head begins, for any timm model.

The *head* is what ``reset_classifier`` makes anew: usually one linear layer, sometimes a 1x1 convolution, BatchNorm
and a linear layer, or several classifiers whose outputs are averaged.  Everything else is the *backbone*: it is merged,
heads stay private to their tasks.  The head's tensors are found by resetting the classifier of a copy that has the
same layers and no numbers (PyTorch's meta device), so neither the model nor its size matter.

:mod:`experiments.models.extraction` computes what the head reads.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from theory.errors import MergeboundError

_LISTS = (nn.ModuleList, nn.ModuleDict)


def forward_backbone(model: nn.Module, images: Tensor) -> Tensor:
    """Pooled features before the linear head, (n, features); the head is applied to them outside the model.

    For models that :func:`head_prefix` accepts; :func:`features` serves the others too.
    """
    maps = model.forward_features(images)  # type: ignore[operator]
    pooled: Tensor = model.forward_head(maps, pre_logits=True)  # type: ignore[operator]
    return pooled


def without_numbers(model: nn.Module) -> nn.Module:
    """A copy with the same layers and names whose tensors are on the meta device (shapes only)."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)


def head_tensors(model: nn.Module) -> tuple[str, ...]:
    """Names of the head's tensors, in the order of the state dict; empty if the model has no classifier.

    Raises:
        MergeboundError: the model does not say what its classifier is (``reset_classifier``, ``get_classifier``).
    """
    before = without_numbers(model)
    if not hasattr(model, "reset_classifier"):
        return _tensors_of_classifier(before)
    named = before.state_dict(keep_vars=True)
    outputs = getattr(model, "num_classes", 1)
    try:
        with torch.random.fork_rng(devices=[]):
            _reset(before, outputs if isinstance(outputs, int) else 1)
    except (RuntimeError, AssertionError, AttributeError, TypeError, ValueError, NotImplementedError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise MergeboundError(
            f"{type(model).__name__}: its classifier cannot be replaced ({reason}); use a model with a classifier"
        ) from error
    after = before.state_dict(keep_vars=True)
    return tuple(name for name, tensor in named.items() if after.get(name) is not tensor)


def _tensors_of_classifier(model: nn.Module) -> tuple[str, ...]:
    classifier = model.get_classifier() if hasattr(model, "get_classifier") else None  # type: ignore[operator]
    for name, module in model.named_modules():
        if classifier is not None and module is classifier and name:
            return tuple(f"{name}.{key}" for key in module.state_dict())
    raise MergeboundError(
        f"{type(model).__name__}: no classifier found; use a timm model, or give the class get_classifier()"
    )


def _reset(model: nn.Module, classes: int) -> None:
    """timm's ``reset_classifier``, which forgets a RepViT's second head unless told."""
    reset: Any = model.reset_classifier
    distillation = getattr(getattr(model, "head", None), "distillation", None)
    if isinstance(distillation, bool) and "distillation" in inspect.signature(reset).parameters:
        reset(classes, distillation=distillation)
    else:
        reset(classes)


def head_units(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules that read features and give logits: one, or several whose outputs are combined.

    Raises:
        MergeboundError: as :func:`head_tensors`.
    """
    return tuple(_units(head_tensors(model), model))


def _units(names: Sequence[str], root: nn.Module) -> list[str]:
    """The lowest modules that hold the tensors together; the root and lists of modules are taken apart."""
    if not names:
        return []
    paths = [name.split(".")[:-1] for name in names]
    shared = paths[0]
    for path in paths[1:]:
        shared = shared[: next((i for i, (a, b) in enumerate(zip(shared, path, strict=False)) if a != b), len(path))]
    place = ".".join(shared)
    if place and not isinstance(root.get_submodule(place), _LISTS):
        return [place]
    groups: dict[str, list[str]] = {}
    for name, path in zip(names, paths, strict=True):
        if len(path) == len(shared):
            raise MergeboundError(
                f"{type(root).__name__}: tensor '{name}' of the head belongs to no layer of its own; use another model"
            )
        groups.setdefault(".".join(path[: len(shared) + 1]), []).append(name)
    return [unit for group in groups.values() for unit in _units(group, root)]


def head_prefix(model: nn.Module) -> str:
    """Name prefix of a linear head's tensors, e.g. ``"head."``, ``"fc."`` or ``"head.fc."``.

    Raises:
        MergeboundError: the head is not one linear layer; says what it is.
    """
    try:
        tensors = head_tensors(model)
        units = head_units(model)
        reason = _not_linear(model, tensors, units)
    except MergeboundError as error:
        reason = str(error)
    if reason:
        raise MergeboundError(
            f"{type(model).__name__}: no single linear classifier found ({reason}); use a timm model whose "
            "get_classifier() is linear"
        )
    return f"{units[0]}."


def _not_linear(model: nn.Module, tensors: Sequence[str], units: Sequence[str]) -> str:
    """Why the head is not one linear layer; empty if it is."""
    if not tensors:
        return "it was built without classes"
    if len(units) > 1:
        return f"it has {len(units)} classifiers: {', '.join(units)}"
    unit = model.get_submodule(units[0])
    if isinstance(unit, nn.Linear) and set(tensors) == {f"{units[0]}.{key}" for key in unit.state_dict()}:
        return ""
    parts = [type(m).__name__ for m in unit.modules() if any(True for _ in m.parameters(recurse=False))]
    return f"its head '{units[0]}' is {' and '.join(parts)}"


def split_state(model: nn.Module, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A checkpoint's tensors as (backbone, head), in the order of the model's state dict; nothing is copied.

    The head may have another number of classes than the model's.

    Raises:
        MergeboundError: a tensor is missing or not the model's.
    """
    names = list(model.state_dict())
    head = set(head_tensors(model))
    for name in state:
        if name not in names:
            raise MergeboundError(
                f"tensor '{name}' is not in {type(model).__name__}; give the checkpoint's own network"
            )
    missing = [name for name in names if name not in state and not name.endswith("num_batches_tracked")]
    if missing:
        raise MergeboundError(
            f"tensor '{missing[0]}' of {type(model).__name__} is missing ({len(missing)} in all); give the "
            "checkpoint's own network"
        )
    kept = [name for name in names if name in state]
    return {n: state[n] for n in kept if n not in head}, {n: state[n] for n in kept if n in head}


def join_state(model: nn.Module, backbone: Mapping[str, Tensor], head: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict made of a backbone and a head, in the order of the model's; inverse of :func:`split_state`.

    Raises:
        MergeboundError: a tensor is in both, in neither, or on the wrong side.
    """
    own = set(head_tensors(model))
    for name in backbone:
        if name in own or name in head:
            raise MergeboundError(f"tensor '{name}' of the backbone belongs to the head; split the state first")
    for name in head:
        if name not in own:
            raise MergeboundError(f"tensor '{name}' of the head is not one of {type(model).__name__}'s head")
    joined = {**backbone, **head}
    split_state(model, joined)
    return {name: joined[name] for name in model.state_dict() if name in joined}


def replace_head(model: nn.Module, classes: int, seed: int = 0) -> nn.Module:
    """Give ``model`` a new head with seeded weights, in place; the backbone keeps its tensors.

    Args:
        classes: outputs, at least 1.
        seed: names the initial weights, which are those of the model's own ``reset_classifier``.

    Returns:
        The same model.

    Raises:
        MergeboundError: as :func:`head_tensors`; or fewer than one class.
    """
    if classes < 1:
        raise MergeboundError(f"classes = {classes}: a head has at least one output")
    if not hasattr(model, "reset_classifier"):
        raise MergeboundError(f"{type(model).__name__}: it has no reset_classifier(); use a timm model")
    head_tensors(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _reset(model, classes)
    return model
