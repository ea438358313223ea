"""Named methods.  A method is a factory: its defaults are the paper's setting, its body is what differs.

To add one: write a file with the function (and any new part it brings), then list it here.
It is then on the command line, in the generated docs and under every law.
"""

from collections.abc import Callable

from opd.method import Method
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
)
from opd.methods.optimal import opd_optimal, opd_stratified, pg
from opd.methods.power import poweropd
from opd.methods.vopd import vopd, vopd_topk

FACTORIES: tuple[Callable[..., Method], ...] = (
    vopd,
    vopd_topk,
    poweropd,
    opd,
    opd_full,
    opd_topk,
    gkd,
    gkd_forward,
    gkd_reverse,
    opd_clip,
    opd_tanh,
    opd_zscore,
    opd_optimal,
    opd_stratified,
    pg,
)
METHODS: dict[str, Callable[..., Method]] = {f.__name__.replace("_", "-"): f for f in FACTORIES}
