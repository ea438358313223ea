"""OPRD: match hidden states instead of distributions.  arXiv:2606.06021."""

from opd.losses.hidden_states import Bridge
from opd.losses.reductions import LastTokens
from opd.losses.terms import MatchHidden
from opd.methods.method import Method

BRIDGED = 10.0  # weight of (2 - 2 cos) / rank in the authors' scripts


def oprd(last: int = 2000, layers: tuple[int, ...] = (), bridge_rank: int = 0, coef: float = 1.0) -> Method:
    """Hidden states matched layer by layer, without the LM heads.  OPRD, arXiv:2606.06021, Eq. 6 and 14-15.

    Column t holds the states that predict token t, as in the paper; its code uses the states after token t.  A direct
    comparison only makes sense if one model was trained from the other.  With a bridge, both models' states are
    projected: the teacher's on its principal components, the student's by a projection fitted before training.  The
    loss is then 10 (2 - 2 cos) / rank.

    Args:
        last: Number of tokens at the end of each response that are matched.
        layers: Layers of the student to match, counted from 1.  Empty matches all layers.
        bridge_rank: Dimensions of the common space for models of different width or depth, such as 8.  0 compares
            the states directly.
        coef: Weight of the loss.  1 is the published value.
    """
    if bridge_rank < 0:
        raise ValueError(f"bridge_rank={bridge_rank}: 0 for none, or a number of dimensions such as 8")
    bridge = Bridge(bridge_rank) if bridge_rank else None
    scale = coef * (BRIDGED if bridge else 1.0)
    return Method((MatchHidden(layers, bridge, weights=(LastTokens(last),), coef=scale),))
