"""Checks of a teacher on a few rollouts: finite log-probs, a useful KL to the student, a prompt in its template."""

import math
from collections.abc import Iterator

import torch

from opd.training.doctor.findings import Finding, error, note, ok, warning
from opd.training.doctor.rehearsal import RehearsedRun, teachers
from opd.training.metrics import standard_error

SAME_KL = 1e-4  # nats/token; below this KL the teacher may be identical to the student
SAME_RATIO = 0.1  # nats; the teacher counts as identical only if every token's log ratio is below this, too
FAR_KL = 3.0  # nats/token; above this KL (or half of log V, if that is less) the models are too far apart
UNIFORM = 0.98  # fraction of log V; an entropy above it means an untrained model
GAIN = 0.1  # nats/token; gain in log-prob after the alternative prompt above which the check warns


def finite(run: RehearsedRun) -> Iterator[Finding]:
    """Check that the log-probs, entropies and KL of student and teacher are finite."""
    batch, config = run.batch, run.session.config
    for side, precision, columns in (
        ("student", config.precision, (batch.student_logp, batch.student_entropy)),
        ("teacher", config.teacher_precision, (batch.teacher_logp, batch.teacher_entropy, batch.reverse_kl)),
    ):
        bad = [batch.mask & ~x.isfinite() for x in columns if x is not None]
        if side == "teacher" and run.session.method.bounded() and batch.teacher_logp is not None:
            bad = [x & (batch.teacher_logp != -torch.inf) for x in bad]
        if not any(x.any() for x in bad):
            continue
        where = torch.stack(bad).any(0)
        token = int(batch.ids[where][0])
        named = str(run.session.collector.tokenizer.decode([token]))
        yield error(
            what=f"the {side}'s log-probs are not finite on {int(where.sum())} of {int(batch.mask.sum())} tokens, the "
            f"first is {named!r} ({token})",
            why="one such token makes the gradient of its whole batch nan"
            + ("; where the student's own are too, look there first" if side == "teacher" else ""),
            do=f"its states or logits overflow: try --{'' if side == 'student' else 'teacher-'}precision fp32"
            if precision != "fp32"
            else "its weights overflow in fp32 already, or mask a token: evaluate that model alone (`opd eval`)",
        )
        return


def distance(run: RehearsedRun) -> Iterator[Finding]:
    """Check KL(student || teacher) per teacher at the start: neither zero nor too large to learn from."""
    batch, same_level = run.batch, warning if len(run.session.teachers) > 1 else error
    assert batch.student_logp is not None and batch.teacher_logp is not None
    r = batch.teacher_logp - batch.student_logp
    # Without the full distribution, the mean of exp(r) - 1 - r over the student's tokens estimates the same KL (k3),
    # with less noise than the mean of -r.
    column = r.exp() - 1 - r if batch.reverse_kl is None else batch.reverse_kl
    for label, mask in teachers(run):
        value, margin = float(column[mask].mean()), standard_error(column, mask)
        same = value < SAME_KL and float(r[mask].abs().max()) < SAME_RATIO
        line = f"KL(student || {label}) is {value:.4g} +- {margin:.2g} nats/token at the start"
        if same and run.session.plan.context == "peer":
            yield note(
                what=line,
                why="what peers tell the teacher was not in these rollouts",
                do="look at the reverse KL of the first steps",
            )
        elif same:
            yield same_level(
                what=f"{line}: the teacher says what the student says",
                why="there is nothing to learn: every reward is 0",
                do="is it the same model, or --teacher base without a --context that it uses? name another teacher",
            )
        elif value > min(FAR_KL, math.log(run.session.vocabulary.size) / 2):
            yield warning(
                what=f"{line}: they hardly speak one language",
                why="0.02 to 1.5 is usual; rewards of such size are mostly noise, and the student's text means little "
                "to this teacher",
                do="is a chat template or the tokenizer wrong? else begin with some supervised steps on the teacher's "
                "answers",
            )
        else:
            yield ok(what=f"{line} (0.02 to 1.5 is usual)")


def uniform(run: RehearsedRun) -> Iterator[Finding]:
    """Check that no model is close to the uniform distribution, as untrained weights are."""
    batch, top = run.batch, math.log(run.session.vocabulary.size)
    sides = [("student", batch.student_entropy, batch.mask, warning)]
    sides += [(label, batch.teacher_entropy, mask, error) for label, mask in teachers(run)]
    for label, column, mask, level in sides:
        if column is not None and (value := float(column[mask].mean())) > UNIFORM * top:
            yield level(
                what=f"the {label}'s entropy is {value:.3f} nats/token of {top:.3f} that are possible",
                why="it guesses every token: its weights were never trained, or were not loaded",
                do="look at the files of that model: missing tensors are filled with random numbers",
            )


def prompt_template(run: RehearsedRun) -> Iterator[Finding]:
    """Check that the teacher does not assign higher log-probs to the responses after its alternative prompt."""
    batch, own_prompt = run.batch, run.session.config.teacher_prompt == "own"
    if run.alternative_logp is None or batch.teacher_logp is None:
        return
    gain = run.alternative_logp - batch.teacher_logp
    read, not_read = ("its own template", "the student's") if own_prompt else ("the student's ids", "its own template")
    for label, mask in teachers(run):
        value, margin = float(gain[mask].mean()), standard_error(gain, mask)
        if value > max(GAIN, 2 * margin):
            yield warning(
                what=f"{label} finds the answers {value:.2f} +- {margin:.2f} nats/token likelier after {not_read} than "
                f"after {read}, which it reads",
                why="a teacher asked in a template that it does not know scores badly, and its scores are the gradient",
                do=f"--teacher-prompt {'same' if own_prompt else 'own'}, or mend its chat_template",
            )
        else:
            yield ok(what=f"{label} likes {read} better than {not_read}, by {-value:.2f} nats/token")
