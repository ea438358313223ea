"""Split a response into stages by the tags that open them: `starts(text, tags)`, `numbered(...) -> [T]`.

A stage lasts until the next one opens.  Text before the first tag belongs to the first stage that the response has.  A
response without a tag consists only of the last stage, the answer.
"""

import re
from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise

from transformers import PreTrainedTokenizerBase as Tokenizer


def starts(text: str, tags: Sequence[str]) -> list[tuple[int, int]]:
    """Return (stage, character offset) of each stage in a text, in order.

    `tags[k]` opens stage k + 1; `a|b` means either tag.  Only the longest chain of tags in the order of the stages
    counts; of equally long chains, the earliest.  So a tag that is repeated or out of order opens no stage.
    """
    occurrences = sorted(
        (offset, -len(word), stage)
        for stage, tag in enumerate(tags, 1)
        for word in tag.split("|")
        for offset in (match.start() for match in re.finditer(re.escape(word), text))
    )
    chains: dict[int, list[tuple[int, int]]] = {}  # stage -> the longest chain that ends with it
    end = 0  # offset after the last tag: of two tags at one offset the longer counts
    for offset, negative_length, stage in occurrences:
        if offset < end:
            continue
        end = offset - negative_length
        chain: list[tuple[int, int]] = max((chains.get(s, []) for s in range(1, stage)), key=len, default=[])
        if len(chain) + 1 > len(chains.get(stage, [])):
            chains[stage] = [*chain, (stage, offset)]
    return max(sorted(chains.values(), key=lambda chain: chain[-1][1]), key=len, default=[])


def texts(text: str, tags: Sequence[str]) -> list[str]:
    """Return the text of each stage, with its tag; "" for a missing stage."""
    stages = starts(text, tags) or [(len(tags), 0)]
    bounds = [0, *(offset for _, offset in stages[1:]), len(text)]
    parts = [""] * len(tags)
    for (stage, _), (start, end) in zip(stages, pairwise(bounds), strict=True):
        parts[stage - 1] = text[start:end]
    return parts


def numbered(tokenizer: Tokenizer, ids: Sequence[int], tags: Sequence[str]) -> list[int]:
    """Return the stage of each token, counted from 1.

    The token that contains the first character of a tag is the first token of its stage.  This is exact, because the
    sampled tokens are used and no text is tokenized again.  A tag may be one token or several, and may share its first
    token with the text before it.
    """

    def decode(n: int) -> str:
        first = list(ids[:n])
        return str(tokenizer.decode(first, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def first_token(offset: int) -> int:
        """Return the index of the first token up to which the decoded ids have the text up to a character."""
        return bisect_left(range(len(ids) + 1), True, key=lambda n: decode(n).startswith(text[: offset + 1])) - 1

    text = decode(len(ids))
    stages = starts(text, tags) or [(len(tags), 0)]
    spans = pairwise([0, *(first_token(offset) for _, offset in stages[1:]), len(ids)])
    return [stage for (stage, _), (start, end) in zip(stages, spans, strict=True) for _ in range(start, end)]
