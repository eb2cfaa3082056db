"""Every proof of the theory as a chain of steps that is checked (``derive("theorem 2").check()``).

Identities are checked by sympy or with 50 digits at random points; inequalities at random points of their domain;
statements about expectations on random finite probability spaces that are summed out completely; statements about
functions on random smooth functions.  What is only quoted is marked *cited*.
"""

from __future__ import annotations

from collections.abc import Callable

from theory.derivations.core import Derivation, Evidence, Step
from theory.errors import MergeboundError


def _table() -> dict[str, Callable[[], Derivation]]:
    from theory.derivations import certificates, forms, operators, published, risk, training

    return {
        "lemma 1": risk.lemma_1,
        "lemma 1 forms": forms.lemma_forms,
        "clock": training.clock_sgd,
        "momentum": training.clock_momentum,
        "theorem 1": risk.theorem_1,
        "gap forms": risk.gap_forms,
        "theorem 2": training.stability,
        "sharper stability": forms.stability_forms,
        "heads": forms.heads,
        "theorem 3": training.drift,
        "dispersion": risk.dispersion,
        "aggregation": forms.aggregation,
        "training risk": training.training_risk,
        "convex risk": training.convex_risk,
        "distance risk": forms.distance_risk,
        "descent risk": forms.descent_risk,
        "master bound": risk.master,
        "laws": risk.laws,
        "output certificate": certificates.output_certificate,
        "loss change": certificates.loss_changes,
        "linear operators": operators.linear_operators,
        "dare": risk.dare,
        "masks": operators.masks,
        "ties": operators.ties,
        "model stock": operators.model_stock,
        "slerp": operators.slerp,
        "iso": operators.iso,
        "hardt": published.hardt,
        "lei-ying": published.lei_ying,
        "fedavg": published.fedavg,
        "pac-bayes": published.pac_bayes,
    }


def derivations() -> tuple[str, ...]:
    """Names of all derivations, in the order of the theory."""
    return tuple(_table())


def derive(name: str) -> Derivation:
    """The proof of a statement as checked steps; raises :class:`MergeboundError` for unknown names.

    >>> proof = derive("lemma 1")
    >>> [row.method for row in proof.check(seed=0)][:4]
    ['not checked', 'instances', 'instances', 'sympy']
    """
    table = _table()
    if name not in table:
        raise MergeboundError(f"derive: there is no derivation {name!r}; choose one of {', '.join(table)}")
    return table[name]()


__all__ = ["Derivation", "Evidence", "Step", "derivations", "derive"]
