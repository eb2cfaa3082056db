"""The answer "train as little as the limits allow": why a bound can say nothing else, and what would change that.

Let the bound on every expert's distance to the merge be ``r_j d_j``, ``d_j`` its drift, with all ``r_j >= 1`` (the
smallest is ``reach``).  The square root of a nonnegative smooth loss is sqrt(L/2)-Lipschitz, so ``sqrt F_j(x_0) <= sqrt
F_j(x_j) + sqrt(L_j/2) d_j``: whatever training gains on its own task, the dispersion term gives back, and the bound is
at least the training risk of the base, in every form of Theorem 4 (theory section 7; Minkowski's inequality for those
with a joint V, which is then at least ``sum p_j d_j^2``).  An average of N experts with equal drifts d, known by their
norms alone, has ``r = 2(1 - 1/N) >= 1``; orthogonal task vectors have ``r = sqrt(1 - 1/N) < 1``, and training pays.

The remedy is therefore a measurement of angles: the Gram matrix of task vectors of a pilot run
(:func:`theory.task_vectors`).  If cosines are close to zero, state ``orthogonal_task_vectors=True``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class LeastTraining:
    """Every expert whose training is free is trained as little as its limits allow, and why.

    ``reach``: smallest ratio over experts of the distance to the merge (as the bound knows it) to the drift; None where
    it is not known.  ``cause``: ``"norms"`` (reach at least 1: the argument above applies), or ``"constants"``
    (training gains less than drift, noise and instability cost).  ``gained``: how much a tenth more training lowers the
    training term; ``lost``: how much it raises the other two (square roots, unit sqrt(loss)).  ``unlocked``: the
    choices if the task vectors were orthogonal, with ``unlocked_objective``; None if that is already stated, or would
    not change the answer.
    """

    cause: str
    reach: float | None
    gained: float
    lost: float
    unlocked: Mapping[str, float] | None
    unlocked_objective: float | None

    def explain(self) -> str:
        """The reason and the remedy, in a few sentences."""
        lines = [
            "the advice is to train as little as the limits allow: a tenth more training lowers the training term by "
            f"{self.gained:.3g} and raises dispersion and instability by {self.lost:.3g} (square roots)"
        ]
        if self.cause == "norms":
            lines.append(
                "the drift is known by its norm alone: every expert is as far from the merge as from the base, or "
                f"farther (ratio at least {self.reach:.3g}), so the bound cannot be below the training risk of the base"
            )
        else:
            lines.append("the constants of drift, noise and instability outweigh what training gains on this range")
        if self.unlocked is not None:
            chosen = ", ".join(f"{name} = {value:.6g}" for name, value in self.unlocked.items())
            lines.append(
                "what would change it: measure the Gram matrix of the task vectors of a pilot run (task_vectors); if "
                f"they are near-orthogonal, state orthogonal_task_vectors=True: then {chosen}, bound "
                f"{self.unlocked_objective:.4g}"
            )
        else:
            lines.append(
                "orthogonal task vectors are stated, or would not change it: measure smaller constants on a pilot run "
                "(initial_gradient_norm, sigma, D_inf or D_2, L along the path), or give more data or larger batches"
            )
        return "\n".join(lines)
