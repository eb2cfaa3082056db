"""Figures of predicted against measured merged risk.

Every function takes result frames and returns a :class:`Picture` (a matplotlib figure drawn without pyplot or global
state, and a caption that names tier and seed).  A function raises ValueError when its frame lacks what it draws.  Pages
with figures of their own take colours, axes and legends from ``experiments.plots.style``.
"""

from __future__ import annotations

from experiments.plots.hyperparameters import HYPERPARAMETERS, group_means, risk_against_hyperparameters
from experiments.plots.methods import method_comparison
from experiments.plots.paths import coefficient_sweep, loss_along_line
from experiments.plots.picture import Picture, png_bytes, save_png, save_svg, svg_bytes
from experiments.plots.predictions import bracket_and_collapse, predicted_against_measured
from experiments.plots.style import pretty
from experiments.plots.terms import bound_terms

__all__ = [
    "HYPERPARAMETERS",
    "Picture",
    "bound_terms",
    "bracket_and_collapse",
    "coefficient_sweep",
    "group_means",
    "loss_along_line",
    "method_comparison",
    "png_bytes",
    "predicted_against_measured",
    "pretty",
    "risk_against_hyperparameters",
    "save_png",
    "save_svg",
    "svg_bytes",
]
