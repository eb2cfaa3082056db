"""Machines other than the plan's that runs were trained on: remembered, so that whoever asks for the state sees it.

They are entries of the table ``meta``, so that older stores need no change.
"""

from __future__ import annotations

from experiments.store.database import Database

_MACHINE = "machine:"


def note_machine(database: Database, machine: str) -> bool:
    """Remember a machine; returns whether it was not known."""
    key = _MACHINE + machine
    if database.read("SELECT 1 FROM meta WHERE key = ?", (key,)):
        return False
    with database.writing() as connection:
        before = connection.total_changes
        connection.execute("INSERT INTO meta VALUES (?, '') ON CONFLICT (key) DO NOTHING", (key,))
        return connection.total_changes > before


def other_machines(database: Database) -> tuple[str, ...]:
    """Those that were remembered, in order of their names."""
    rows = database.read("SELECT key FROM meta WHERE substr(key, 1, ?) = ? ORDER BY key", (len(_MACHINE), _MACHINE))
    return tuple(str(row["key"]).removeprefix(_MACHINE) for row in rows)
