"""A stand-in for a second device: tensors in the processor's memory that refuse to be mixed with its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

NAME = "meta"
"""What the device is called here; torch knows the name and keeps nothing there."""


class Elsewhere(Tensor):
    """A tensor on the device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Elsewhere:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, strides=held.stride(), storage_offset=0, dtype=held.dtype, device=NAME
        )
        made.held = held
        return made  # type: ignore[no-any-return]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Elsewhere({self.held})"

    def tolist(self) -> Any:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(function, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(function, args, kwargs or {})


def _call(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    flat = tree_flatten((args, kwargs))[0]
    there = [value for value in flat if isinstance(value, Elsewhere)]
    here = [value for value in flat if isinstance(value, Tensor) and not isinstance(value, Elsewhere) and value.dim()]
    moves = function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
    if there and here and not moves:
        raise RuntimeError(f"{function}: expected all tensors to be on the same device")
    device = kwargs.get("device")
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    outputs_there = str(device) == NAME if device is not None else bool(there)
    given, named = tree_map(lambda value: value.held if isinstance(value, Elsewhere) else value, (args, kwargs))
    result = function(*given, **named)
    if function is torch.ops.aten.copy_.default or any(result is value for value in given if isinstance(value, Tensor)):
        return args[0]  # in place
    if not outputs_there:
        return result
    return tree_map(lambda value: Elsewhere(value) if isinstance(value, Tensor) else value, result)


@contextmanager
def other_device() -> Iterator[str]:
    """While this is entered, tensors can be made on, moved to and moved from the device that it gives the name of."""
    with _Mode():
        yield NAME
