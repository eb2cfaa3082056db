"""A Ray cluster: the package, the connection, and how many tasks it has room for."""

from __future__ import annotations

import logging
import socket
from dataclasses import dataclass
from typing import Any

from experiments.engines.errors import EngineError

START_LIMIT = 600.0
"""Seconds that a cluster may take to place a first task."""
REACH_LIMIT = 20.0
"""Seconds in which the cluster's address must answer."""


@dataclass(frozen=True)
class Share:
    """What one task takes of a machine.

    Attributes:
        cpus, gpus: of a machine's; a fraction of a GPU lets several cohorts share it.
        memory: bytes; ``None`` for an estimate of each cohort's need, 0 for no claim.
    """

    cpus: float = 1.0
    gpus: float = 0.0
    memory: int | None = None


def imported() -> Any:
    """The package ``ray``.

    Raises:
        EngineError: it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise EngineError("Ray is not installed; pip install 'mergebound[ray]', or use --engine local") from error
    return ray


class connected:
    """A connection to a cluster that is closed at the end if it was opened here."""

    def __init__(self, ray: Any, address: str | None, workers: int | None) -> None:
        self._ray, self._address, self._workers = ray, address, workers
        self._opened = False

    def __enter__(self) -> None:
        if self._ray.is_initialized():
            return
        options: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": False}
        if self._address is None:
            options |= {"include_dashboard": False, "num_cpus": self._workers}
        _check_address(self._address)
        try:
            self._ray.init(address=self._address or "local", **options)
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            reason = " ".join(str(error).split())[:200]
            raise EngineError(
                f"Ray at {self._address or 'this machine'}: cannot be reached ({reason}); start it with `ray start`, "
                "and check --address"
            ) from error
        self._opened = True

    def __exit__(self, *_: object) -> None:
        if self._opened:
            self._ray.shutdown()


def _check_address(address: str | None) -> None:
    """Refuse at once what nobody listens at; Ray itself would try for minutes."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=REACH_LIMIT).close()
    except OSError as error:
        raise EngineError(
            f"Ray at {address}: nobody answers ({error.strerror or error}); start it with `ray start --head`, or "
            "check --address"
        ) from error


def room(ray: Any, share: Share) -> int:
    """How many tasks fit into the cluster at a time.

    Raises:
        EngineError: none.
    """
    fits = 0
    for node in ray.nodes():
        has = node["Resources"] if node["Alive"] else {}
        wanted = {"CPU": share.cpus, "GPU": share.gpus, "memory": share.memory or 0}
        counts = [int(has.get(name, 0) / amount + 1e-9) for name, amount in wanted.items() if amount]
        fits += min(counts, default=1)
    if fits < 1:
        raise EngineError(
            f"the Ray cluster has no room for a task of {share.cpus:g} CPUs and {share.gpus:g} GPUs; it has "
            f"{ray.cluster_resources()}: ask for less, or add machines"
        )
    return fits
