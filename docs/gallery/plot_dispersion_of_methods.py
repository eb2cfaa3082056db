"""
No merge has less dispersion than the average
=============================================

Dispersion is how far a merge is from its experts. For any task vectors the plain average has the least of it;
other methods can win only through the curvature of the loss. Here every method that needs nothing but
checkpoints merges the same random experts.
"""

import matplotlib.pyplot as plt
import torch

from merging.merge import merge_state_dicts

rng = torch.Generator().manual_seed(3)
base = {f"blocks.{i}.weight": torch.randn(24, 24, generator=rng) for i in range(3)}
experts = {
    name: {key: value + 0.1 * torch.randn(value.shape, generator=rng) for key, value in base.items()}
    for name in ("photos", "sketches", "digits", "signs")
}

methods = {
    "average": {},
    "task_arithmetic": {"coefficient": 0.3},
    "ties": {"density": 0.2},
    "dare": {"drop": 0.5, "coefficient": 0.3},
    "magmax": {},
    "breadcrumbs": {},
    "model_stock": {},
    "tsv_m": {},
    "iso_c": {},
    "emr": {},
}


def dispersion(merged: dict) -> float:
    """``V = sum_j p_j ||M - x_j||^2`` with equal weights."""
    return sum(float(sum((merged[k] - e[k]).pow(2).sum() for k in base)) for e in experts.values()) / len(experts)


found = {name: dispersion(merge_state_dicts(name, base, experts, **settings)) for name, settings in methods.items()}
ranked = dict(sorted(found.items(), key=lambda item: item[1]))

# %%
# The claim of this page: the average has the smallest dispersion, and that is the spread of the experts
# around their mean.

assert next(iter(ranked)) == "average"
mean = {key: sum(expert[key] for expert in experts.values()) / len(experts) for key in base}
assert abs(found["average"] - dispersion(mean)) < 1e-3 * found["average"]

# %%
# The figure.

figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
axes.barh(list(ranked), list(ranked.values()), color=["#D55E00" if name == "average" else "#0072B2" for name in ranked])
axes.axvline(found["average"], color="#222222", lw=1, ls="--")
axes.invert_yaxis()
axes.set_xlabel("dispersion V of the merge, param²")
axes.set_title("Four random experts, seed 3")
plt.show()
