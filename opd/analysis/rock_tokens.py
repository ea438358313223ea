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

from opd.analysis.token_occurrences import Corpus, consistency, control_types, is_above_quantile, rank, stability
from opd.config.plan import resolved
from opd.config.precision import dtype_of
from opd.config.rock import Rock
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
from opd.training.trainer import Trainer

NUM_SHOWN = 20  # types printed on the terminal


def rock(config: Rock) -> Path:
    """Generate, measure, rank and write the lists; return the path of the first.

    Raises Refusal for errors that the user can fix.
    """
    config.check()
    with loading(config.student, config.teacher, quiet=config.quiet):
        session = open_session(resolved(replace(config.run(), method=Method())))
    trainer = Trainer(session, Run(config.out))
    rollouts, corpus = _measure_corpus(config, trainer)
    counts, sums = corpus.tally()
    ratio = _ratios(config, trainer, rollouts, corpus) if config.consistency.context_filter else None
    score = sums if ratio is None else sums * ratio
    rocks = rank(counts, score, top=config.top, min_count=config.min_count)

    def table(ids: Sequence[int]) -> dict[str, Any]:
        type_ids, totals = list(ids), (float(sums.sum()), int(counts.sum()))
        types = [
            {"id": i, "token": str(session.collector.tokenizer.decode([i])), "count": int(counts[i])}
            | {"mean_kl": float(sums[i] / counts[i]), "score": float(score[i])}
            | ({} if ratio is None else {"consistency": float(ratio[i])})
            for i in type_ids
        ]
        shares = {"kl": float(sums[type_ids].sum()) / totals[0], "tokens": int(counts[type_ids].sum()) / totals[1]}
        return {"ids": type_ids, "occurrences": int(counts[type_ids].sum()), "coverage": shares, "types": types}

    settings = {name: str(getattr(config, name)) for name in ("student", "teacher", "prompts", "sampling", "seed")}
    info = {"rollouts": len(rollouts), "tokens": len(corpus.ids), "types": int((counts > 0).sum()), **settings}
    jaccard = stability(corpus, top=config.top, min_count=config.min_count, seed=config.seed)
    listed = {**table(rocks), "stability": {str(share): value for share, value in jaccard.items()}, "corpus": info}
    control = {**table(control_types(counts, rocks)), "corpus": info}
    if session.accelerator.is_main_process:
        for file, content in zip(config.files(), (listed, control), strict=True):
            file.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        _show(listed, control)
    return config.out


def _measure_corpus(config: Rock, trainer: Trainer) -> tuple[list[Rollout], Corpus]:
    """Generate the rollouts and measure the KL at every position.  Raises Refusal if a KL is not finite."""
    prompts = trainer.session.prompts
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
        prompt_batch = prompts.batch(step, config.decode_rows)[: config.rollouts - len(rollouts)]
        new_rollouts, batch = trainer.generate_and_measure(prompt_batch, config.sampling, step, prompts.task)
        assert batch.reverse_kl is not None
        rollouts += new_rollouts
        kl.append(batch.reverse_kl[batch.mask].double())
    row = torch.arange(len(rollouts)).repeat_interleave(torch.tensor([len(r.ids) for r in rollouts]))
    corpus = Corpus(torch.tensor([i for r in rollouts for i in r.ids]), torch.cat(kl), row)
    if not corpus.kl.isfinite().all():
        raise Refusal(
            f"--teacher {config.teacher}: the KL is not finite at {int((~corpus.kl.isfinite()).sum())} of "
            f"{len(corpus.kl)} tokens; is its vocabulary masked or its precision too low (--teacher-precision fp32)?"
        )
    return rollouts, corpus


def _ratios(config: Rock, trainer: Trainer, rollouts: Sequence[Rollout], corpus: Corpus) -> Float[Tensor, " V"]:
    """Return the CCR of every type.

    Runs a second pass over the rollouts for the contexts, and with --before a third pass with the earlier student.
    """
    filter_settings, session = config.consistency, trainer.session
    persists = is_above_quantile(corpus.kl, filter_settings.high)
    if filter_settings.before:
        source = models.locate(filter_settings.before, field="before", trust_remote_code=config.trust_remote_code)
        dtype = dtype_of(config.precision)
        earlier = models.load(source, field="before", dtype=dtype, device=session.accelerator.device)
        earlier_trainer = Trainer(replace(session, student=Student(earlier)), trainer.run)
        batch = earlier_trainer.measure(rollouts, 0)
        assert batch.reverse_kl is not None
        persists &= is_above_quantile(batch.reverse_kl[batch.mask].double(), filter_settings.high)
    batch = collate(rollouts, stop_token="train", truncated="train", seed=config.seed, step=0)
    return consistency(
        corpus.ids[persists],
        _contexts(config, trainer, rollouts, batch, persists),
        corpus.ids.bincount(),
        similar=filter_settings.similar,
        share=filter_settings.recurs,
    )


@torch.no_grad()
def _contexts(
    config: Rock, trainer: Trainer, rollouts: Sequence[Rollout], batch: Batch, chosen: Bool[Tensor, " N"]
) -> Float[Tensor, "M H"]:
    """Return the contexts [M, H] of the chosen occurrences.

    A context is the mean of the student's final states that predict the tokens up to `width` positions away.
    """
    session, width = trainer.session, config.consistency.width
    parts = chosen.split([len(r.ids) for r in rollouts])
    sizes = {i: len(r.prompt_ids) + len(r.ids) for i, r in enumerate(rollouts)}
    contexts: dict[int, Tensor] = {}
    for micro in micro_batches(sizes, config.micro_batch_tokens):
        rolls = [rollouts[i] for i in micro]
        trained = masks(batch[torch.tensor(micro)], rolls)
        with session.accelerator.autocast():
            model = session.plain().model
            states = final_states(model, rows(rolls, trained, teacher=False, device=session.accelerator.device))
        for i, final in zip(micro, states.double().split([len(r.ids) for r in rolls]), strict=True):
            sums = torch.nn.functional.pad(final.cumsum(0), (0, 0, 1, 0))
            position = torch.arange(len(final))
            low, high = (position - width).clamp(min=0), (position + width + 1).clamp(max=len(final))
            contexts[i] = ((sums[high] - sums[low]) / (high - low)[:, None].to(final))[parts[i]].float().cpu()
    return torch.cat([contexts[i] for i in range(len(rollouts))])


def _show(listed: dict[str, Any], control: dict[str, Any]) -> None:
    """Print the top of the list, its coverage of KL and tokens, its stability, and its control."""
    corpus, types = listed["corpus"], listed["types"]
    total = sum(x["count"] * x["mean_kl"] for x in types) / listed["coverage"]["kl"]
    table = Table("", "token", "id", "count", "mean KL", "of all KL", box=None, pad_edge=False)
    for column in table.columns[2:]:
        column.justify = "right"
    for place, x in enumerate(listed["types"][:NUM_SHOWN], 1):
        share = x["count"] * x["mean_kl"] / total
        table.add_row(
            str(place), repr(x["token"]), str(x["id"]), str(x["count"]), f"{x['mean_kl']:.4f}", f"{share:.1%}"
        )
    console = Console(highlight=False, soft_wrap=True)
    console.print(table, markup=False)
    if len(listed["types"]) > NUM_SHOWN:
        console.print(f"... and {len(listed['types']) - NUM_SHOWN} more")
    shares = listed["coverage"]
    console.print(
        f"{len(listed['ids'])} of {corpus['types']} types in {corpus['rollouts']} rollouts cover "
        f"{shares['kl']:.1%} of the KL and {shares['tokens']:.1%} of {corpus['tokens']} tokens"
    )
    jaccards = "  ".join(f"{float(share):.0%}: {value:.2f}" for share, value in listed["stability"].items())
    plain = ", without the context filter" if any("consistency" in x for x in listed["types"]) else ""
    console.print(f"same list from a share of the rollouts (Jaccard{plain})  {jaccards}")
    console.print(
        f"control: {len(control['ids'])} other types, {control['occurrences']} occurrences against "
        f"{listed['occurrences']}, {control['coverage']['kl']:.1%} of the KL"
    )
    if control["occurrences"] < 0.98 * listed["occurrences"]:
        console.print("warning: the other tokens do not occur as often as the list; lower --top for an equal control")
