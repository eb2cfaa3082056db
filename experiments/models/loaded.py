"""Is timm there?  Importing it takes seconds of processor time, and a network without its layers does not need it."""

from __future__ import annotations

import sys


def timm_is_loaded() -> bool:
    """Whether something has imported timm: without that no network can have a layer of its types."""
    return "timm.layers" in sys.modules and "timm.models.vision_transformer" in sys.modules
