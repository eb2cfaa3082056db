"""What the processor is and which bfloat16 units it has."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Cpu:
    """The processor.

    Attributes:
        name: as the system gives it.
        bf16: names of its bfloat16 instructions (``amx_bf16``, ``avx512_bf16``, ``bf16``, ``sve_bf16``), most capable
            first; empty if there are none.
        known: whether the system told which instructions there are.
    """

    name: str
    bf16: tuple[str, ...]
    known: bool

    def __str__(self) -> str:
        units = ", ".join(self.bf16) if self.bf16 else "no bfloat16 units" if self.known else "units unknown"
        return f"{self.name} ({units})"


UNITS = ("amx_bf16", "sme2", "sve_bf16", "avx512_bf16", "bf16")
"""Instructions that multiply bfloat16 numbers."""


def cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> Cpu:
    """The processor of this machine, from ``/proc/cpuinfo`` and from what PyTorch detects."""
    fields: dict[str, str] = {}
    try:
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    found: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    detected = {name for name, there in found.items() if there is True}
    # a flag of the system counts only where PyTorch, if it can tell, sees the unit as well: kernels may not use it
    units = tuple(name for name in UNITS if (name in detected if found else name in flags))
    name = fields.get("model name") or platform.processor() or platform.machine() or "unknown processor"
    return Cpu(" ".join(name.split()), units, bool(flags or found))
