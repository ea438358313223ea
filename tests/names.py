"""Every name a method prints itself with."""

from opd.against import *  # noqa: F403
from opd.divergences import *  # noqa: F403
from opd.estimators import *  # noqa: F403
from opd.judged import *  # noqa: F403
from opd.method import *  # noqa: F403
from opd.rewards import *  # noqa: F403
from opd.rollouts import *  # noqa: F403
from opd.surrogates import *  # noqa: F403
from opd.transforms import *  # noqa: F403
from opd.weights import *  # noqa: F403
