"""STR: soft threshold reparameterization (Kusupati et al., ICML 2020, arXiv 2002.03231).

    forward     W^ = sign(W) * max(|W| - g(s), 0)          (equation 3; g the sigmoid)
    backward    dL/dW = dL/dW^ for |W| > g(s), else 0

The formula is :mod:`rarefy.sparse.families.reparameterized`, its pressure and its landing on a target
:class:`rarefy.sparse.families.soft_threshold.SoftThreshold`.
"""

from __future__ import annotations

from dataclasses import dataclass

from rarefy.sparse.families.soft_threshold import SoftThreshold
from rarefy.sparse.reports import Info


@dataclass(eq=False, repr=False)
class STR(SoftThreshold):
    """Soft Threshold Reparameterization: masked weights get no gradient from the loss.

    The paper's sparsity is whatever the weight decay on s gives, from thresholds that start at 0. Here s starts at -5
    and its decay is the pressure, with the bounds and floors of :class:`SoftThreshold`; with a ``target`` the pressure
    is chosen for it, and the thresholds are trimmed to it over the last quarter of the run.
    """

    info = Info(
        title="STR",
        paper="Soft Threshold Reparameterization, Kusupati et al., ICML 2020, arXiv 2002.03231",
        start="dense",
        targeted="optional",
        training_flops="at the density of the weights",
    )
    trim_from = 0.75
    alpha_now = 0.0

    def _steer(self, error: float | None) -> None:
        """Alpha stays 0."""

    def _default_pressure(self) -> float:
        # Fitted on a small network (fashion_cnn, 8 epochs), where 6.1, 10 and 17.5 gave 90, 95 and 98 %.
        return 10.0 if self.budget is None else 1.37 * self.budget.goal**-0.65
