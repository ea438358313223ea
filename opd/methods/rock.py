"""Rock Tokens: freeze frequent tokens whose KL stays high.  arXiv:2605.09253."""

import json
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Int
from torch import Tensor

from opd.losses.divergences import ReverseKL
from opd.losses.shapes import Mask, PerToken
from opd.losses.terms import Match
from opd.losses.token_weights import Frozen, FrozenWindow
from opd.methods.method import Method


@dataclass(frozen=True)
class Released:
    """Weight of the authors' released code: the token *after* a listed token, with the weights scaled to mean 1.

    The scale divides by the sum of weights over the batch, at least 1 (the released code: over a micro-batch), so the
    remaining tokens count more.  A response's first token has weight 1: the token before it belongs to the prompt,
    which is not a column.
    """

    ids: tuple[int, ...] = ()
    weight: float = 0.0

    def __call__(self, ids: Int[Tensor, "B T"], mask: Mask) -> PerToken:
        listed = Frozen(self.ids, self.weight)(ids)
        after = listed.roll(1, 1)
        after[:, 0] = 1
        return after * mask.sum() / after.where(mask, 0).sum().clamp(min=1)


def rock_freeze(tokens: str = "", weight: float = 0.0, window: int = 0, released: bool = False) -> Method:
    """Reverse KL over the whole vocabulary, without the listed tokens.  Rock Tokens, arXiv:2605.09253, Eq. 18-19.

    Args:
        tokens: Path of a json file with a list of token ids, or an object with "ids", as `opd rock` writes it.  The ids
            are compared with the token being predicted.  Without a file nothing is frozen, which is `opd-full`.
        weight: Weight of the listed tokens, the paper's lambda (0 freezes them, 0.3 is the paper's soft variant).
        window: Also weight high-KL tokens within this many tokens of a listed token.  0 is off.
        released: Follow the authors' code: weight the token after a listed token instead, and divide the loss by the
            sum of weights.
    """
    if weight < 0:
        raise ValueError(f"weight={weight}: a token weighs 0 (frozen) or more")
    if released and window:
        raise ValueError(f"window={window}: the released code has no window; leave out one of --window and --released")
    ids = _read(Path(tokens)) if tokens else ()
    leaf = Released(ids, weight) if released else FrozenWindow(ids, weight, window) if window else Frozen(ids, weight)
    return Method((Match(ReverseKL(), weights=(leaf,)),))


def _read(path: Path) -> tuple[int, ...]:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(
            f"--tokens {path}: no such file; name a json file with the ids of the tokens to freeze"
        ) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"--tokens {path}: not readable as json: {error}") from None
    ids = found.get("ids") if isinstance(found, dict) else found
    if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
        raise ValueError(f'--tokens {path}: needs a list of token ids, or an object with them under "ids"')
    return tuple(ids)
