"""Checks that compare student and teacher without rollouts: tokens, end of turn, chat templates, precision."""

import difflib
from collections.abc import Iterator

import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from opd.data.prompts import decodes_to_itself, loses_text, short
from opd.data.tokenizers import Severity
from opd.teachers.local import LocalTeacher
from opd.teachers.remote import HiddenTeacher, LogpTeacher
from opd.training.doctor.findings import Finding, Level, error, note, ok, teacher_label, warning
from opd.training.session import Session

LEVELS = {Severity.NOTE: Level.NOTE, Severity.WARNING: Level.WARNING, Severity.REFUSE: Level.ERROR}
TEXTS = 64  # prompts whose text is encoded and decoded again
LOST = 0.05  # share of texts that lose characters other than blanks, above which a tokenizer is an error
SHOWN = 2000  # characters of a rendered prompt
MARK = "5"  # an answer whose end is easy to locate in the rendered chat


def vocabulary(session: Session) -> Iterator[Finding]:
    """Report differences in token ids, LM head sizes, stop ids and special tokens, from `agreement`."""
    for name, agreement in session.agreements.items():
        yield ok(what=f"all {agreement.vocabulary} ids mean the same to student and {teacher_label(name)}")
        for d in agreement.differences:
            yield Finding(check=d.field, level=LEVELS[d.severity], what=d.text)


def _models(session: Session) -> Iterator[tuple[str, Tokenizer]]:
    yield "student", session.collector.tokenizer
    for name, tokenizer in session.prompts.teacher_tokenizers.items():
        yield teacher_label(name), tokenizer


def turn_end(session: Session) -> Iterator[Finding]:
    """Check that the chat template closes an assistant turn with a token that stops generation."""
    stop = session.collector.student.stop
    conversation = [{"role": "user", "content": "2 + 3"}, {"role": "assistant", "content": MARK}]
    for label, tokenizer in _models(session):
        named = tokenizer.special_tokens_map
        special = ", ".join(f"{x} {named[f'{x}_token']!r}" for x in ("bos", "pad") if f"{x}_token" in named)
        stop_texts = ", ".join(f"{str(tokenizer.decode([i]))!r} ({i})" for i in stop)
        if not tokenizer.chat_template:
            yield ok(what=f"{label}: no chat template; a response stops at {stop_texts}; {special}")
            continue
        try:
            tail = str(tokenizer.apply_chat_template(conversation, tokenize=False)).rpartition(MARK)[2]
        except Exception as failure:  # a chat template is code of the model's author and may raise anything
            yield note(
                what=f"{label}: its template does not write an answered question: {short(str(failure))}",
                why="where its answers end could not be compared with the stop ids",
                do="compare eos_token_id of its generation_config.json with its template by hand",
            )
            continue
        ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
        if set(ids) & set(stop):
            yield ok(what=f"{label}: its template ends an answer with {tail!r}, a stop token; {special}")
            continue
        yield warning(
            what=f"{label}: its template ends an answer with {tail!r}, and responses stop at {stop_texts}"
            if tail.strip()
            else f"{label}: its template writes nothing after an answer, and responses stop at {stop_texts}",
            why="a model trained on this template does not end where sampling stops: it runs to the length limit, and "
            "what it says after its answer is trained on",
            do="add the id of the template's closing token to eos_token_id in generation_config.json, or mend the "
            "template",
        )


def first_token(session: Session) -> Iterator[Finding]:
    """Check that prompts begin with the BOS token if the tokenizer adds it to plain text."""
    first = session.prompts.first(1)[0]
    sides = [("student", session.collector.tokenizer, first.ids)]
    if session.config.teacher_prompt == "own":
        name = f"teacher {first.teacher}".rstrip()
        sides.append((name, session.prompts.teacher_tokenizers[first.teacher], first.teacher_ids))
    for label, tokenizer, ids in sides:
        if "bos_token" not in tokenizer.special_tokens_map or tokenizer("a")["input_ids"][0] != tokenizer.bos_token_id:
            continue
        if ids[0] != tokenizer.bos_token_id:
            yield warning(
                what=f"{label}: its texts begin with {tokenizer.bos_token!r}, and its prompts with "
                f"{tokenizer.decode([ids[0]])!r}",
                why="many models score the whole text badly without their first token",
                do="write {{ bos_token }} at the head of its chat template",
            )


def templates(session: Session) -> Iterator[Finding]:
    """Show the first prompt as both models read it, as a diff; `vocabulary` compares the chat templates themselves."""
    first = session.prompts.first(1)[0]
    student, teacher = session.collector.tokenizer, session.prompts.teacher_tokenizers[first.teacher]
    if first.ids == first.teacher_ids:
        yield ok(what=f"student and teacher read the same {len(first.ids)} tokens")
        return
    read = lambda text, ids: str(text.decode(list(ids))).splitlines()
    student_lines, teacher_lines = read(student, first.ids), read(teacher, first.teacher_ids)
    lines = difflib.unified_diff(student_lines, teacher_lines, "student", "teacher", lineterm="", n=1)
    context = session.plan.context
    yield note(
        what="student and teacher read the first prompt differently" + (f" (--context {context})" if context else ""),
        why="the teacher scores the student's tokens in another context than they were written in",
        do="read it: both should be asked for the same thing; --teacher-prompt same gives it the student's ids",
        detail="\n".join(lines),
    )


def rendered(session: Session) -> Iterator[Finding]:
    """Show the first prompt of each model as text, with its special tokens."""
    prompts = session.prompts.first(TEXTS)
    readers = [("student", session.collector.tokenizer, prompts[0].ids)]
    for name, tokenizer in session.prompts.teacher_tokenizers.items():
        readers += [(teacher_label(name), tokenizer, p.teacher_ids) for p in prompts if p.teacher == name][:1]
    for label, tokenizer, ids in readers:
        text = str(tokenizer.decode(list(ids)))
        detail = text if len(text) <= SHOWN else f"{text[: SHOWN // 2]}\n...\n{text[-SHOWN // 2 :]}"
        yield ok(what=f"{label} reads its first prompt as {len(ids)} tokens", detail=detail)


def round_trip(session: Session) -> Iterator[Finding]:
    """Check that prompts and reference texts are unchanged after encoding and decoding."""
    tokenizer, task = session.collector.tokenizer, session.prompts.task
    rows = task.prompts[:TEXTS]
    texts = [x for p in rows for x in (p.text, p.response, p.answer, *(t["content"] for t in p.messages)) if x]
    changed = [x for x in texts if not decodes_to_itself(tokenizer, x)]
    if not changed:
        yield ok(what=f"{len(texts)} texts of {len(rows)} prompts decode to themselves")
        return
    x = changed[0]
    back = str(tokenizer.decode(tokenizer(x, add_special_tokens=False)["input_ids"]))
    position = next((i for i, (a, b) in enumerate(zip(x, back, strict=False)) if a != b), min(len(x), len(back)))
    lost = sum(loses_text(tokenizer, text) for text in changed)
    yield (error if lost > LOST * len(texts) else warning)(
        what=f"{len(changed)} of {len(texts)} texts change on the way to ids and back: {short(x[position:])} becomes "
        f"{short(back[position:])}",
        why="the model cannot read, and the verifier cannot see, what the tokenizer loses",
        do="take a tokenizer that spells these characters, or clean the prompts",
    )


def precision(session: Session) -> Iterator[Finding]:
    """Check the dtypes of the trained weights and of the frozen teachers, and the compute dtype."""
    trained = [p for p in session.student.parameters() if p.requires_grad]
    low = {str(p.dtype).removeprefix("torch.") for p in trained if p.dtype != torch.float32}
    if low:
        yield error(
            what=f"{sum(p.dtype != torch.float32 for p in trained)} trained tensors are {', '.join(sorted(low))}",
            why="a step of --lr is smaller than their spacing: at lr 1e-6 bf16 leaves 98 % of the weights as they were",
            do="load the student in fp32; --precision bf16 computes in bf16 over fp32 weights",
        )
    for name, teacher in session.teachers.items():
        if isinstance(teacher, LocalTeacher) and teacher.model.dtype == torch.float16:
            yield warning(
                what=f"{teacher_label(name)} is float16",
                why="its states overflow above 65504, and bf16 models reach that",
                do="--teacher-precision bf16 or fp32",
            )
    if session.config.precision == "bf16" and session.accelerator.device.type == "cpu":
        yield note(
            what="--precision bf16 on a CPU",
            why="few CPUs compute bf16 faster than fp32, and it rounds",
            do="compare the time of a step with --precision fp32",
        )
    if not low:
        yield ok(what=f"{sum(p.numel() for p in trained):,} trained numbers in fp32")


def server(session: Session) -> Iterator[Finding]:
    """Report whether a teacher behind a server was verified against local weights (--teacher-local)."""
    for name, teacher in session.teachers.items():
        if not isinstance(teacher, HiddenTeacher | LogpTeacher):
            continue
        label, local = teacher_label(name), session.config.remote.teacher_local
        if local and not name:  # `verify_local_copy` raised Refusal if they differ
            yield ok(what=f"{label} and {local} give the same log-probs to the same tokens")
            continue
        yield note(
            what=f"{label}: what {teacher.client.url} says was not compared with its weights",
            why="another checkpoint, template or precision there is invisible here",
            do="--teacher-local MODEL compares the two on the first prompts, where the weights fit",
        )
