"""The machine in words that name no machine."""

from __future__ import annotations

import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def describe(command: str, seed: int) -> dict[str, str]:
    """Cores, processor, memory, system, libraries, date, command and seed."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    libraries = ", ".join(f"{name} {_version(name)}" for name in ("torch", "numpy", "numba", "safetensors"))
    return {
        "machine": f"{os.cpu_count()} cores, {_processor()}, {memory:.0f} GiB, Linux {platform.release()}",
        "libraries": f"Python {platform.python_version()}, {libraries}",
        "date": datetime.now(UTC).date().isoformat(),
        "command": command,
        "seed": str(seed),
    }


def available_memory() -> int:
    """Bytes that processes can still take without swapping."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return 0


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or sys.platform
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"
