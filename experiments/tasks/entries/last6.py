"""Entries 15 to 20 of the catalogue."""

from __future__ import annotations

from experiments.tasks.vision_data import VisionData

ENTRIES: tuple[VisionData, ...] = ()
