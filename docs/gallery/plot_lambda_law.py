"""
Which coefficient for how many experts
======================================

Task arithmetic with one coefficient for N experts: where all tasks have the same curvature energy and the
others' task vectors cost a share rho of the own one, the coefficient that minimises dispersion is ``1/(1 +
(N-1) rho)``. The usual 0.3 at eight experts belongs to rho = 0.33. The law is compared with a numerical
minimum on random task vectors.
"""

import matplotlib.pyplot as plt
import numpy as np

from theory import lambda_law

numbers = np.array([1, 2, 3, 4, 6, 8, 12, 16])
ratios = (0.1, 1 / 3, 1.0)
curves = {ratio: np.array([float(lambda_law(int(N), ratio)) for N in numbers]) for ratio in ratios}

# %%
# Orthogonal task vectors in the plain norm have rho = 1: minimise ``sum_j ||lambda sum_i D_i - D_j||^2`` numerically.

rng = np.random.default_rng(0)
grid = np.linspace(0.0, 1.2, 2401)
minimum = []
for N in numbers:
    vectors = np.linalg.qr(rng.normal(size=(64, int(N))))[0].T  # orthonormal rows
    total = vectors.sum(axis=0)
    cost = [sum(np.sum((x * total - v) ** 2) for v in vectors) for x in grid]
    minimum.append(grid[int(np.argmin(cost))])

# %%
# The claims of this page.

assert np.allclose(curves[1.0], 1 / numbers), "for rho = 1 the law is averaging"
assert np.max(np.abs(np.array(minimum) - curves[1.0])) < 1e-3, "and that is the numerical minimum"
assert abs(curves[1 / 3][list(numbers).index(8)] - 0.3) < 1e-2, "0.3 at eight experts is rho = 1/3"

# %%
# The figure.

figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
looks = (("#0072B2", "-"), ("#009E73", "--"), ("#D55E00", ":"))
for (ratio, curve), (color, style) in zip(curves.items(), looks, strict=True):
    axes.plot(numbers, curve, color=color, ls=style, label=f"ratio {ratio:.2f}")
axes.plot(numbers, minimum, "o", color="#222222", ms=4, label="numerical minimum, orthogonal vectors")
axes.axhline(0.3, color="#777777", lw=1)
axes.set_xscale("log", base=2)
axes.set_xticks(numbers, [str(N) for N in numbers])
axes.set_xlabel("number of experts")
axes.set_ylabel("best common coefficient")
axes.set_ylim(0.0, 1.4)
axes.legend()
plt.show()
