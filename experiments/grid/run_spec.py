"""One fine-tuning run, fully resolved: what a grid expands to and what a store is keyed by."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from experiments.bases.spec import BaseSpec
from experiments.finetune.loop import Sampling
from experiments.finetune.schedules import ScheduleName
from experiments.spec import NUMERICS_VERSION

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=2**53)]
Seed = Annotated[int, Field(ge=0, le=2**53)]
Trained = Literal["full", "backbone", "head", "low_rank"]
_READ_BY = {"beta2": "adamw", "epsilon": "adamw", "sam_radius": "sam"}
"""Fields that one optimizer reads."""


class RunSpec(BaseModel):
    """How one expert is fine-tuned, with nothing left open.

    Attributes:
        task: as :func:`experiments.tasks.named.open_task` takes it.
        base: x_0 and with it the architecture and its options.
        learning_rate, steps, batch_size, data_share, momentum, weight_decay: theory.md's eta, K, b, share, beta, omega.
        optimizer: ``sgd`` (heavy ball; ``nesterov``), ``adamw`` (decoupled decay), ``sam`` (sharpness-aware SGD).
        beta2, epsilon: of ``adamw``; its first moment's rate is ``momentum``.  For other optimizers they
            are put back to their defaults, since nothing reads them: such runs are the same run.
        sam_radius: rho of ``sam``; likewise.
        schedule, warm_up: factor on the learning rate.
        label_smoothing: share of uniform labels.
        clip_norm: largest norm of a batch gradient (shared part and head together), ``None`` for no clipping.
        augment: preset of :mod:`experiments.inputs.augment`.
        sampling: of batches.
        precision: of the network's arithmetic.
        trained: ``full``; ``backbone`` (frozen head); ``head`` (frozen backbone); ``low_rank`` (rank-``rank`` updates
            of every matrix of the backbone, with the head).
        rank: of ``low_rank``.
        checkpoints: steps whose weights are kept, ascending, the last being ``steps``.
        seed: names batches, augmentation and the new head.
        split_seed: names the split of the data.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str
    base: BaseSpec
    learning_rate: Positive
    steps: Count
    batch_size: Count
    data_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    nesterov: bool = False
    weight_decay: NonNegative = 0.0
    optimizer: Literal["sgd", "adamw", "sam"] = "sgd"
    beta2: Annotated[float, Field(gt=0, lt=1)] = 0.999
    epsilon: Positive = 1e-8
    sam_radius: Positive = 0.05
    schedule: ScheduleName = "constant"
    warm_up: Annotated[int, Field(ge=0)] = 0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    clip_norm: Positive | None = None
    augment: str = "none"
    sampling: Sampling = "reshuffle"
    precision: Literal["float32", "bfloat16", "float64"] = "float32"
    trained: Trained = "full"
    rank: Count | None = None
    checkpoints: tuple[Count, ...] = ()
    seed: Seed = 0
    split_seed: Seed = 0

    @model_validator(mode="before")
    @classmethod
    def _normal_form(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        optimizer = content.get("optimizer", "sgd")
        unread = [name for name, reader in _READ_BY.items() if reader != optimizer]
        content = {name: value for name, value in content.items() if name not in unread}
        if not content.get("checkpoints") and "steps" in content:
            content["checkpoints"] = (content["steps"],)
        return content

    @model_validator(mode="after")
    def _fits(self) -> RunSpec:
        if list(self.checkpoints) != sorted(set(self.checkpoints)) or self.checkpoints[-1] != self.steps:
            raise ValueError(f"checkpoints: {list(self.checkpoints)} must ascend and end with steps = {self.steps}")
        if self.warm_up >= self.steps:
            raise ValueError(f"warm_up: {self.warm_up} leaves none of the {self.steps} steps")
        if self.nesterov and (self.optimizer != "sgd" or self.momentum == 0):
            raise ValueError("nesterov: needs optimizer sgd and a momentum above 0")
        if (self.trained == "low_rank") != (self.rank is not None):
            raise ValueError("rank: give it with trained = low_rank, and only then")
        return self

    @property
    def architecture(self) -> str:
        """The network's name."""
        return self.base.architecture

    def digest(self, *, base: str, split: str) -> str:
        """SHA-256 that names the run: the specification, the base's tensors, the split and the numerics version.

        Paths of this machine (the base's weights file) do not count: the digest of its tensors does.

        Args:
            base: ``Base.digest``.
            split: ``ImageTask.digest``.
        """
        content = self.model_dump(mode="json", exclude={"base": {"weights"}, "task": True})
        text = json.dumps({"numerics": NUMERICS_VERSION, "x_0": base, "split": split, **content}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()
