"""Image-classification tasks: the published vision data sets, the embedded digits, and the user's own files.

``tasks.vision(8)`` lists data sets, ``tasks.load("mnist", root)`` reads one, ``tasks.task("mnist", root, seed=0)``
splits it.  ``tasks.load_local(path)`` reads the user's own images, ``tasks.npz8(root)`` eight small real data sets.
"""

from experiments.tasks.catalogue import BENCHMARKS, find, prompt_names, vision
from experiments.tasks.dataset import DataSet, ImageTask, split
from experiments.tasks.loading import Finding, check, check_data, load, task
from experiments.tasks.local import load_local
from experiments.tasks.npz8 import npz8
from experiments.tasks.vision_data import Archive, VisionData

__all__ = [
    "BENCHMARKS",
    "Archive",
    "DataSet",
    "Finding",
    "ImageTask",
    "VisionData",
    "check",
    "check_data",
    "find",
    "load",
    "load_local",
    "npz8",
    "prompt_names",
    "split",
    "task",
    "vision",
]
