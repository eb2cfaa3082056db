"""
Too little training, too much training
======================================

The master bound of an average of two experts as a function of the number of steps: the training risk falls,
dispersion and instability grow, and the best number of steps lies between. Where everything is known exactly
(noisy quadratics), the true risk of the merge is below the bound at every step count.
"""

import matplotlib.pyplot as plt
import numpy as np

from theory import Expert, Merge, QuadraticTask, master_bound, merge_moments, with_true_constants

# %%
# Two quadratic tasks with different minimisers and curvatures, and one recipe.

curvatures = (np.diag([1.0, 0.3]), np.diag([0.5, 0.8]))
targets = (np.array([1.0, 0.5]), np.array([-0.2, 1.0]))
tasks = [QuadraticTask(H, target, 0.05 * np.eye(2)) for H, target in zip(curvatures, targets, strict=True)]
steps = np.unique(np.geomspace(1, 300, 18).astype(int))
stated = dict(shared_samples=False, data_independent_choices=True, per_sample_loss=True)

bounds, exact = [], []
for count in steps:
    runs = [Expert(name, n=40, batch_size=4, learning_rate=0.05, steps=int(count)) for name in ("first", "second")]
    known = tuple(with_true_constants(task, np.zeros(2), run) for task, run in zip(tasks, runs, strict=True))
    bounds.append(master_bound(Merge(known, **stated)))
    exact.append(float(merge_moments(tasks, np.zeros(2), runs, [0.5, 0.5], [0.5, 0.5]).risk))

# %%
# The claims of this page.

values = np.array([float(bound.value) for bound in bounds])
terms = {
    name: np.array([float(bound.terms[i].value) for bound in bounds])
    for i, name in enumerate(("training", "dispersion", "instability"))
}
assert np.all(np.array(exact) <= values), "the exact risk is below the bound at every number of steps"
assert terms["dispersion"][-1] > terms["dispersion"][0], "dispersion grows with training"
assert terms["instability"][-1] > terms["instability"][0], "and so does instability"
assert terms["training"][-1] < terms["training"][0], "the training risk falls"
assert all(bound.tier == "certified" for bound in bounds)

# %%
# The figure.

figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
axes.plot(steps, np.sqrt(values), color="#222222", lw=2, label="bound")
axes.plot(steps, np.sqrt(exact), color="#222222", ls="--", label="exact risk of the merge")
for (name, values_of), color, marker in zip(terms.items(), ("#0072B2", "#D55E00", "#009E73"), "os^", strict=True):
    axes.plot(steps, values_of, color=color, marker=marker, ms=4, label=name)
axes.set_xscale("log")
axes.set_xlabel("steps of fine-tuning")
axes.set_ylabel("square root of the risk")
axes.legend()
axes.set_title("Terms of the master bound (tier: certified)")
plt.show()
