"""Split a response into stages by the tags that open them: `starts(text, tags)`, `numbered(...) -> [T]`.

A stage lasts until the next one opens.  Text before the first tag belongs to the first stage that the response has.  A
response without a tag consists only of the last stage, the answer.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import pairwise

from transformers import PreTrainedTokenizerBase as Tokenizer


def starts(text: str, tags: Sequence[str]) -> list[tuple[int, int]]:
    """Return (stage, character offset) of each stage in a text, in order.

    `tags[k]` opens stage k + 1; `a|b` means either tag.  Only the longest chain of tags in the order of the stages
    counts; of equally long chains, the earliest.  So a tag that is repeated or out of order opens no stage.
    """
    found = sorted(
        (at, -len(word), stage)
        for stage, tag in enumerate(tags, 1)
        for word in tag.split("|")
        for at in _all(text, word)
    )
    chains: dict[int, list[tuple[int, int]]] = {}  # stage -> the longest chain that ends with it
    taken = 0  # offset after the last tag: of two tags at one offset the longer counts
    for at, minus, stage in found:
        if at < taken:
            continue
        taken = at - minus
        before: list[tuple[int, int]] = max((chains.get(s, []) for s in range(1, stage)), key=len, default=[])
        if len(before) + 1 > len(chains.get(stage, [])):
            chains[stage] = [*before, (stage, at)]
    return max(sorted(chains.values(), key=lambda chain: chain[-1][1]), key=len, default=[])


def texts(text: str, tags: Sequence[str]) -> list[str]:
    """Return the text of each stage, with its tag; "" for a missing stage."""
    found = starts(text, tags) or [(len(tags), 0)]
    out = [""] * len(tags)
    ends = [at for _, at in found[1:]] + [len(text)]
    for i, ((stage, at), end) in enumerate(zip(found, ends, strict=True)):
        out[stage - 1] = text[at if i else 0 : end]
    return out


def numbered(tokenizer: Tokenizer, ids: Sequence[int], tags: Sequence[str]) -> list[int]:
    """Return the stage of each token, counted from 1.

    The token that contains the first character of a tag is the first token of its stage.  This is exact, because the
    sampled tokens are used and no text is tokenized again.  A tag may be one token or several, and may share its first
    token with the text before it.
    """
    read = lambda n: str(tokenizer.decode(list(ids[:n]), skip_special_tokens=False, clean_up_tokenization_spaces=False))
    text = read(len(ids))
    found = starts(text, tags) or [(len(tags), 0)]
    at = [0, *(_token(read, len(ids), text[: char + 1]) for _, char in found[1:]), len(ids)]
    return [stage for (stage, _), (a, b) in zip(found, pairwise(at), strict=True) for _ in range(a, b)]


def _token(read: Callable[[int], str], count: int, text: str) -> int:
    """Return the index of the first token up to which the decoded ids start with `text`."""
    return bisect_left(range(count + 1), True, key=lambda n: read(n).startswith(text)) - 1


def _all(text: str, word: str) -> list[int]:
    """Return the offsets of all non-overlapping occurrences of a word."""
    out, at = [], text.find(word)
    while at >= 0:
        out.append(at)
        at = text.find(word, at + len(word))
    return out
