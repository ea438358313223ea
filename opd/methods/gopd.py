"""G-OPD: extrapolate beyond the teacher, away from a reference model.  arXiv:2602.12125."""

from opd.losses.target_distribution import Extrapolated
from opd.losses.terms import PolicyGradient
from opd.methods.method import Method
from opd.methods.pg import Baselines, baseline_of


def g_opd(strength: float = 1.25, baseline: Baselines = "none") -> Method:
    """Reward strength (log q - log b) - (log p - log b), b the --reference model.  G-OPD, arXiv:2602.12125.

    Args:
        strength: Extrapolation factor, the paper's lambda.  1 is `opd`, above 1 goes beyond the teacher (ExOPD, 1.25),
            below 1 stays closer to the reference.
        baseline: Baseline subtracted from the reward.
    """
    return Method((PolicyGradient(baseline=baseline_of(baseline, 16), against=Extrapolated(strength)),))
