"""The store of a grid: SQLite for what is asked, content-addressed safetensors for what is large, in one folder.

A run is absent or complete.  Whatever moment a process is killed at, what is left over is a file that no row names,
and ``gc`` removes it.
"""

from experiments.store.content import TaskVectors
from experiments.store.errors import QueryError, StoreBusy, StoreConflict, StoreError
from experiments.store.garbage import Garbage
from experiments.store.leases import Heartbeat
from experiments.store.status import Lease, Status
from experiments.store.store import LEASE, Store, open_results
from experiments.store.verify import Verification

__all__ = [
    "LEASE",
    "Garbage",
    "Heartbeat",
    "Lease",
    "QueryError",
    "Status",
    "Store",
    "StoreBusy",
    "StoreConflict",
    "StoreError",
    "TaskVectors",
    "Verification",
    "open_results",
]
