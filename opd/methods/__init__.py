"""Named methods.  A method is a factory function: its defaults are the paper's setting, its body shows what differs.

To add a method, write a file with the function and any new part it needs, then list the function here. The command
line, the generated docs and the law tests then include it.
"""

from collections.abc import Callable

from opd.methods.async_opd import async_opd
from opd.methods.classic import (
    gkd,
    gkd_forward,
    gkd_reverse,
    opd,
    opd_clip,
    opd_full,
    opd_tanh,
    opd_topk,
    opd_zscore,
    rethinking_opd,
)
from opd.methods.eopd import eopd, eopd_sampled
from opd.methods.kat import kat
from opd.methods.method import Method
from opd.methods.npd import npd
from opd.methods.omniopd import omniopd
from opd.methods.oprd import oprd
from opd.methods.pg import opd_optimal, opd_stratified, pg
from opd.methods.privileged import opsd, sdft, sdpo
from opd.methods.reward_shapes import g_opd, opd_plus, opd_signlog, opd_tv, poweropd, reopold, topd
from opd.methods.rock import rock_freeze
from opd.methods.ropd import ropd
from opd.methods.rubricem import rubricem
from opd.methods.token_weighting import entropy, fire, iw_opd, scope
from opd.methods.trb import trb
from opd.methods.tropd import tropd
from opd.methods.vopd import vopd, vopd_topk

__all__ = [  # noqa: RUF022  (in the order of `opd methods`)
    "vopd", "vopd_topk", "poweropd",
    "opd", "opd_full", "opd_topk", "rethinking_opd", "gkd", "gkd_forward", "gkd_reverse",
    "opd_clip", "opd_tanh", "opd_zscore",
    "reopold", "topd", "opd_signlog", "opd_tv", "opd_plus", "g_opd",
    "fire", "iw_opd", "entropy", "eopd", "eopd_sampled", "scope", "rock_freeze",
    "kat", "trb", "tropd", "oprd",
    "opsd", "sdft", "sdpo",
    "omniopd", "ropd", "rubricem",
    "opd_optimal", "opd_stratified", "async_opd", "npd", "pg",
]  # fmt: skip
METHODS: dict[str, Callable[..., Method]] = {name.replace("_", "-"): globals()[name] for name in __all__}
