"""Comparison of the tokenizers of student and teacher: token ids, LM head rows, stop tokens and chat templates.

`agreement` compares two tokenizers, and `require` refuses a pair whose ids differ.  No weights are needed.
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from transformers import PreTrainedTokenizerBase

from opd.core.errors import Refusal
from opd.core.sampling import Prompt
from opd.data.prompts import render, short


class Severity(StrEnum):
    """The severity of a difference: nothing to do (NOTE), check it (WARNING), or use other models (REFUSE)."""

    NOTE = "note"
    WARNING = "warning"
    REFUSE = "refuse"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A difference between two models: both values, and a line on what differs, why it matters and what to do."""

    field: str
    student: str
    teacher: str
    severity: Severity
    text: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.field}: {self.text}"


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """The result of comparing two tokenizers.

    `vocabulary` is valid for training only if no difference has the severity REFUSE; `require` checks that.
    """

    vocabulary: int  # both LM heads and the sampler are cut to ids 0 .. vocabulary - 1
    stop: tuple[int, ...]  # ids that end a response: the student's, then those of the teacher only
    differences: tuple[Difference, ...]

    @property
    def refusals(self) -> tuple[Difference, ...]:
        """Return the differences that make training meaningless."""
        return tuple(d for d in self.differences if d.severity is Severity.REFUSE)

    def __str__(self) -> str:
        head = f"{self.vocabulary} ids in common; a response stops at {', '.join(map(str, self.stop)) or 'nothing'}"
        return "\n".join((head, *map(str, self.differences)))


@dataclass(frozen=True, kw_only=True)
class _Side:
    """The properties of a model that `agreement` compares."""

    who: str
    tokenizer: PreTrainedTokenizerBase
    rows: int
    eos: tuple[int, ...]
    ids: Mapping[str, int]  # token to id, including added tokens
    names: Mapping[int, str]

    def show(self, ids: Iterable[int]) -> str:
        """Return ids as readable text: each token with its id."""
        return ", ".join(f"{self.names[i]!r} ({i})" if i in self.names else f"no token ({i})" for i in ids) or "none"

    @property
    def named(self) -> set[str]:
        """Return the BOS, EOS, padding and unknown tokens, without other special tokens (for images or audio)."""
        return {token for field, token in self.tokenizer.special_tokens_map.items() if field in _ADVICE}


_ASK = {"role": "user", "content": "What is 2 + 3?"}
_CONVERSATIONS: Mapping[str, tuple[Mapping[str, str], ...]] = {
    "one question": (_ASK,),
    "a system turn": ({"role": "system", "content": "Be brief."}, _ASK),
    "three turns": (_ASK, {"role": "assistant", "content": "5"}, _ASK),
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


def agreement(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    *,
    student_rows: int,
    teacher_rows: int,
    student_eos: tuple[int, ...],
    teacher_eos: tuple[int, ...],
) -> Agreement:
    """Compare token maps, LM head rows, stop ids, special tokens and chat templates; never raises Refusal.

    Both vocabularies are cut after the last shared token, not at the smaller LM head.  A padding row beyond that token
    has a logit but no text, and engines do sample such rows (vllm#13175, NeMo-RL#237).  The results therefore do not
    depend on the padding of the head.  The cut is a prefix: an id below it without a token stays in (note `holes`).

    Args:
        student: the student's tokenizer.
        teacher: the teacher's tokenizer.
        student_rows: rows of the student's LM head.
        teacher_rows: rows of the teacher's LM head.
        student_eos: stop ids of the student.
        teacher_eos: stop ids of the teacher.
    """
    s, t = _side("student", student, student_rows, student_eos), _side("teacher", teacher, teacher_rows, teacher_eos)
    top = max((*s.names, *t.names)) + 1
    shared = next((i for i in range(top) if s.names.get(i) != t.names.get(i)), top)
    vocabulary = min(shared, student_rows, teacher_rows)
    own = sorted(i for i in set(student_eos) if i in s.names and i < vocabulary)
    theirs = sorted(i for i in set(teacher_eos) - set(own) if i in t.names and i < vocabulary)
    stop = (*own, *theirs)
    found = [*_map(s, t, shared), *_rows(s, t, vocabulary), *_stops(s, t, stop), *_specials(s, t)]
    return Agreement(vocabulary=vocabulary, stop=stop, differences=(*found, *_segmentation(s, t), *_templates(s, t)))


def require(agreed: Agreement) -> Agreement:
    """Return the agreement unchanged.  Raises Refusal, with the first such difference, if any has severity REFUSE."""
    if not agreed.refusals:
        return agreed
    first, *others = agreed.refusals
    more = f" (and {len(others)} more: {', '.join(d.field for d in others)})" if others else ""
    raise Refusal(f"{first.field}: {first.text}{more}")


def template_difference(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> str:
    """Return a readable diff of how two models render the same conversations, "" if equal; no template arguments."""
    out: list[str] = []
    for title, turns in _CONVERSATIONS.items():
        (a, ids), (b, other) = _read(student, turns), _read(teacher, turns)
        if ids == other:
            continue
        left, right = a.replace("\n", "⏎\n").split("\n"), b.replace("\n", "⏎\n").split("\n")
        if a == b:  # the same text, but tokenized differently
            left = [f"{token} ({i})" for token, i in zip(student.convert_ids_to_tokens(list(ids)), ids, strict=True)]
            right = [
                f"{token} ({i})" for token, i in zip(teacher.convert_ids_to_tokens(list(other)), other, strict=True)
            ]
        out += difflib.unified_diff(left, right, f"student, {title}", f"teacher, {title}", lineterm="")
    return "\n".join(out)


def spelled(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> dict[int, str]:
    """Return the text of each token inside a response, with its spaces; the token's name for a partial character."""
    before = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]  # context: a first token may lose its space
    start = str(tokenizer.decode(before))
    whole = {i: str(tokenizer.decode([*before, i], clean_up_tokenization_spaces=False)) for i in sorted(set(ids))}
    cut = {i: text.removeprefix(start) for i, text in whole.items()}
    broken = [i for i, text in cut.items() if not text or "\ufffd" in text]
    return cut | dict(zip(broken, map(str, tokenizer.convert_ids_to_tokens(broken)), strict=True))


def _side(who: str, tokenizer: PreTrainedTokenizerBase, rows: int, eos: tuple[int, ...]) -> _Side:
    ids = {**tokenizer.get_vocab(), **tokenizer.get_added_vocab()}
    return _Side(who=who, tokenizer=tokenizer, rows=rows, eos=eos, ids=ids, names={i: t for t, i in ids.items()})


def _map(s: _Side, t: _Side, shared: int) -> Iterator[Difference]:
    """Report tokens whose id differs or that only one model has, because their log-probs would be of another token."""
    moved = sorted((x for x in s.ids.keys() & t.ids.keys() if s.ids[x] != t.ids[x]), key=s.ids.__getitem__)
    mine = sorted(s.ids.keys() - t.ids.keys(), key=s.ids.__getitem__)
    theirs = sorted(t.ids.keys() - s.ids.keys(), key=t.ids.__getitem__)
    if not (moved or mine or theirs):
        return
    shown = [f"{x!r} is {s.ids[x]} to the student, {t.ids[x]} to the teacher" for x in moved[:3]]
    shown += [f"{x!r} ({s.ids[x]}) only the student has" for x in mine[:3]]
    shown += [f"{x!r} ({t.ids[x]}) only the teacher has" for x in theirs[:3]]
    nested = not moved and not (mine and theirs)
    copy = (
        f"; ids below {shared} agree, so if the extra tokens may be lost, replace the tokenizer files of the model "
        "that has more by the other's"
    )
    yield Difference(
        field="tokens",
        student=f"{len(s.ids)} tokens",
        teacher=f"{len(t.ids)} tokens",
        severity=Severity.REFUSE,
        text=f"{len(moved)} tokens have another id, {len(mine)} only the student has, {len(theirs)} only the teacher: "
        f"{'; '.join(shown)}. An id would be scored as another token: take a teacher with the student's tokenizer, or "
        f"a method whose teacher only writes (omniopd, ropd){copy if nested else ''}",
    )


def _rows(s: _Side, t: _Side, vocabulary: int) -> Iterator[Difference]:
    """Compare LM head rows with tokens: padding rows are cut, and a token without a row cannot be used."""

    def found(field: str, severity: Severity, text: str) -> Difference:
        return Difference(field=field, student=f"{s.rows}", teacher=f"{t.rows}", severity=severity, text=text)

    for side in (s, t):
        lost = sorted(i for i in side.names if i >= side.rows)
        if not lost:
            continue
        added, template = side.tokenizer.get_added_vocab(), str(side.tokenizer.chat_template or "")
        # A text-only Gemma 3 has '<image_soft_token>' just past its last row; it works unless a prompt has that token.
        used = [x for x in map(side.names.__getitem__, lost) if x not in added or x in side.named or x in template]
        yield found(
            "rows",
            Severity.REFUSE if used else Severity.WARNING,
            f"the {side.who}'s head has {side.rows} rows, and {len(lost)} of its tokens none: "
            f"{side.show(lost[:3])}; they are never drawn, and a prompt that holds one fails: use the tokenizer these "
            f"weights came with, or resize_token_embeddings({lost[-1] + 1}) and train the new rows",
        )
    if s.ids == t.ids and vocabulary < max(s.rows, t.rows):
        yield found(
            "rows",
            Severity.NOTE,
            f"{s.rows} rows (student) and {t.rows} (teacher) for one vocabulary: both heads and the sampler are cut to "
            f"the first {vocabulary} ids, since a row without a token could be drawn but not read; nothing to do",
        )
    holes = [i for i in range(vocabulary) if i not in s.names]
    if holes:
        yield found(
            "holes",
            Severity.NOTE,
            f"{len(holes)} ids below {vocabulary} have a row but no token (first {holes[0]}): they decode to nothing; "
            "nothing to do unless such ids turn up in responses",
        )


def _stops(s: _Side, t: _Side, stop: tuple[int, ...]) -> Iterator[Difference]:
    """Compare stop ids: a teacher that stops at another token gives the student's stop token almost no probability."""

    def found(severity: Severity, text: str) -> Difference:
        return Difference(field="eos", student=s.show(s.eos), teacher=t.show(t.eos), severity=severity, text=text)

    if not stop:
        yield found(
            Severity.REFUSE,
            f"no stop id of the student ({s.show(s.eos)}) or teacher ({t.show(t.eos)}) is a token of both, so no "
            "response would end: correct eos_token_id in generation_config.json",
        )
    elif set(s.eos) != set(t.eos):
        yield found(
            Severity.WARNING,
            f"the student stops at {s.show(s.eos)}, the teacher at {t.show(t.eos)}; rollouts stop at any of them. "
            "Scored apart, the teacher calls the student's ending impossible and responses grow without end: keep the "
            "stop token `canonical` (one class) or `mask` it",
        )
    for side in (s, t):
        absent = [i for i in side.eos if stop and i not in stop]
        if absent:
            yield found(
                Severity.WARNING,
                f"{side.show(absent)} in the {side.who}'s generation config cannot be used (no token, or no row in "
                "both heads) and is dropped from the stop set: correct its eos_token_id",
            )
        last = side.ids.get(side.tokenizer.special_tokens_map.get("eos_token", ""))
        if last is not None and last not in side.eos:
            yield found(
                Severity.WARNING,
                f"the {side.who}'s tokenizer ends with {side.show((last,))} but its generation config stops at "
                f"{side.show(side.eos)}: responses may run to the length limit: add {last} to its eos_token_id",
            )


def _specials(s: _Side, t: _Side) -> Iterator[Difference]:
    """Compare the named special tokens (BOS, EOS, padding, unknown) and the set of all other special tokens."""
    a, b = s.tokenizer.special_tokens_map, t.tokenizer.special_tokens_map
    for field, advice in _ADVICE.items():
        mine, theirs = (x.get(field, "none") for x in (a, b))
        if mine != theirs:
            severity = Severity.WARNING if field == "bos_token" else Severity.NOTE
            text = f"{mine!r} (student) and {theirs!r} (teacher): {advice}"
            yield Difference(field=field, student=mine, teacher=theirs, severity=severity, text=text)
    left, right = ({*x.tokenizer.all_special_tokens} - s.named - t.named for x in (s, t))
    if left != right:
        yield Difference(
            field="special tokens",
            student=", ".join(sorted(left)),
            teacher=", ".join(sorted(right)),
            severity=Severity.NOTE,
            text=f"special to one model only: {', '.join(map(repr, sorted(left ^ right)))}; verifiers read the "
            "student's decoding, which drops the student's special tokens: nothing to do unless an answer uses one",
        )


def _segmentation(s: _Side, t: _Side) -> Iterator[Difference]:
    """Compare how equal vocabularies split text: merges, normaliser and digit rules may still differ."""
    if s.ids != t.ids:
        return
    for sample in _SAMPLES:
        mine, theirs = (x.tokenizer(sample, add_special_tokens=False)["input_ids"] for x in (s, t))
        if mine == theirs:
            continue
        mine, theirs = (" ".join(repr(s.names[i]) for i in ids) for ids in (mine, theirs))
        yield Difference(
            field="segmentation",
            student=mine,
            teacher=theirs,
            severity=Severity.WARNING,
            text=f"the same tokens, but {sample!r} is {mine} to the student and {theirs} to the teacher: the teacher "
            "scores spellings it never saw and pulls the student away from its own: take a teacher whose "
            "tokenizer.json is the student's",
        )
        return


def _templates(s: _Side, t: _Side) -> Iterator[Difference]:
    """Compare chat templates by the text they render, because their sources may differ without effect."""
    mine, theirs = s.tokenizer.chat_template, t.tokenizer.chat_template
    values = {"student": "template" if mine else "none", "teacher": "template" if theirs else "none"}

    def found(severity: Severity, text: str) -> Difference:
        return Difference(field="chat template", severity=severity, text=text, **values)

    plain = "reads the plain text of the messages, joined by blank lines"
    if not mine and not theirs:
        yield found(Severity.NOTE, f"neither model has one: each {plain}; nothing to do for base models")
    elif not mine or not theirs:
        yield found(
            Severity.WARNING,
            f"the {'student' if not mine else 'teacher'} has none and {plain}; the other reads its template. The "
            "teacher then scores in another context than the student wrote in: give the one without a template the "
            "other's (chat_template in tokenizer_config.json), or use --teacher-prompt same",
        )
    elif mine != theirs:
        for title, turns in _CONVERSATIONS.items():
            (a, ids), (b, other) = _read(s.tokenizer, turns), _read(t.tokenizer, turns)
            if a == b or not (ids or other):
                continue
            at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            yield found(
                Severity.WARNING,
                f"{title}: the student reads ...{short(a[at:])}, the teacher ...{short(b[at:])}: each model is asked "
                "in its own words unless --teacher-prompt same; opd.data.tokenizers.template_difference shows all; "
                "set system prompts or template arguments so that both are asked for the same thing",
            )
            return
        yield found(Severity.NOTE, "written differently, but they read the probed conversations alike; nothing to do")


def _read(tokenizer: PreTrainedTokenizerBase, turns: tuple[Mapping[str, str], ...]) -> tuple[str, tuple[int, ...]]:
    """Return a rendered conversation as text and ids; if the template refuses it, the reason and no ids."""
    try:
        ids = render(tokenizer, Prompt(messages=turns), chat_template_kwargs={})
    except Refusal as refusal:
        return f"(refused: {refusal})", ()
    return str(tokenizer.decode(list(ids))), ids
