"""What judging takes and gives: claimed constants, options, and all verdicts with their tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy.typing as npt

from experiments.measure.verdicts.finding import Finding
from experiments.measure.verdicts.statements import Judged
from experiments.measure.verdicts.vectors import Cosine
from theory.errors import MergeboundError

if TYPE_CHECKING:
    import pandas as pd

CHOSEN = ("nothing", "held-out", "train", "unknown")
"""What coefficients may have been chosen on."""


@dataclass(frozen=True)
class Stated:
    """Constants that somebody claims, of all experts alike: each is held against what is measured.

    Attributes:
        L, G, B, sigma, mu: as in theory.md; ``None`` where nothing is claimed.
        convex: losses are claimed to be convex.
        least: F*, smallest value of the training objective; ``None``: 0 is used, with which PL ratios err low.
    """

    L: float | None = None
    G: float | None = None
    B: float | None = None
    sigma: float | None = None
    mu: float | None = None
    convex: bool = False
    least: float | None = None


@dataclass(frozen=True)
class Options:
    """How much is measured.

    Attributes:
        measure: False judges recipes, images and checkpoints only (seconds, no gradients).
        samples, pairs, curvature_samples, lanczos, batches: of :func:`constants_of`.
        between: chord points, where training was not.
        pieces: of every edge between points, for differences of gradients.
        coefficients: alpha of the merge, one number or one per expert; default 1/N.
        chosen_on: what these were chosen on, of :data:`CHOSEN`.
        learning_rate: where the recipes are not known.
        last_checkpoint: experts are the runs' last checkpoints; ``None``: not known.
        seed: names every draw.
    """

    measure: bool = True
    samples: int = 128
    pairs: int = 32
    curvature_samples: int = 8
    lanczos: int = 20
    batches: int = 2
    between: int = 1
    pieces: int = 4
    coefficients: npt.ArrayLike | None = None
    chosen_on: str = "nothing"
    learning_rate: float | None = None
    last_checkpoint: bool | None = None
    seed: int = 0


@dataclass(frozen=True)
class Verdicts:
    """Everything judged.

    Attributes:
        names: of the experts.
        findings: assumptions, expert by expert, then those of the merge.
        judged: statements.
        pairs: cosines of task vectors.
        seed: of all draws.
        notes: what a reader must know.
    """

    names: tuple[str, ...]
    findings: tuple[Finding, ...]
    judged: tuple[Judged, ...]
    pairs: tuple[Cosine, ...]
    seed: int
    notes: tuple[str, ...] = ()

    def get(self, key: str, about: str = "merge") -> Finding:
        """One finding.

        Raises:
            MergeboundError: there is none.
        """
        for item in self.findings:
            if item.key == key and item.about == about:
                return item
        raise MergeboundError(f"verdicts: nothing was judged under {key!r} of {about!r}; see the table of assumptions")

    def to_frame(self) -> pd.DataFrame:
        """One row per assumption and expert (or merge)."""
        import pandas as pd

        return pd.DataFrame([item.row() for item in self.findings]).assign(seed=self.seed)

    def statements_frame(self) -> pd.DataFrame:
        """One row per statement and expert (or merge)."""
        import pandas as pd

        return pd.DataFrame([item.row() for item in self.judged]).assign(seed=self.seed)

    def summary(self, what: str = "statements") -> pd.DataFrame:
        """``statements`` or ``assumptions`` with equal rows of several experts in one (``all`` of them, or names)."""
        import pandas as pd

        statements = what == "statements"
        columns = ["statement", "standing", "tier", "broken", "open"]
        columns = columns if statements else ["key", "name", "verdict", "seen"]
        frame = self.statements_frame() if statements else self.to_frame()
        rows = []
        for values, group in frame.groupby(columns, sort=False, dropna=False):
            owners, reasons = list(group["about"]), [] if statements else list(dict.fromkeys(group["why"]))
            about = "all" if len(owners) == len(self.names) > 1 else ", ".join(owners)
            row = {"about": about, **dict(zip(columns, values, strict=True))}
            if reasons:
                row["why"] = reasons[0] + (" (others differ in numbers)" if reasons[1:] else "")
            rows.append(row)
        return pd.DataFrame(rows)

    def evidence_frame(self) -> pd.DataFrame:
        """One row per number."""
        import pandas as pd

        rows = [
            {"about": item.about, "key": item.key, "verdict": item.verdict, **vars(e)}
            for item in self.findings
            for e in item.evidence
        ]
        return pd.DataFrame(rows)

    def cosines_frame(self) -> pd.DataFrame:
        """One row per pair of experts."""
        import pandas as pd

        return pd.DataFrame([vars(pair) for pair in self.pairs])
