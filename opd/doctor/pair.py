"""Two models side by side: tokens, where turns end, templates; and whether the teacher has something to say.

Each check is `(Probe) -> findings` or, on rollouts, `(Looked) -> findings`.
"""

import difflib
import math
from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from opd.doctor.findings import Finding, Level, ok
from opd.doctor.probe import Looked, Probe, teachers
from opd.metrics import standard_error
from opd.prompts import decodes_to_itself, short
from opd.teachers.local import LocalTeacher
from opd.teachers.server import HiddenTeacher, LogpTeacher
from opd.tokens import Severity

LEVELS = {Severity.NOTE: Level.NOTE, Severity.WARNING: Level.WARNING, Severity.REFUSE: Level.ERROR}
SAME = 1e-4  # nats/token: a teacher that says what the student says
NEAR = 0.1  # nats: no token of such a teacher is further away
FAR = 3.0  # nats/token: hardly one language; or half of log V, where that is less
UNIFORM = 0.98  # of log V: an entropy that knows nothing
LIKED = 0.1  # nats/token: more that a teacher likes an answer after its other prompt
TEXTS = 64  # prompts whose text is sent to ids and back
MARK = "5"  # an answer whose end is easy to find


def vocabulary(probe: Probe) -> Iterator[Finding]:
    """Token -> id over all tokens, heads, stop ids, special tokens; as `opd.tokens.agreement` compared them."""
    for name, agreed in probe.session.agreements.items():
        who = f"teacher {name}".rstrip()
        yield ok("tokens", f"all {agreed.vocabulary} ids mean the same to student and {who}")
        for d in agreed.differences:
            yield Finding(check=d.field, level=LEVELS[d.severity], what=d.text)


def _models(probe: Probe) -> Iterator[tuple[str, Tokenizer]]:
    yield "student", probe.session.collector.tokenizer
    for name, text in probe.session.prompts.teacher_tokenizers.items():
        yield f"teacher {name}".rstrip(), text


def ends(probe: Probe) -> Iterator[Finding]:
    """Is what the chat template ends an answer with a token that ends a response?"""
    stop = probe.session.collector.student.stop
    asked = [{"role": "user", "content": "2 + 3"}, {"role": "assistant", "content": MARK}]
    for who, text in _models(probe):
        named = text.special_tokens_map
        special = ", ".join(f"{x} {named[f'{x}_token']!r}" for x in ("bos", "pad") if f"{x}_token" in named)
        shown = ", ".join(f"{str(text.decode([i]))!r} ({i})" for i in stop)
        if not text.chat_template:
            yield ok("turn end", f"{who}: no chat template; a response stops at {shown}; {special}")
            continue
        try:
            tail = str(text.apply_chat_template(asked, tokenize=False)).rpartition(MARK)[2]
        except Exception as error:  # a template is a program of the model's author and raises what it likes
            yield Finding(
                check="turn end",
                level=Level.NOTE,
                what=f"{who}: its template does not write an answered question: {short(str(error))}",
                why="where its answers end could not be compared with the stop ids",
                do="compare eos_token_id of its generation_config.json with its template by hand",
            )
            continue
        ids = text(tail, add_special_tokens=False)["input_ids"]
        if set(ids) & set(stop):
            yield ok("turn end", f"{who}: its template ends an answer with {tail!r}, a stop token; {special}")
            continue
        yield Finding(
            check="turn end",
            level=Level.WARNING,
            what=f"{who}: its template ends an answer with {tail!r}, and responses stop at {shown}"
            if tail.strip()
            else f"{who}: its template writes nothing after an answer, and responses stop at {shown}",
            why="a model trained on this template does not end where sampling stops: it runs to the length limit, and "
            "what it says after its answer is trained on",
            do="add the id of the template's closing token to eos_token_id in generation_config.json, or mend the "
            "template",
        )


def begins(probe: Probe) -> Iterator[Finding]:
    """Does a prompt begin with the token that all the model's texts begin with?"""
    first = probe.session.prompts.first(1)[0]
    sides = [("student", probe.session.collector.tokenizer, first.ids)]
    if probe.config.teacher_prompt == "own":
        name = f"teacher {first.teacher}".rstrip()
        sides.append((name, probe.session.prompts.teacher_tokenizers[first.teacher], first.teacher_ids))
    for who, text, ids in sides:
        if "bos_token" not in text.special_tokens_map or text("a")["input_ids"][0] != text.bos_token_id:
            continue
        if ids[0] != text.bos_token_id:
            yield Finding(
                check="bos",
                level=Level.WARNING,
                what=f"{who}: its texts begin with {text.bos_token!r}, and its prompts with {text.decode([ids[0]])!r}",
                why="many models score the whole text badly without their first token",
                do="write {{ bos_token }} at the head of its chat template",
            )


def templates(probe: Probe) -> Iterator[Finding]:
    """The first prompt as both read it; the models' own difference is among those of `vocabulary`."""
    first = probe.session.prompts.first(1)[0]
    own, theirs = probe.session.collector.tokenizer, probe.session.prompts.teacher_tokenizers[first.teacher]
    if first.ids == first.teacher_ids:
        yield ok("prompt", f"student and teacher read the same {len(first.ids)} tokens")
        return
    read = lambda text, ids: str(text.decode(list(ids))).splitlines()
    lines = difflib.unified_diff(
        read(own, first.ids), read(theirs, first.teacher_ids), "student", "teacher", lineterm="", n=1
    )
    told = probe.config.told()
    yield Finding(
        check="prompt",
        level=Level.NOTE,
        what="student and teacher read the first prompt differently" + (f" (--context {told})" if told else ""),
        why="the teacher scores the student's tokens in another context than they were written in",
        do="read it: both should be asked for the same thing; --teacher-prompt same gives it the student's ids",
        detail="\n".join(lines),
    )


def round_trip(probe: Probe) -> Iterator[Finding]:
    """Do prompts and reference texts survive ids and back?"""
    text, task = probe.session.collector.tokenizer, probe.session.prompts.task
    rows = [task.prompts[i] for i in range(min(TEXTS, len(task.prompts)))]
    said = [x for p in rows for x in (p.text, p.response, p.answer, *(t["content"] for t in p.messages)) if x]
    lost = [x for x in said if not decodes_to_itself(text, x)]
    if not lost:
        yield ok("round trip", f"{len(said)} texts of {len(rows)} prompts decode to themselves")
        return
    x = lost[0]
    back = str(text.decode(text(x, add_special_tokens=False)["input_ids"]))
    at = next((i for i, (a, b) in enumerate(zip(x, back, strict=False)) if a != b), min(len(x), len(back)))
    yield Finding(
        check="round trip",
        level=Level.WARNING,
        what=f"{len(lost)} of {len(said)} texts change on the way to ids and back: {short(x[at:])} becomes "
        f"{short(back[at:])}",
        why="the model cannot read, and the verifier cannot see, what the tokenizer loses",
        do="take a tokenizer that spells these characters, or clean the prompts",
    )


def precision(probe: Probe) -> Iterator[Finding]:
    """Types of what is trained and of what is frozen."""
    trained = [p for p in probe.session.student.parameters() if p.requires_grad]
    low = {str(p.dtype).removeprefix("torch.") for p in trained if p.dtype != torch.float32}
    if low:
        yield Finding(
            check="precision",
            level=Level.ERROR,
            what=f"{sum(p.dtype != torch.float32 for p in trained)} trained tensors are {', '.join(sorted(low))}",
            why="a step of --lr is smaller than their spacing: at lr 1e-6 bf16 leaves 98 % of the weights as they were",
            do="load the student in fp32; --precision bf16 computes in bf16 over fp32 weights",
        )
    for name, teacher in probe.session.teachers.items():
        if isinstance(teacher, LocalTeacher) and teacher.model.dtype == torch.float16:
            yield Finding(
                check="precision",
                level=Level.WARNING,
                what=f"teacher {name}".rstrip() + " is float16",
                why="its states overflow above 65504, and bf16 models reach that",
                do="--teacher-precision bf16 or fp32",
            )
    if probe.config.precision == "bf16" and probe.session.accelerator.device.type == "cpu":
        yield Finding(
            check="precision",
            level=Level.NOTE,
            what="--precision bf16 on a CPU",
            why="few CPUs compute bf16 faster than fp32, and it rounds",
            do="compare the time of a step with --precision fp32",
        )
    if not low:
        yield ok("precision", f"{sum(p.numel() for p in trained):,} trained numbers in fp32")


def server(probe: Probe) -> Iterator[Finding]:
    """Does a teacher behind a server say what its weights say here?"""
    for name, teacher in probe.session.teachers.items():
        if not isinstance(teacher, HiddenTeacher | LogpTeacher):
            continue
        who, local = f"teacher {name}".rstrip(), probe.config.remote.teacher_local
        if local:  # `opd.remote.compared` refused it otherwise
            yield ok("server", f"{who} and {local} give the same log-probs to the same tokens")
            continue
        yield Finding(
            check="server",
            level=Level.NOTE,
            what=f"{who}: what {teacher.client.url} says was not compared with its weights",
            why="another checkpoint, template or precision there is invisible here",
            do="--teacher-local MODEL compares the two on the first prompts, where the weights fit",
        )


def finite(looked: Looked) -> Iterator[Finding]:
    """Log-probs that are numbers."""
    batch = looked.rehearsal.batch
    for side in ("student", "teacher"):
        names = [f"{side}_logp", f"{side}_entropy", *(["reverse_kl"] if side == "teacher" else [])]
        columns = [x for x in (getattr(batch, name) for name in names) if x is not None]
        bad = [batch.mask & ~x.isfinite() for x in columns]
        if not any(x.any() for x in bad):
            continue
        where = torch.stack(bad).any(0)
        row, at = where.nonzero()[0].tolist()
        token = int(batch.ids[row, at])
        named = str(looked.probe.session.collector.tokenizer.decode([token]))
        low = looked.probe.config.precision if side == "student" else looked.probe.config.teacher_precision
        yield Finding(
            check="finite",
            level=Level.ERROR,
            what=f"the {side}'s log-probs are not finite on {int(where.sum())} of {int(batch.mask.sum())} tokens, the "
            f"first is {named!r} ({token})",
            why="one such token makes the gradient of its whole batch nan"
            + ("; where the student's own are too, look there first" if side == "teacher" else ""),
            do=f"its states or logits overflow: try --{'' if side == 'student' else 'teacher-'}precision fp32"
            if low != "fp32"
            else "its weights overflow in fp32 already, or mask a token: evaluate that model alone (`opd eval`)",
        )
        return


def distance(looked: Looked) -> Iterator[Finding]:
    """KL(student || teacher) per teacher at the start: has it something to say, in one language?"""
    batch, config = looked.rehearsal.batch, looked.probe.config
    size, several = looked.probe.session.vocabulary.size, len(looked.probe.session.teachers) > 1
    assert batch.student_logp is not None and batch.teacher_logp is not None
    r = batch.teacher_logp - batch.student_logp
    # Where the teacher tells no more: its mean over the student's own tokens is the KL too, quieter than that of -r.
    column = r.exp() - 1 - r if batch.reverse_kl is None else batch.reverse_kl
    for _, who, mask in teachers(looked):
        value, error = float(column[mask].mean()), standard_error(column, mask)
        same = value < SAME and float(r[mask].abs().max()) < NEAR
        line = f"KL(student || {who}) is {value:.4g} +- {error:.2g} nats/token at the start"
        if same and config.told() == "peer":
            yield Finding(
                check="distance",
                level=Level.NOTE,
                what=line,
                why="what peers tell the teacher was not in these rollouts",
                do="look at the reverse KL of the first steps",
            )
        elif same:
            yield Finding(
                check="distance",
                level=Level.WARNING if several else Level.ERROR,
                what=f"{line}: the teacher says what the student says",
                why="there is nothing to learn: every reward is 0",
                do="is it the same model, or --teacher base without a --context that it uses? name another teacher",
            )
        elif value > min(FAR, math.log(size) / 2):
            yield Finding(
                check="distance",
                level=Level.WARNING,
                what=f"{line}: they hardly speak one language",
                why="0.02 to 1.5 is usual; rewards of such size are mostly noise, and the student's text means little "
                "to this teacher",
                do="is a chat template or the tokenizer wrong? else begin with some supervised steps on the teacher's "
                "answers",
            )
        else:
            yield ok("distance", f"{line} (0.02 to 1.5 is usual)")


def uniform(looked: Looked) -> Iterator[Finding]:
    """Models that know nothing."""
    batch, top = looked.rehearsal.batch, math.log(looked.probe.session.vocabulary.size)
    sides = [("student", batch.student_entropy, batch.mask, Level.WARNING)]
    sides += [(who, batch.teacher_entropy, mask, Level.ERROR) for _, who, mask in teachers(looked)]
    for who, column, mask, level in sides:
        if column is not None and (value := float(column[mask].mean())) > UNIFORM * top:
            yield Finding(
                check="uniform",
                level=level,
                what=f"the {who}'s entropy is {value:.3f} nats/token of {top:.3f} that are possible",
                why="it guesses every token: its weights were never trained, or were not loaded",
                do="look at the files of that model: missing tensors are filled with random numbers",
            )


def asked(looked: Looked) -> Iterator[Finding]:
    """Does the teacher like the answers better after its other prompt?"""
    batch, own = looked.rehearsal.batch, looked.probe.config.teacher_prompt == "own"
    if looked.other is None or batch.teacher_logp is None:
        return
    gain = looked.other - batch.teacher_logp
    read, not_read = ("its own template", "the student's") if own else ("the student's ids", "its own template")
    for _, who, mask in teachers(looked):
        value, error = float(gain[mask].mean()), standard_error(gain, mask)
        if value > max(LIKED, 2 * error):
            yield Finding(
                check="teacher prompt",
                level=Level.WARNING,
                what=f"{who} finds the answers {value:.2f} +- {error:.2f} nats/token likelier after {not_read} than "
                f"after {read}, which it reads",
                why="a teacher asked in a template that it does not know scores badly, and its scores are the gradient",
                do=f"--teacher-prompt {'same' if own else 'own'}, or mend its chat_template",
            )
        else:
            yield ok("teacher prompt", f"{who} likes {read} better than {not_read}, by {-value:.2f} nats/token")


BEFORE: Sequence = (vocabulary, ends, begins, templates, round_trip, precision, server)
AFTER: Sequence = (finite, distance, uniform, asked)
