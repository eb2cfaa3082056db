"""Other people's bounds, on the same recipes as ours, with their assumptions and their domains.

One file per paper; every bound is a :class:`PublishedBound`.  :func:`theory.compare` puts them side by side.
"""

from theory.published.common import MEANING, PublishedBound, Quantity
from theory.published.fedavg import fedavg_one_round
from theory.published.hardt import hardt_convex, hardt_nonconvex, hardt_strongly_convex
from theory.published.lei_ying import epsilon_l1, epsilon_l2, lei_ying_l1, lei_ying_l2
from theory.published.pac_bayes import pac_bayes_expectation, pac_bayes_penalty

__all__ = [
    "MEANING",
    "PublishedBound",
    "Quantity",
    "epsilon_l1",
    "epsilon_l2",
    "fedavg_one_round",
    "hardt_convex",
    "hardt_nonconvex",
    "hardt_strongly_convex",
    "lei_ying_l1",
    "lei_ying_l2",
    "pac_bayes_expectation",
    "pac_bayes_penalty",
]
