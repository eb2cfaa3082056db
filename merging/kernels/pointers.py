"""Arrays of a chunk of every expert, by address: one compiled loop for any number of experts.

The addresses point into mapped files or buffers that the caller keeps alive during the call.
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.core import extending

_intrinsic: Any = extending.intrinsic  # the compiler adds the first argument


@_intrinsic
def float32_pointer(context: Any, address: Any) -> Any:
    """An integer address as a pointer to float32, for ``numba.carray``."""
    signature = types.CPointer(types.float32)(address)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return signature, generate


@_intrinsic
def float64_pointer(context: Any, address: Any) -> Any:
    """An integer address as a pointer to float64, for ``numba.carray``."""
    signature = types.CPointer(types.float64)(address)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return signature, generate


@_intrinsic
def uint8_pointer(context: Any, address: Any) -> Any:
    """An integer address as a pointer to bytes, for ``numba.carray``."""
    signature = types.CPointer(types.uint8)(address)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return signature, generate
