"""Whether runs are trained on the machine that the plan was made on: if not, it is said once and remembered."""

from __future__ import annotations

import logging

from experiments.store import Store

_log = logging.getLogger(__name__)


class Machines:
    """Hears which machines work.

    Args:
        store: open for writing, with a frozen plan.
    """

    def __init__(self, store: Store) -> None:
        plan = store.plan()
        self._store = store
        self._planned = "" if plan is None else plan.machine
        self._heard: set[str] = set()

    def heard(self, machine: str) -> bool:
        """A worker is on this machine; returns whether it is another one than the plan's.

        Args:
            machine: as :func:`experiments.finetune.cohort.planner.machine` describes it.
        """
        if self._planned in ("", machine):
            return False
        if machine not in self._heard:
            self._heard.add(machine)
            self._store.note_machine(machine)
            _log.warning(
                "the plan was made on %s, runs are trained on %s: their last bits may differ from those of the plan's "
                "machine; `mergebound grid status` names both",
                self._planned,
                machine,
            )
        return True
