"""The master bound on a whole box of recipes: a guaranteed interval from proven monotonicity, ingredient by ingredient.

A field of an expert may be known only to lie in ``[lower, upper]``.  The bound as a whole is not monotone in most
fields (a longer training lowers the training risk and raises the drift), but its *ingredients* are: every form of the
drift, of the stability, and each half of the PL training risk.  Each ingredient is evaluated at the corner of the box
where it is largest (smallest), and the master inequality, which increases in all of them, combines the results.

Why the ingredients are monotone (plain SGD, constant learning rate and batch size, first two samplings; q, tau, nu of
theory section 4, ``m`` the lowest curvature):

* ``tau = eta sum q^a`` and ``nu = eta^2 sum q^(2a)`` increase in K (more nonnegative terms) and in L, and decrease in
  mu.  In eta: while ``q = 1 - eta (m + omega)``, either m + omega < 0 and every factor increases, or
  ``eta (m + omega) <= 1`` there, and ``tau = (1 - q^K)/(m + omega)``,
  ``nu = eta (1 - q^(2K))/((m + omega)(2 - eta (m + omega)))`` are products of increasing nonnegative factors; on the
  other branch ``q = eta (L + omega) - 1`` increases.
* ``(tau/n)^2 + Gamma`` decreases in b, and in n because ``tau^2 >= nu`` (w >= 0); the rms form ``tau/n + sqrt(Gamma)``
  does **not** decrease in n (Gamma = 0 at n = b, and rises up to n = 2b): its two parts are bounded apart.
* the noise of a batch, ``(n - b)/(b (n - 1))``, decreases in b and *increases* in n for distinct samples.
* decay lowers tau while the first branch holds on the whole box, and raises the energy form (c).

For other clocks (momentum, schedules, reshuffling) only the fields in which the ingredients are visibly monotone are
proven: g, sigma, sigma0, the gaps D, risks, norms and measured quantities; the rest is refused by name.
"""

from theory.enclosure.drifts import drift_range
from theory.enclosure.relaxed import Unchecked, unchecked
from theory.enclosure.stabilities import epsilon_range
from theory.enclosure.training_risks import risk_range
from theory.enclosure.whole import Enclosure, enclose

__all__ = ["Enclosure", "Unchecked", "drift_range", "enclose", "epsilon_range", "risk_range", "unchecked"]
