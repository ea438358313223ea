"""Expected answers and options of a row, `answer_texts(value) -> texts`: each text as the data gave it."""

import json
import re
from collections.abc import Mapping, Sequence
from string import ascii_uppercase as LETTERS

from opd.data.tasks.conversation import Unusable, parsed, without_nulls
from opd.data.tasks.row_files import Number

# Fields of published sets whose mapping contains acceptable answers: Search-R1, TriviaQA, SQuAD.
ANSWER_FIELDS = (
    ("target",),
    ("value", "aliases", "type", "normalized_value", "normalized_aliases", "matched_wiki_entity_name",
     "normalized_matched_wiki_entity_name"),
    ("text", "answer_start"),
)  # fmt: skip


def value_text(value: object, joint: str = ", ") -> str:
    """Return a value as text: 27.0 becomes 27, a list is joined, and a missing value becomes ""."""
    if isinstance(value, list | tuple):
        return joint.join(value_text(item, joint) for item in value)
    if isinstance(value, Mapping):
        return (
            value_text(value["content"], joint) if "content" in value else json.dumps(without_nulls(value), default=str)
        )
    if value is None or value != value:  # NaN, the missing value of a column of numbers
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Number):
        return value.text.removesuffix(".0")
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def answer_texts(value: object) -> tuple[str, ...]:
    """Return the acceptable answers that a value contains, without empty ones: a list contains several."""
    if isinstance(value, Mapping) and "content" not in value:
        fields = {key: field for key, field in value.items() if field is not None}
        name = next((names[0] for names in ANSWER_FIELDS if set(names[:1]) <= fields.keys() <= set(names)), "")
        if not name:
            raise Unusable(f"the answer is a mapping with {', '.join(fields)}; name one of them, as COLUMN.FIELD")
        return answer_texts([fields[name], fields.get("aliases")])
    if not isinstance(value, list | tuple):
        text = value_text(value)
        return (text,) if text.strip() else ()
    return tuple(dict.fromkeys(text for item in value for text in answer_texts(item)))


def option_texts(value: object) -> tuple[list[str], list[str]]:
    """Return the labels (empty if the data has none) and the texts of the options of a multiple-choice question.

    Raises Unusable for a form that is not known, and for more options than letters.
    """
    labels: Sequence[object] = ()
    value = parsed(value) or value if isinstance(value, str) else value
    if value is None:
        texts: Sequence[object] = ()
    elif isinstance(value, Mapping) and {"label", "text"} <= value.keys():
        labels, texts = value["label"] or (), value["text"] or ()
    elif isinstance(value, Mapping):
        value = {label: text for label, text in value.items() if text is not None and text != ""}
        labels, texts = tuple(value), tuple(value.values())
    elif isinstance(value, list | tuple) and all(isinstance(option, Mapping) for option in value):
        names = next(((a, b) for a, b in (("label", "text"), ("key", "value")) if value and a in value[0]), None)
        if value and (names is None or any(name not in option for option in value for name in names)):
            raise Unusable(f"the options {str(value)[:80]} are mappings without label and text")
        labels, texts = ([option[name] for option in value] for name in names or ("", ""))
    elif isinstance(value, list | tuple):
        texts = value
    else:
        raise Unusable(f"the options are {str(value)[:80]!r}: write a list of texts")
    if len(texts) > len(LETTERS):
        raise Unusable(
            f"{len(texts)} options, and there are {len(LETTERS)} letters for them; remove options or the row"
        )
    return [value_text(label) for label in labels], [value_text(text) for text in texts]


def chosen(value: object, labels: Sequence[str], texts: Sequence[str]) -> tuple[str, ...]:
    """Return the letters of the right options.  Raises Unusable for an answer that is none of the options."""
    letters = LETTERS[: len(texts)]
    if isinstance(value, list | tuple):
        if len(value) == len(texts) and {*map(value_text, value)} <= {"0", "1"}:  # 1 marks a right option
            return tuple(letter for letter, mark in zip(letters, value, strict=True) if value_text(mark) == "1")
        return tuple(dict.fromkeys(letter for item in value for letter in chosen(item, labels, texts)))
    answer = value_text(value)
    if not answer.strip():
        return ()
    if answer in labels:
        return (letters[labels.index(answer)],)
    if isinstance(value, int | float) and not isinstance(value, bool) and value in range(len(texts)):
        return (letters[int(value)],)
    by_text = tuple(letter for letter, text in zip(letters, texts, strict=True) if text == answer)
    by_number = letters[int(answer)] if re.fullmatch(r"\d{1,2}", answer, re.ASCII) and int(answer) < len(texts) else ""
    if by_text and by_number and by_number not in by_text:
        raise Unusable(
            f"the answer {answer!r} is the text of option {by_text[0]}, and the number from 0 of option {by_number}: "
            "write the letter"
        )
    if by_text or by_number:
        return by_text or (by_number,)
    letter = answer.strip(" ().").upper()
    if len(letter) == 1 and letter in letters:
        return (letter,)
    raise Unusable(
        f"the answer {answer[:80]!r} is none of the {len(texts)} options: a number from 0, a label or a text"
    )
