"""OPRD: hidden states matched instead of distributions.  arXiv:2606.06021."""

from opd.method import MatchHidden, Method
from opd.representation import Bridge
from opd.weights import LastTokens

BRIDGED = 10.0  # weight of (2 - 2 cos) / rank in the authors' scripts


def oprd(last: int = 2000, layers: tuple[int, ...] = (), bridge_rank: int = 0, coef: float = 1.0) -> Method:
    """Hidden states matched layer by layer, without the heads.  OPRD, arXiv:2606.06021, Eq. 6 and 14-15.

    Column t is about the states that predict token t, as the paper says; its code takes those after it. As they are,
    states of two models mean the same only where one was trained from the other. Behind a bridge both are projected,
    the teacher's on its principal components, the student's by a projection fitted before training; the loss is then
    10 (2 - 2 cos) / rank.

    Args:
        last: tokens at the end of each response that are matched.
        layers: of the student, counted from 1; none named is all.
        bridge_rank: dimensions in which models of different width or depth are compared (8); 0 compares as they are.
        coef: weight of the loss; 1 is the publication's.
    """
    if bridge_rank < 0:
        raise ValueError(f"bridge_rank={bridge_rank}: 0 for none, or a number of dimensions such as 8")
    bridge = Bridge(bridge_rank) if bridge_rank else None
    scale = coef * (BRIDGED if bridge else 1.0)
    return Method((MatchHidden(layers, bridge, weights=(LastTokens(last),), coef=scale),))
