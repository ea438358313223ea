"""Decoding of responses with visible marks of thinking: `decode(tokenizer, ids) -> text`.

The marks are found by their token ids, because decoding drops those that are special tokens.  The verifiers and judges
cut the thinking from the text with `extract.without_thinking`.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain

from transformers import PreTrainedTokenizerBase as Tokenizer

from opd.core.errors import Refusal
from opd.data.prompts import continuation_text
from opd.data.verifiers.thinking import MARKS

Ids = tuple[int, ...]


def decode(tokenizer: Tokenizer, ids: Sequence[int], think_end: str = "", *, context_ids: Sequence[int] = ()) -> str:
    """Decode a response without special tokens, except the marks of thinking.

    `think_end` is a further mark that closes thinking (--think-end); the text has </think> in its place.  `context_ids`
    are the ids before the response; without them, some tokenizers lose a leading space.
    """
    marks_by_first_id, spans, start = _dropped_marks(tokenizer, think_end), list[tuple[int, int, str]](), 0
    for i in range(len(ids)):
        matching = (mark for mark in marks_by_first_id.get(ids[i], ()) if tuple(ids[i : i + len(mark[0])]) == mark[0])
        if i >= start and (mark := next(matching, None)):
            spans.append((start, i, mark[1]))
            start = i + len(mark[0])
    text = "".join(
        (continuation_text(tokenizer, (*context_ids, *ids[:a]), ids[a:b]) if a < b else "") + mark
        for a, b, mark in (*spans, (start, len(ids), ""))
    )
    return text.replace(think_end, "</think>") if think_end else text


@lru_cache(maxsize=64)
def _dropped_marks(tokenizer: Tokenizer, think_end: str) -> dict[int, list[tuple[Ids, str]]]:
    """Return the marks that decoding drops, as token ids and text, by their first id; longer marks come first.

    Raises Refusal for a blank `think_end`.
    """
    if think_end and not think_end.strip():
        raise Refusal(f"--think-end {think_end!r} is blank: give the text of the mark, such as '</think>'")
    vocabulary = tokenizer.get_vocab()
    marks_by_first_id: dict[int, list[tuple[Ids, str]]] = {}
    for mark in dict.fromkeys(filter(None, (*chain(*MARKS), think_end))):
        is_token = mark in vocabulary
        ids = (vocabulary[mark],) if is_token else tuple(tokenizer(mark, add_special_tokens=False)["input_ids"])
        decoded, with_special = (str(tokenizer.decode(list(ids), skip_special_tokens=skip)) for skip in (True, False))
        if mark not in decoded and "".join(mark.split()) in "".join(with_special.split()):
            marks_by_first_id.setdefault(ids[0], []).append((ids, mark))
    return {first: sorted(marks, key=lambda pair: -len(pair[0])) for first, marks in marks_by_first_id.items()}
