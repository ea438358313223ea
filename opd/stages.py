"""The stages of a response, found by the tags that open them: `starts(text, tags) -> where`, `numbered(...) -> [T]`.

A stage lasts until the next one opens.  What stands before the first tag belongs to the first stage that was found, and
a response without a tag is all answer, the last stage.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import pairwise

from transformers import PreTrainedTokenizerBase as Tokenizer


def starts(text: str, tags: Sequence[str]) -> list[tuple[int, int]]:
    """(stage, character) of each stage that is there, in order; `tags[k]` opens stage k + 1, `a|b` is either.

    The longest chain of tags in the stages' order counts, the earliest of those; so a tag that is repeated, that is
    named before its time or that comes after its time opens nothing.
    """
    found = sorted(
        (at, -len(word), stage)
        for stage, tag in enumerate(tags, 1)
        for word in tag.split("|")
        for at in _all(text, word)
    )
    chains: dict[int, list[tuple[int, int]]] = {}  # the longest that ends with a stage
    taken = 0  # characters that belong to a tag already: of two tags at one place the longer counts
    for at, minus, stage in found:
        if at < taken:
            continue
        taken = at - minus
        before: list[tuple[int, int]] = max((chains.get(s, []) for s in range(1, stage)), key=len, default=[])
        if len(before) + 1 > len(chains.get(stage, [])):
            chains[stage] = [*before, (stage, at)]
    return max(sorted(chains.values(), key=lambda chain: chain[-1][1]), key=len, default=[])


def texts(text: str, tags: Sequence[str]) -> list[str]:
    """The text of each stage, with its tag; "" where it is missing."""
    found = starts(text, tags) or [(len(tags), 0)]
    out = [""] * len(tags)
    ends = [at for _, at in found[1:]] + [len(text)]
    for i, ((stage, at), end) in enumerate(zip(found, ends, strict=True)):
        out[stage - 1] = text[at if i else 0 : end]
    return out


def numbered(tokenizer: Tokenizer, ids: Sequence[int], tags: Sequence[str]) -> list[int]:
    """The stage of each token, from 1; a token belongs to the stage in which the tag's first character lies.

    Exact on the tokens as they were sampled: no text is split into tokens again.  A tag may be one token, several, or
    share its first with what stands before.
    """
    read = lambda n: str(tokenizer.decode(list(ids[:n]), skip_special_tokens=False, clean_up_tokenization_spaces=False))
    text = read(len(ids))
    found = starts(text, tags) or [(len(tags), 0)]
    at = [0, *(_token(read, len(ids), text[: char + 1]) for _, char in found[1:]), len(ids)]
    return [stage for (stage, _), (a, b) in zip(found, pairwise(at), strict=True) for _ in range(a, b)]


def _token(read: Callable[[int], str], count: int, text: str) -> int:
    """The first token with which the ids read as `text` at their beginning."""
    return bisect_left(range(count + 1), True, key=lambda n: read(n).startswith(text)) - 1


def _all(text: str, word: str) -> list[int]:
    """Where a word begins, again and again."""
    out, at = [], text.find(word)
    while at >= 0:
        out.append(at)
        at = text.find(word, at + len(word))
    return out
