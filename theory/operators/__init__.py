"""Merging operators as theory objects (theory section 10).

:func:`operator` gives the object of a method: what it computes, how far it carries a change of one expert (sensitivity
c_i), how it differs from task arithmetic (bias), what its randomness adds to V (second moment), and which terms of the
master bound it moves.  :func:`explain_method` puts that into words.
"""

from theory.operators.catalogue import Reading, explain_method, operator, operators
from theory.operators.effects import Action, Effect, Operator, Setting
from theory.operators.elected import agreement, elected_sensitivity, sce_sensitivity, trimmed
from theory.operators.linear import fisher_shares
from theory.operators.masks import drop_probabilities, l1_mask_sensitivity, mask_variance, trim_change
from theory.operators.matrices import (
    iso_c_gain,
    regmean_maps,
    regmean_sensitivity,
    wudi_products,
    wudi_sensitivity,
)
from theory.operators.of_merge import (
    added_dispersion,
    coefficients,
    from_recipe,
    merge_with,
    operator_assumptions,
    sensitivity,
)
from theory.operators.span import (
    karcher_coefficients,
    model_stock_coefficients,
    model_stock_ratio,
    model_stock_sensitivity,
    multi_slerp_coefficients,
    slerp_coefficients,
    slerp_sensitivity,
    span_sensitivity,
)

__all__ = [
    "Action",
    "Effect",
    "Operator",
    "Reading",
    "Setting",
    "added_dispersion",
    "agreement",
    "coefficients",
    "drop_probabilities",
    "elected_sensitivity",
    "explain_method",
    "fisher_shares",
    "from_recipe",
    "iso_c_gain",
    "karcher_coefficients",
    "l1_mask_sensitivity",
    "mask_variance",
    "merge_with",
    "model_stock_coefficients",
    "model_stock_ratio",
    "model_stock_sensitivity",
    "multi_slerp_coefficients",
    "operator",
    "operator_assumptions",
    "operators",
    "regmean_maps",
    "regmean_sensitivity",
    "sce_sensitivity",
    "sensitivity",
    "slerp_coefficients",
    "slerp_sensitivity",
    "span_sensitivity",
    "trim_change",
    "trimmed",
    "wudi_products",
    "wudi_sensitivity",
]
