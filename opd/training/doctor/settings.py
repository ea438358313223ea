"""Checks of a run's settings, prompts and verifier, and of how the student's rollouts end."""

from collections.abc import Iterator

import numpy as np

from opd.config import checks
from opd.core.errors import Refusal, suggestion
from opd.core.sampling import Prompt
from opd.core.types import DATA, RIGHT
from opd.data.prompts import short
from opd.head.backend import backend_name
from opd.teachers.remote import LogpTeacher
from opd.training.doctor.findings import Finding, error, note, ok, teacher_label, warning
from opd.training.doctor.rehearsal import RehearsedRun, sample_rollouts
from opd.training.metrics import repetition
from opd.training.session import Session
from opd.training.trainer import Trainer

VERIFIED = 32  # prompts whose reference answers are verified
FULL = 0.2  # highest learning rate of full fine-tuning times the width: 1e-4 at 2048, 5e-5 at 4096
LORA = (3e-5, 10.0)  # lowest learning rate for LoRA; highest one as a multiple of full fine-tuning's
REPEATS = 0.3  # share of repeated 4-grams in a response above which the check warns
GAP = {"fp32": 0.01, "bf16": 0.3}  # nats on one token; largest difference between trainer and sampler, by precision


def risky_settings(session: Session) -> Iterator[Finding]:
    """Report settings that change what the loss estimates."""
    for line in checks.warnings(session.plan):
        yield warning(what=line)


def compatible(session: Session) -> Iterator[Finding]:
    """Check that teachers, verifier and data provide what the method reads."""
    method, task = session.method, session.prompts.task
    needs_of = lambda teacher: method.needs_of_tokens() if isinstance(teacher, LogpTeacher) else method.needs()
    lacking = {name: sorted(needs_of(teacher) - teacher.provides) for name, teacher in session.teachers.items()}
    missing = {teacher_label(name): ", ".join(columns) for name, columns in lacking.items() if columns}
    for label, columns in missing.items():
        yield error(
            what=f"the method needs {columns} of {label}, which does not give it",
            why="a column would be missing in the first step",
            do="load that teacher here, serve it by `opd serve`, or take a method that needs less",
        )
    peers = session.plan.context == "peer"
    if (peers or "outcome" in method.reads()) and not task.scored:
        yield error(
            what=("the teacher is told right responses" if peers else "the method reads outcomes")
            + f", and nothing scores responses to {task.name}",
            why="every outcome is 0, so " + ("no rollout is trained" if peers else "its weights are constants"),
            do="give the prompts answers and a --verifier, or take another method",
        )
    if "group" in method.reads() and method.rollouts.per_prompt < 2:
        yield warning(
            what="the method compares the rollouts of a prompt, and there is 1",
            why="within a group of one every weight is 1 and every advantage 0 or unchanged",
            do="--per-prompt 4 or more",
        )
    unanswered = [row for row, prompt in enumerate(task.prompts[:VERIFIED]) if not prompt.response]
    if DATA in method.rollouts.source_shares() and unanswered:
        yield error(
            what=f"the method trains on the data's responses, and row {unanswered[0]} has none",
            why="the step that draws it stops the run",
            do="name the column with --response-column, or let the teacher write (--other teacher)",
        )
    if not missing:
        needs = ", ".join(sorted(method.needs() | method.reads() & {"outcome", "group"}))
        yield ok(what=f"what it reads is there: {needs}")


def routes(session: Session) -> Iterator[Finding]:
    """Report how many prompts each teacher scores, and values of --route-column that look like misspelt routes."""
    if not session.config.route:
        return
    names, counts = [name for name in session.teachers if name], session.prompts.route_counts
    yield ok(what=", ".join(f"{counts[name]} prompts of {name}" for name in names) + f", {counts.total()} in all")
    for value in counts.keys() - {"", *names}:
        if meant := suggestion(value, names):
            yield warning(
                what=f"{counts[value]} prompts have {value!r} in --route-column {session.config.route_column}{meant}, "
                "which no --route names, and --teacher scores them",
                do="correct these rows, or add a --route for them",
            )


def learning_rate(session: Session) -> Iterator[Finding]:
    """Check that --lr suits the kind of training, full fine-tuning or LoRA.

    The two differ by a factor of 10: "LoRA Without Regret" (Thinking Machines, 2025).
    """
    config, width = session.config, session.plain().model.config.get_text_config().hidden_size
    highest, lowest = FULL / width, LORA[0]
    if config.lora_rank and not lowest <= config.lr <= LORA[1] * highest:
        low = config.lr < lowest
        yield warning(
            what=f"--lr {config.lr:g} with --lora-rank {config.lora_rank} at width {width}",
            why="adapters want about ten times the rate of full fine-tuning: "
            + ("at this one they hardly move" if low else "this one is beyond that, and training may diverge"),
            do="--lr 1e-4 to 5e-4" if low else f"--lr {LORA[1] * highest / 2:.0e} or less",
        )
    elif not config.lora_rank and config.lr > highest:
        yield warning(
            what=f"--lr {config.lr:g} for all weights of a model of width {width}",
            why="rates this large are for LoRA; full fine-tuning at one forgets or diverges within some steps",
            do=f"--lr {highest / 5:.0e}, or --lora-rank 32",
        )
    else:
        kind = f"LoRA of rank {config.lora_rank}" if config.lora_rank else "all weights"
        yield ok(what=f"{config.lr:g} for {kind} at width {width}")


def lengths(session: Session) -> Iterator[Finding]:
    """Report prompt lengths and the context length.  Prompts that do not fit were refused when the run was opened."""
    rendered = session.prompts.first(VERIFIED)
    longest = max(max(len(p.ids), len(p.teacher_ids)) for p in rendered)
    new = session.config.sampling.max_new_tokens
    yield ok(what=f"prompts of up to {longest} tokens, {new} new ones, a context of {session.prompts.context}")


def verifier(session: Session) -> Iterator[Finding]:
    """Check that the verifier accepts the reference answers of the data and rejects an empty response."""
    task = session.prompts.task
    rows = [p for p in task.prompts[:VERIFIED] if p.response or p.answer]
    if not task.scored or not rows:
        yield note(
            what=f"nothing scores responses to {task.name}",
            why="OPD needs no score; without one there is no accuracy to watch",
            do="give the prompts an answer column and a --verifier to see accuracy",
        )
        return
    wrong = [p for p in rows if all(task.verify(text, p) <= RIGHT for text in _right(p))]
    share = 1 - len(wrong) / len(rows)
    if any(task.verify("", p) > RIGHT for p in rows):
        yield warning(
            what="an empty response verifies as right",
            why="then accuracy, and methods that read outcomes, say nothing",
            do="mend the verifier: it must score 0 where there is no answer",
        )
    elif share < 0.9:
        yield warning(
            what=f"{share:.0%} of {len(rows)} prompts' own answers verify as right; not {short(wrong[0].answer)}",
            why="no response can be right where the reference is not: accuracy has that ceiling, and methods that read "
            "outcomes train on mistakes",
            do="compare --answer-column and --verifier with the data",
        )
    else:
        yield ok(what=f"{share:.0%} of {len(rows)} prompts' own answers verify as right, an empty one does not")


def _right(prompt: Prompt) -> tuple[str, ...]:
    """Return responses that a correct verifier accepts: the reference response, or the answer in the usual formats."""
    if prompt.response:
        return (prompt.response,)
    return prompt.answer, f"\\boxed{{{prompt.answer}}}", f"The answer is {prompt.answer}"


def response_ends(run: RehearsedRun) -> Iterator[Finding]:
    """Check that responses end with a stop token within --max-new-tokens."""
    max_tokens, lengths = run.session.config.sampling.max_new_tokens, [len(r.ids) for r in run.rollouts]
    stopped = float(run.batch.stopped.float().mean())
    if stopped < 0.9:
        room = run.session.prompts.room + max_tokens - max(len(r.prompt_ids) for r in run.rollouts)
        advice = f"raise --max-new-tokens (the context has room for {room}), or add"
        if room <= max_tokens:
            advice = "the context allows no more: add"
        never = stopped == 0
        cut = next(r for r in run.rollouts if not r.stopped)
        wrong = "; a student that never says its stop token has the wrong one, or is no chat model" if never else ""
        yield warning(
            what=f"none of {len(lengths)} rollouts ended within --max-new-tokens {max_tokens}"
            if never
            else f"{1 - stopped:.0%} of {len(lengths)} rollouts were cut at --max-new-tokens {max_tokens}",
            why=f"a cut response has no end to learn from, and lengths then grow to the limit{wrong}",
            do=f"{advice} --truncated drop" + ("; compare the finding `turn end`" if never else ""),
            detail=f"the end of the first that was cut: {short(run.session.collector.text(cut.ids)[-50:])}",
        )
        return
    budget = int(np.quantile(lengths, 0.95))
    yield ok(what=f"{stopped:.0%} of {len(lengths)} rollouts ended; 95 % within {budget} of {max_tokens} tokens")


def repeats(run: RehearsedRun) -> Iterator[Finding]:
    """Check how many 4-grams repeat within a response."""
    share = repetition(run.batch.ids, run.batch.mask)
    if share > REPEATS:
        text = run.session.collector.text(run.rollouts[0].ids)
        yield warning(
            what=f"{share:.0%} of the 4-grams of a response stood in it before: {short(text[-60:])}",
            why="a teacher finds a loop likely once it has begun, and the student learns to stay in it",
            do="look at its template and stop ids; a base model may need some supervised steps first, or a "
            "--max-new-tokens below where loops begin",
        )
    else:
        yield ok(what=f"{share:.0%} of the 4-grams of a response stood in it before")


def sampler(run: RehearsedRun) -> Iterator[Finding]:
    """Check that the log-probs of sampler and trainer agree on the sampled tokens."""
    batch, config = run.batch, run.session.config
    if batch.student_logp is None or not config.compares():
        return
    terminal = batch.ids.new_tensor(run.session.vocabulary.stop)
    mask = batch.mask & ~(batch.ids[..., None] == terminal).any(-1)  # merged stop ids sum their probabilities
    gap = float((batch.student_logp - batch.sampler_logp)[mask].abs().max()) if mask.any() else 0.0
    if gap > GAP[config.precision]:
        yield warning(
            what=f"sampler and trainer give one token log-probs that are {gap:.2g} nats apart",
            why="rollouts are then of another policy than the one that is trained",
            do="compare at --precision fp32: if the gap stays, the model's cached forward is not its plain one",
        )
    else:
        yield ok(what=f"sampler and trainer agree to {gap:.1g} nats")


def question(trainer: Trainer) -> Iterator[Finding]:
    """Check that the method's question to a teacher or judge fits the student's rollouts."""
    try:
        trainer.session.annotator.check(lambda: sample_rollouts(trainer))
    except Refusal as refusal:
        yield error(what=str(refusal))


def head_pass_backend(session: Session) -> Iterator[Finding]:
    """Report which backend (Triton, C or torch) does the elementwise work on the logits in the head pass."""
    device = session.accelerator.device
    backend = backend_name(device)
    if device.type == "cuda" and backend != "triton":
        yield note(
            what="torch sweeps the logits: there is no Triton",
            why="it reads and writes them some ten times where Triton's kernels do once or twice",
            do="pip install 'opd[gpu]'",
        )
    else:
        yield ok(what=f"{backend} sweeps the logits, {session.config.chunk_mb} MB of them at a time")
