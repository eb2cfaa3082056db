"""Read how an expert was trained from the files that other tools leave: timm's ``args.yaml`` (with ``summary.csv``) and
Hugging Face's ``trainer_state.json`` with a JSON dump of ``TrainingArguments``.

Every key is mapped, listed as unknown (with what to give), or listed as ignored with the reason; nothing is guessed
silently: what is assumed (one device, the tool's default) is in ``notes``.  Units: ``n`` samples, ``batch_size``
samples per optimisation step over all devices and accumulated batches, ``steps`` optimisation steps, learning rates as
used by each step.  Constants of the loss (L, gradient norms, risks) are in no such file and stay unknown.

``training_args.bin`` is a pickle, which runs code when it is opened: it is never read.
"""

from __future__ import annotations

from experiments.recipe_readers.reading import RecipeReading
from experiments.recipe_readers.runs import read_run
from experiments.recipe_readers.timm_args import read_timm
from experiments.recipe_readers.trainer_state import read_trainer

__all__ = [
    "RecipeReading",
    "read_run",
    "read_timm",
    "read_trainer",
]
