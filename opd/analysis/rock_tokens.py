"""Rock tokens: token types with large and frequent KL, `rock(Rock(...)) -> file` for `rock-freeze --tokens`.

Generates rollouts of the student, measures the exact KL at every position, and ranks the predicted tokens by summed KL.
Writes the list and a control list with as many occurrences.  arXiv:2605.09253.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from opd.analysis.token_occurrences import Corpus, above, consistency, matched, rank, stability
from opd.config.commands import Rock
from opd.config.plan import resolved
from opd.config.precision import dtype_of
from opd.core.errors import Refusal
from opd.core.types import Batch, Rollout
from opd.methods.method import Method
from opd.models import load as models
from opd.models.batching import micro_batches, rows
from opd.models.forward import final_states
from opd.models.student import Student
from opd.rollouts.batch import collate, masks
from opd.training.build import open_session
from opd.training.progress import loading
from opd.training.run_folder import Run
from opd.training.trainer import Loop

SHOWN = 20  # types printed on the terminal


def rock(config: Rock) -> Path:
    """Generate, measure, rank and write the lists; return the path of the first.

    Raises Refusal for errors that the user can fix.
    """
    config.check()
    with loading(config.student, config.teacher, quiet=config.quiet):
        session = open_session(resolved(replace(config.run(), method=Method())))
    loop = Loop(session, Run(config.out))
    rollouts, corpus = _look(config, loop)
    counts, sums = corpus.tally()
    ratio = _ratios(config, loop, rollouts, corpus) if config.consistency.context_filter else None
    score = sums if ratio is None else sums * ratio
    rocks = rank(counts, score, top=config.top, least=config.min_count)

    def table(ids: Sequence[int]) -> dict[str, Any]:
        at, whole = list(ids), (float(sums.sum()), int(counts.sum()))
        types = [
            {"id": i, "token": str(session.collector.tokenizer.decode([i])), "count": int(counts[i])}
            | {"mean_kl": float(sums[i] / counts[i]), "score": float(score[i])}
            | ({} if ratio is None else {"consistency": float(ratio[i])})
            for i in at
        ]
        shares = {"kl": float(sums[at].sum()) / whole[0], "tokens": int(counts[at].sum()) / whole[1]}
        return {"ids": at, "occurrences": int(counts[at].sum()), "coverage": shares, "types": types}

    settings = {name: str(getattr(config, name)) for name in ("student", "teacher", "prompts", "sampling", "seed")}
    about = {"rollouts": len(rollouts), "tokens": len(corpus.ids), "types": int((counts > 0).sum()), **settings}
    steady = stability(corpus, top=config.top, least=config.min_count, seed=config.seed)
    found = {**table(rocks), "stability": {str(share): value for share, value in steady.items()}, "corpus": about}
    control = {**table(matched(counts, rocks)), "corpus": about}
    if session.accelerator.is_main_process:
        for file, content in zip(config.files(), (found, control), strict=True):
            file.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        _show(found, control)
    return config.out


def _look(config: Rock, loop: Loop) -> tuple[list[Rollout], Corpus]:
    """Generate the rollouts and measure the KL at every position.  Raises Refusal if a KL is not finite."""
    prompts = loop.session.prompts
    if config.sampling.temperature == 0 and config.rollouts > len(prompts.task.prompts):
        raise Refusal(
            f"--rollouts {config.rollouts}: there are {len(prompts.task.prompts)} prompts, and greedy rollouts of one "
            "are all the same; lower it, or sample at --temperature 1"
        )
    rollouts: list[Rollout] = []
    kl: list[Tensor] = []
    quiet = config.quiet or not sys.stderr.isatty()
    steps = range(1, -(-config.rollouts // config.decode_rows) + 1)
    for step in track(steps, "rollouts", console=Console(stderr=True), transient=True, disable=quiet):
        asked = prompts.batch(step, config.decode_rows)[: config.rollouts - len(rollouts)]
        some, batch = loop.look(asked, config.sampling, step, prompts.task)
        assert batch.reverse_kl is not None
        rollouts += some
        kl.append(batch.reverse_kl[batch.mask].double())
    row = torch.arange(len(rollouts)).repeat_interleave(torch.tensor([len(r.ids) for r in rollouts]))
    corpus = Corpus(torch.tensor([i for r in rollouts for i in r.ids]), torch.cat(kl), row)
    if not corpus.kl.isfinite().all():
        raise Refusal(
            f"--teacher {config.teacher}: the KL is not finite at {int((~corpus.kl.isfinite()).sum())} of "
            f"{len(corpus.kl)} tokens; is its vocabulary masked or its precision too low (--teacher-precision fp32)?"
        )
    return rollouts, corpus


def _ratios(config: Rock, loop: Loop, rollouts: Sequence[Rollout], corpus: Corpus) -> Float[Tensor, " V"]:
    """Return the CCR of every type.

    Runs a second pass over the rollouts for the contexts, and with --before a third pass with the earlier student.
    """
    how, session = config.consistency, loop.session
    persists = above(corpus.kl, how.high)
    if how.before:
        source = models.locate(how.before, field="before", trust_remote_code=config.trust_remote_code)
        dtype = dtype_of(config.precision)
        earlier = models.load(source, field="before", dtype=dtype, device=session.accelerator.device)
        other = Loop(replace(session, student=Student(earlier)), loop.run)
        batch = other.measure(rollouts, 0)
        assert batch.reverse_kl is not None
        persists &= above(batch.reverse_kl[batch.mask].double(), how.high)
    batch = collate(rollouts, stop_token="train", truncated="train", seed=config.seed, step=0)
    return consistency(
        corpus.ids[persists],
        _contexts(config, loop, rollouts, batch, persists),
        corpus.ids.bincount(),
        similar=how.similar,
        share=how.recurs,
    )


@torch.no_grad()
def _contexts(
    config: Rock, loop: Loop, rollouts: Sequence[Rollout], batch: Batch, chosen: Bool[Tensor, " N"]
) -> Float[Tensor, "M H"]:
    """Return the contexts [M, H] of the chosen occurrences.

    A context is the mean of the student's final states that predict the tokens up to `width` positions away.
    """
    session, width = loop.session, config.consistency.width
    parts = chosen.split([len(r.ids) for r in rollouts])
    sizes = {i: len(r.prompt_ids) + len(r.ids) for i, r in enumerate(rollouts)}
    found: dict[int, Tensor] = {}
    for at in micro_batches(sizes, config.micro_batch_tokens):
        some = [rollouts[i] for i in at]
        trained = masks(batch[torch.tensor(at)], some)
        with session.accelerator.autocast():
            model = session.plain().model
            states = final_states(model, rows(some, trained, teacher=False, device=session.accelerator.device))
        for i, own in zip(at, states.double().split([len(r.ids) for r in some]), strict=True):
            sums = torch.nn.functional.pad(own.cumsum(0), (0, 0, 1, 0))
            place = torch.arange(len(own))
            low, high = (place - width).clamp(min=0), (place + width + 1).clamp(max=len(own))
            found[i] = ((sums[high] - sums[low]) / (high - low)[:, None].to(own))[parts[i]].float().cpu()
    return torch.cat([found[i] for i in range(len(rollouts))])


def _show(found: dict[str, Any], control: dict[str, Any]) -> None:
    """Print the top of the list, its coverage of KL and tokens, its stability, and its control."""
    corpus, total = found["corpus"], sum(x["count"] * x["mean_kl"] for x in found["types"]) / found["coverage"]["kl"]
    table = Table("", "token", "id", "count", "mean KL", "of all KL", box=None, pad_edge=False)
    for column in table.columns[2:]:
        column.justify = "right"
    for place, x in enumerate(found["types"][:SHOWN], 1):
        share = x["count"] * x["mean_kl"] / total
        table.add_row(
            str(place), repr(x["token"]), str(x["id"]), str(x["count"]), f"{x['mean_kl']:.4f}", f"{share:.1%}"
        )
    console = Console(highlight=False, soft_wrap=True)
    console.print(table, markup=False)
    if len(found["types"]) > SHOWN:
        console.print(f"... and {len(found['types']) - SHOWN} more")
    shares = found["coverage"]
    console.print(
        f"{len(found['ids'])} of {corpus['types']} types in {corpus['rollouts']} rollouts cover {shares['kl']:.1%} of "
        f"the KL and {shares['tokens']:.1%} of {corpus['tokens']} tokens"
    )
    steady = "  ".join(f"{float(share):.0%}: {value:.2f}" for share, value in found["stability"].items())
    plain = ", without the context filter" if any("consistency" in x for x in found["types"]) else ""
    console.print(f"same list from a share of the rollouts (Jaccard{plain})  {steady}")
    console.print(
        f"control: {len(control['ids'])} other types, {control['occurrences']} occurrences against "
        f"{found['occurrences']}, {control['coverage']['kl']:.1%} of the KL"
    )
    if control["occurrences"] < 0.98 * found["occurrences"]:
        console.print("warning: the other tokens do not occur as often as the list; lower --top for an equal control")
