"""Rock Tokens: frequent tokens whose KL stays high, frozen.  arXiv:2605.09253."""

import json
from pathlib import Path

from opd.divergences import ReverseKL
from opd.method import Match, Method
from opd.weights import Frozen, FrozenWindow


def rock_freeze(tokens: str = "", weight: float = 0.0, window: int = 0) -> Method:
    """Reverse KL over the whole vocabulary, without the listed tokens.  Rock Tokens, arXiv:2605.09253, Eq. 18-19.

    Args:
        tokens: json file with the list of token ids (or an object with "ids"); the listed are
            matched with the token being predicted.  Without a file nothing is frozen: that is `opd-full`.
        weight: of the listed tokens; the paper's lambda (0 freezes, 0.3 is the soft arm).
        window: freezes the tokens of high KL this near to a listed one, too; 0 is off.
    """
    if weight < 0:
        raise ValueError(f"weight={weight}: a token weighs 0 (frozen) or more")
    ids = _read(Path(tokens)) if tokens else ()
    leaf = FrozenWindow(ids, weight, window) if window else Frozen(ids, weight)
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
