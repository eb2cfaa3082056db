"""What advice on a merge says."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from experiments.advise.account import Account, Change
from experiments.advise.domain import Domain
from experiments.advise.numbers import Number


@dataclass(frozen=True)
class MergeAdvice:
    """What to do with a base and its experts.

    Attributes:
        label, method, settings: of the recommended merge, as ``mergebound merge`` takes them.
        alpha: its coefficients by expert, (N,); for methods that are not linear their projection on the task vectors.
        experts: names, in order.
        kept, left_out: experts with a coefficient above zero, and the others.
        predicted: joint risk on images that chose nothing, in nats; the interval spans all predictors that were
            collected, widened by the draw of images.
        measured: the same merge evaluated on these images, with an interval that holds for all evaluated merges at
            once; ``None`` where nothing was evaluated.
        accuracy: predicted, or measured where it was.
        average, base, own: joint risks of the average (measured where it was evaluated), the base, the experts alone.
        judge: the predictor that decided.
        account: the theory's terms.
        changes: what could be changed, the first first.
        candidates: every merge considered, by what decided.
        subsets: the best merge of k experts for every k.
        domain: of coefficients.
        samples, seconds: what it cost.
        skipped: what was not collected, and why.
        notes: what a reader must know.
        seed: of images and methods.
    """

    label: str
    method: str
    settings: dict[str, float]
    alpha: tuple[float, ...]
    experts: tuple[str, ...]
    kept: tuple[str, ...]
    left_out: tuple[str, ...]
    predicted: Number
    measured: Number | None
    accuracy: float
    average: Number
    base: Number
    own: Number
    judge: str
    account: Account
    changes: tuple[Change, ...]
    candidates: pd.DataFrame
    subsets: pd.DataFrame
    domain: Domain
    samples: float
    seconds: float
    skipped: tuple[str, ...]
    notes: tuple[str, ...]
    seed: int

    @property
    def risk(self) -> Number:
        """The measured joint risk where there is one, else the predicted."""
        return self.measured or self.predicted
