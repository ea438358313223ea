"""Comparison of the tokenizers of student and teacher: token ids, LM head rows, stop tokens and chat templates.

`compare_tokenizers` compares two tokenizers, and `require` refuses a pair whose ids differ.  No weights are needed.
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from transformers import PreTrainedTokenizerBase as Tokenizer

from opd.core.errors import Refusal
from opd.core.sampling import Prompt
from opd.data.prompts import render, short


class Severity(StrEnum):
    """The severity of a difference: nothing to do (NOTE), check it (WARNING), or use other models (REFUSE)."""

    NOTE = "note"
    WARNING = "warning"
    REFUSE = "refuse"


@dataclass(frozen=True)
class Difference:
    """A difference between two models, with a line on what differs, why it matters and what to do."""

    field: str
    severity: Severity
    text: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.field}: {self.text}"


@dataclass(frozen=True, kw_only=True)
class TokenizerAgreement:
    """The result of comparing two tokenizers, valid for training only if `require` accepts it."""

    vocabulary: int  # both LM heads and the sampler are cut to ids 0 .. vocabulary - 1
    stop: tuple[int, ...]  # ids that end a response: the student's, then those of the teacher only
    differences: tuple[Difference, ...]

    @property
    def refusals(self) -> tuple[Difference, ...]:
        return tuple(d for d in self.differences if d.severity is Severity.REFUSE)

    def __str__(self) -> str:
        head = f"{self.vocabulary} ids in common; a response stops at {', '.join(map(str, self.stop)) or 'nothing'}"
        return "\n".join((head, *map(str, self.differences)))


class _Model:
    """The properties of a model that `compare_tokenizers` compares."""

    def __init__(self, role: str, tokenizer: Tokenizer, rows: int, eos: tuple[int, ...]) -> None:
        self.role, self.tokenizer, self.rows, self.eos = role, tokenizer, rows, eos
        self.ids = {**tokenizer.get_vocab(), **tokenizer.get_added_vocab()}
        self.tokens = {i: token for token, i in self.ids.items()}
        self.named = tokenizer.special_tokens_map  # by field
        # BOS, EOS, padding and unknown tokens, without other special tokens (for images or audio).
        self.known = {self.named[field] for field in _ADVICE if field in self.named}

    def show(self, ids: Iterable[int]) -> str:
        """Return ids as readable text: each token with its id."""
        return ", ".join(f"{self.tokens[i]!r} ({i})" if i in self.tokens else f"no token ({i})" for i in ids) or "none"


_QUESTION = {"role": "user", "content": "What is 2 + 3?"}
_CONVERSATIONS: Mapping[str, tuple[Mapping[str, str], ...]] = {
    "one question": (_QUESTION,),
    "a system turn": ({"role": "system", "content": "Be brief."}, _QUESTION),
    "three turns": (_QUESTION, {"role": "assistant", "content": "5"}, _QUESTION),
}
# Texts that tokenizers with the same vocabulary may split differently: digits, spaces, accents (composed or not), CJK,
# contractions.
_SAMPLES = (
    "\\boxed{12345.67}",
    "  f(x):\n\treturn x**2\n\n",
    "naïve e\u0301",
    "3\u00d74=12; 数学 🙂",
    "I don't  know.",
)
_ADVICE = {
    "bos_token": "a teacher that reads the student's prompt lacks its own first token and scores badly: let each model "
    "render its own prompt (--teacher-prompt own)",
    "eos_token": "nothing to do: where a response stops is read from the generation configs (see eos)",
    "pad_token": "nothing to do: padding is masked and never scored",
    "unk_token": "text that neither can spell reads differently to each: look for it in your prompts",
}


def compare_tokenizers(
    student: Tokenizer,
    teacher: Tokenizer,
    *,
    student_rows: int,
    teacher_rows: int,
    student_eos: tuple[int, ...],
    teacher_eos: tuple[int, ...],
) -> TokenizerAgreement:
    """Compare token maps, rows of the LM heads, stop ids, special tokens and chat templates; never raises Refusal.

    Both vocabularies are cut after the last shared token, not at the smaller LM head.  A padding row beyond that token
    has a logit but no text, and engines do sample such rows (vllm#13175, NeMo-RL#237).  The results therefore do not
    depend on the padding of the head.  The cut is a prefix: an id below it without a token stays in (note `holes`).
    """
    s = _Model("student", student, student_rows, student_eos)
    t = _Model("teacher", teacher, teacher_rows, teacher_eos)
    top = max((*s.tokens, *t.tokens)) + 1
    shared = next((i for i in range(top) if s.tokens.get(i) != t.tokens.get(i)), top)
    vocabulary = min(shared, student_rows, teacher_rows)
    student_stop = sorted(i for i in set(student_eos) if i in s.tokens and i < vocabulary)
    teacher_stop = sorted(i for i in set(teacher_eos) - set(student_stop) if i in t.tokens and i < vocabulary)
    stop = (*student_stop, *teacher_stop)
    differences = [*_compare_token_maps(s, t, shared), *_compare_head_rows(s, t, vocabulary)]
    differences += [*_compare_stop_ids(s, t, stop), *_compare_special_tokens(s, t)]
    differences += [*_compare_segmentation(s, t), *_compare_templates(s, t)]
    return TokenizerAgreement(vocabulary=vocabulary, stop=stop, differences=tuple(differences))


def require(agreement: TokenizerAgreement) -> TokenizerAgreement:
    """Return the agreement unchanged.  Raises Refusal, with the first such difference, if any has severity REFUSE."""
    if not agreement.refusals:
        return agreement
    first, *further = agreement.refusals
    suffix = f" (and {len(further)} more: {', '.join(d.field for d in further)})" if further else ""
    raise Refusal(f"{first.field}: {first.text}{suffix}")


def template_difference(student: Tokenizer, teacher: Tokenizer) -> str:
    """Return a readable diff of how two models render the same conversations, "" if equal; no template arguments."""
    out: list[str] = []
    for title, turns in _CONVERSATIONS.items():
        (a, student_ids), (b, teacher_ids) = _rendered(student, turns), _rendered(teacher, turns)
        if student_ids == teacher_ids:
            continue
        student_lines, teacher_lines = (text.replace("\n", "⏎\n").split("\n") for text in (a, b))
        if a == b:  # the same text, but tokenized differently
            student_lines, teacher_lines = (
                [f"{token} ({i})" for token, i in zip(tokenizer.convert_ids_to_tokens(list(ids)), ids, strict=True)]
                for tokenizer, ids in ((student, student_ids), (teacher, teacher_ids))
            )
        out += difflib.unified_diff(student_lines, teacher_lines, f"student, {title}", f"teacher, {title}", lineterm="")
    return "\n".join(out)


def token_texts(tokenizer: Tokenizer, ids: Iterable[int]) -> dict[int, str]:
    """Return the text of each token inside a response, with its spaces; the token's name for a partial character."""
    context = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]  # without it a token may lose its space
    prefix = str(tokenizer.decode(context))
    decoded = {i: str(tokenizer.decode([*context, i], clean_up_tokenization_spaces=False)) for i in sorted(set(ids))}
    texts = {i: text.removeprefix(prefix) for i, text in decoded.items()}
    partial = [i for i, text in texts.items() if not text or "\ufffd" in text]
    return texts | dict(zip(partial, map(str, tokenizer.convert_ids_to_tokens(partial)), strict=True))


def _compare_token_maps(s: _Model, t: _Model, shared: int) -> Iterator[Difference]:
    """Report tokens whose id differs or that only one model has, because their log-probs would be of another token."""
    moved = sorted((x for x in s.ids.keys() & t.ids.keys() if s.ids[x] != t.ids[x]), key=s.ids.__getitem__)
    student_only = sorted(s.ids.keys() - t.ids.keys(), key=s.ids.__getitem__)
    teacher_only = sorted(t.ids.keys() - s.ids.keys(), key=t.ids.__getitem__)
    if not (moved or student_only or teacher_only):
        return
    examples = [f"{x!r} is {s.ids[x]} to the student, {t.ids[x]} to the teacher" for x in moved[:3]]
    examples += [f"{x!r} ({s.ids[x]}) only the student has" for x in student_only[:3]]
    examples += [f"{x!r} ({t.ids[x]}) only the teacher has" for x in teacher_only[:3]]
    text = (
        f"{len(moved)} tokens have another id, {len(student_only)} only the student has, {len(teacher_only)} "
        f"only the teacher: {'; '.join(examples)}. An id would be scored as another token: take a teacher with the "
        "student's tokenizer, or a method whose teacher only writes (omniopd, ropd)"
    )
    if not moved and not (student_only and teacher_only):
        text += (
            f"; ids below {shared} agree, so if the extra tokens may be lost, replace the tokenizer files of the model "
            "that has more by the other's"
        )
    yield Difference("tokens", Severity.REFUSE, text)


def _compare_head_rows(s: _Model, t: _Model, vocabulary: int) -> Iterator[Difference]:
    """Compare LM head rows with tokens: padding rows are cut, and a token without a row cannot be used."""
    for side in (s, t):
        rowless = sorted(i for i in side.tokens if i >= side.rows)
        if not rowless:
            continue
        added, template = side.tokenizer.get_added_vocab(), str(side.tokenizer.chat_template or "")
        # A text-only Gemma 3 has '<image_soft_token>' just past its last row; it works unless a prompt has that token.
        tokens = [side.tokens[i] for i in rowless]
        needed = any(x not in added or x in side.known or x in template for x in tokens)
        yield Difference(
            "rows",
            Severity.REFUSE if needed else Severity.WARNING,
            f"the {side.role}'s head has {side.rows} rows, and {len(rowless)} of its tokens none: "
            f"{side.show(rowless[:3])}; they are never drawn, and a prompt that holds one fails: use the tokenizer "
            f"these weights came with, or resize_token_embeddings({rowless[-1] + 1}) and train the new rows",
        )
    if s.ids == t.ids and vocabulary < max(s.rows, t.rows):
        yield Difference(
            "rows",
            Severity.NOTE,
            f"{s.rows} rows (student) and {t.rows} (teacher) for one vocabulary: both heads and the sampler are cut to "
            f"the first {vocabulary} ids, since a row without a token could be drawn but not read; nothing to do",
        )
    if holes := [i for i in range(vocabulary) if i not in s.tokens]:
        yield Difference(
            "holes",
            Severity.NOTE,
            f"{len(holes)} ids below {vocabulary} have a row but no token (first {holes[0]}): they decode to nothing; "
            "nothing to do unless such ids turn up in responses",
        )


def _compare_stop_ids(s: _Model, t: _Model, stop: tuple[int, ...]) -> Iterator[Difference]:
    """Compare stop ids: a teacher that stops at another token gives the student's stop token almost no probability."""
    if not stop:
        yield Difference(
            "eos",
            Severity.REFUSE,
            f"no stop id of the student ({s.show(s.eos)}) or teacher ({t.show(t.eos)}) is a token of both, "
            "so no response would end: correct eos_token_id in generation_config.json",
        )
    elif set(s.eos) != set(t.eos):
        yield Difference(
            "eos",
            Severity.WARNING,
            f"the student stops at {s.show(s.eos)}, the teacher at {t.show(t.eos)}; rollouts stop at any of them. "
            "Scored apart, the teacher calls the student's ending impossible and responses grow without end: keep the "
            "stop token `canonical` (one class) or `mask` it",
        )
    for side in (s, t):
        if absent := [i for i in side.eos if stop and i not in stop]:
            yield Difference(
                "eos",
                Severity.WARNING,
                f"{side.show(absent)} in the {side.role}'s generation config cannot be used (no token, or no row "
                "in both heads) and is dropped from the stop set: correct its eos_token_id",
            )
        last = side.ids.get(side.named.get("eos_token", ""))
        if last is not None and last not in side.eos:
            yield Difference(
                "eos",
                Severity.WARNING,
                f"the {side.role}'s tokenizer ends with {side.show((last,))} but its generation config stops at "
                f"{side.show(side.eos)}: responses may run to the length limit: add {last} to its eos_token_id",
            )


def _compare_special_tokens(s: _Model, t: _Model) -> Iterator[Difference]:
    """Compare the named special tokens (BOS, EOS, padding, unknown) and the set of all other special tokens."""
    for field, advice in _ADVICE.items():
        student_token, teacher_token = (side.named.get(field, "none") for side in (s, t))
        if student_token != teacher_token:
            severity = Severity.WARNING if field == "bos_token" else Severity.NOTE
            yield Difference(field, severity, f"{student_token!r} (student) and {teacher_token!r} (teacher): {advice}")
    student_tokens, teacher_tokens = ({*side.tokenizer.all_special_tokens} - s.known - t.known for side in (s, t))
    if single := sorted(student_tokens ^ teacher_tokens):
        yield Difference(
            "special tokens",
            Severity.NOTE,
            f"special to one model only: {', '.join(map(repr, single))}; verifiers read the student's decoding, which "
            "drops the student's special tokens: nothing to do unless an answer uses one",
        )


def _compare_segmentation(s: _Model, t: _Model) -> Iterator[Difference]:
    """Compare how equal vocabularies split text: merges, normaliser and digit rules may still differ."""
    for sample in _SAMPLES if s.ids == t.ids else ():
        student_ids, teacher_ids = (x.tokenizer(sample, add_special_tokens=False)["input_ids"] for x in (s, t))
        if student_ids != teacher_ids:
            student_split, teacher_split = (" ".join(repr(s.tokens[i]) for i in x) for x in (student_ids, teacher_ids))
            yield Difference(
                "segmentation",
                Severity.WARNING,
                f"the same tokens, but {sample!r} is {student_split} to the student and {teacher_split} to the "
                "teacher: the teacher scores spellings it never saw and pulls the student away from its own: take a "
                "teacher whose tokenizer.json is the student's",
            )
            return


def _compare_templates(s: _Model, t: _Model) -> Iterator[Difference]:
    """Compare chat templates by the text they render, because their sources may differ without effect."""
    plain = "reads the plain text of the messages, joined by blank lines"
    without = [side.role for side in (s, t) if not side.tokenizer.chat_template]
    if len(without) == 2:
        yield Difference(
            "chat template", Severity.NOTE, f"neither model has one: each {plain}; nothing to do for base models"
        )
    elif without:
        yield Difference(
            "chat template",
            Severity.WARNING,
            f"the {without[0]} has none and {plain}; the other reads its template. The teacher then scores in another "
            "context than the student wrote in: give the one without a template the other's (chat_template in "
            "tokenizer_config.json), or use --teacher-prompt same",
        )
    elif s.tokenizer.chat_template != t.tokenizer.chat_template:
        for title, turns in _CONVERSATIONS.items():
            (a, student_ids), (b, teacher_ids) = _rendered(s.tokenizer, turns), _rendered(t.tokenizer, turns)
            if a == b or not (student_ids or teacher_ids):
                continue
            position = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            yield Difference(
                "chat template",
                Severity.WARNING,
                f"{title}: the student reads ...{short(a[position:])}, the teacher ...{short(b[position:])}: each "
                "model is asked in its own words unless --teacher-prompt same; "
                "opd.data.tokenizers.template_difference shows all; set system prompts or template arguments so that "
                "both are asked for the same thing",
            )
            return
        yield Difference(
            "chat template",
            Severity.NOTE,
            "written differently, but they read the probed conversations alike; nothing to do",
        )


def _rendered(tokenizer: Tokenizer, turns: tuple[Mapping[str, str], ...]) -> tuple[str, tuple[int, ...]]:
    """Return a rendered conversation as text and ids; if the template refuses it, the reason and no ids."""
    try:
        ids = render(tokenizer, Prompt(messages=turns), chat_template_kwargs={})
    except Refusal as refusal:
        return f"(refused: {refusal})", ()
    return str(tokenizer.decode(list(ids))), ids
