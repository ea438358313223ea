"""What tests by hand share: short names, log-probs written as probabilities, and what masked entries may hold."""

import math

import pytest
import torch

close = torch.testing.assert_close
tensor = torch.tensor
INF, NAN = math.inf, math.nan
POISON = pytest.mark.parametrize("junk", [NAN, INF, -INF, 1e300])


def logp(*p: float) -> torch.Tensor:
    """Their logarithms, in float64."""
    return torch.tensor(p, dtype=torch.float64).log()
