"""Entries 1 to 8 of the catalogue."""

from __future__ import annotations

from experiments.tasks.vision_data import VisionData

ENTRIES: tuple[VisionData, ...] = ()
