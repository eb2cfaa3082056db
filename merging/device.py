"""The device on which tensors are merged."""

from __future__ import annotations

import re

import torch

from merging.errors import MethodError


def check_device(name: str) -> torch.device:
    """The device of that name, ``cpu``, ``cuda`` or ``cuda:N``, if this machine has it.

    Raises:
        MethodError: another name, or no such device.
    """
    found = re.fullmatch(r"(cpu|cuda)|cuda:(\d{1,4})", name)
    if found is None:
        raise MethodError(f"--device {name}: this is no name of a device: choose among cpu, cuda, cuda:0, cuda:1, ...")
    if found[1] == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(found[2] or 0) >= count:
        seen = "none" if count == 0 else f"{count}, counted from cuda:0"
        raise MethodError(
            f"--device {name}: there is no such device (CUDA devices that torch {torch.__version__} finds here: "
            f"{seen}): choose another, or leave --device out to merge on the processor"
        )
    return torch.device(name)
