"""Rock tokens: token types with large and frequent KL, `rock(Rock(...)) -> file` for `rock-freeze --tokens`.

Generates rollouts of the student, measures the exact KL at every position, and ranks the predicted tokens by summed KL.
Writes the list and a control list with as many occurrences.  arXiv:2605.09253.  An occurrence is a response position
with the token *predicted* there; a type is a token of the vocabulary.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table
from torch import Tensor

from opd.config.plan import resolved
from opd.config.precision import dtype_of
from opd.config.rock import Rock
from opd.core.errors import Refusal
from opd.core.processes import is_main_process, num_processes
from opd.core.types import Batch, Rollout
from opd.methods.method import Method
from opd.models import load as models
from opd.models.batching import micro_batches, rows
from opd.models.forward import final_states
from opd.models.source import locate
from opd.models.student import Student
from opd.rollouts.batch import collate, masks
from opd.training.build import open_session
from opd.training.progress import loading
from opd.training.prompt_shares import Processes
from opd.training.run_folder import Run
from opd.training.trainer import Trainer

NUM_SHOWN = 20  # types printed on the terminal
SHARES = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)  # shares of the rollouts: the paper's 50 to 400 of 500, and all
BLOCK = 1024  # occurrences compared at a time, which bounds memory


@dataclass(frozen=True)
class Corpus:
    """A corpus of token occurrences, in flat tensors [N]."""

    ids: Int[Tensor, " N"]
    kl: Float[Tensor, " N"]  # KL(student || teacher) of the full distributions at the position, nats
    rollout: Int[Tensor, " N"]

    def part(self, rollouts: Int[Tensor, " R"]) -> "Corpus":
        """Return the occurrences in the given rollouts."""
        inside = torch.isin(self.rollout, rollouts)
        return Corpus(self.ids[inside], self.kl[inside], self.rollout[inside])

    def tally(self) -> tuple[Int[Tensor, " V"], Float[Tensor, " V"]]:
        """Return count and summed KL, the rock score R(v) = mean KL x frequency, of each type up to the largest id."""
        return self.ids.bincount(), self.ids.bincount(self.kl)


def rock(config: Rock) -> Path:
    """Generate, measure, rank and write the lists; return the path of the first.

    Several connected processes share the rollouts; all of them must call this function, and the main one writes.
    Raises Refusal for errors that the user can fix.
    """
    config.check()
    with loading(config.student, config.teacher, quiet=config.quiet):
        # A session needs a --batch that is a multiple of the number of processes, and nothing here reads it.
        session = open_session(resolved(replace(config.run(), method=Method(), batch=num_processes())))
    trainer = Trainer(session, Run(config.out))
    rollouts, corpus = _measure_corpus(config, trainer)
    counts, sums = corpus.tally()
    ratio = _ratios(config, trainer, rollouts, corpus) if config.consistency.context_filter else None
    score = sums if ratio is None else sums * ratio
    rocks = rank(counts, score, top=config.top, min_count=config.min_count)

    def table(ids: Sequence[int]) -> dict[str, Any]:
        type_ids = list(ids)
        types = [
            {"id": i, "token": str(session.collector.tokenizer.decode([i])), "count": int(counts[i])}
            | {"mean_kl": float(sums[i] / counts[i]), "score": float(score[i])}
            | ({} if ratio is None else {"consistency": float(ratio[i])})
            for i in type_ids
        ]
        occurrences = int(counts[type_ids].sum())
        shares = {"kl": float(sums[type_ids].sum()) / float(sums.sum()), "tokens": occurrences / int(counts.sum())}
        return {"ids": type_ids, "occurrences": occurrences, "coverage": shares, "types": types}

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
    rollouts, kl = list[Rollout](), list[Tensor]()
    quiet = config.quiet or not (sys.stderr.isatty() and is_main_process())
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
    """Return the CCR of every type: a second pass for the contexts, with --before a third with the earlier student."""
    filter_settings, session = config.consistency, trainer.session
    persists = is_above_quantile(corpus.kl, filter_settings.high)
    if filter_settings.before:
        source = locate(filter_settings.before, field="before", trust_remote_code=config.trust_remote_code)
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
    """Return the contexts [M, H] of the chosen occurrences; each process computes those of its share of the rollouts.

    A context is the mean of the student's final states that predict the tokens up to `width` positions away.
    """
    session, width = trainer.session, config.consistency.width
    processes = Processes.of(session.accelerator)
    parts = chosen.split([len(r.ids) for r in rollouts])
    sizes = {i: len(rollouts[i].prompt_ids) + len(rollouts[i].ids) for i in processes.share(len(rollouts))}
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
    contexts = dict(processes.gather(list(contexts.items())))
    return torch.cat([contexts[i] for i in range(len(rollouts))])


def _show(listed: dict[str, Any], control: dict[str, Any]) -> None:
    """Print the top of the list, its coverage of KL and tokens, its stability, and its control."""
    corpus, types = listed["corpus"], listed["types"]
    covered = listed["coverage"]["kl"]
    total = sum(x["count"] * x["mean_kl"] for x in types) / covered if covered else 1.0  # no type occurs often enough
    numbers = (Column(title, justify="right") for title in ("id", "count", "mean KL", "of all KL"))
    table = Table("", "token", *numbers, box=None, pad_edge=False)
    for place, x in enumerate(types[:NUM_SHOWN], 1):
        kl_cells = f"{x['mean_kl']:.4f}", f"{x['count'] * x['mean_kl'] / total:.1%}"
        table.add_row(str(place), repr(x["token"]), str(x["id"]), str(x["count"]), *kl_cells)
    console = Console(highlight=False, soft_wrap=True)
    console.print(table, markup=False)
    if len(types) > NUM_SHOWN:
        console.print(f"... and {len(types) - NUM_SHOWN} more")
    shares = listed["coverage"]
    console.print(
        f"{len(listed['ids'])} of {corpus['types']} types in {corpus['rollouts']} rollouts cover "
        f"{shares['kl']:.1%} of the KL and {shares['tokens']:.1%} of {corpus['tokens']} tokens"
    )
    jaccards = "  ".join(f"{float(share):.0%}: {value:.2f}" for share, value in listed["stability"].items())
    plain = ", without the context filter" if any("consistency" in x for x in types) else ""
    console.print(f"same list from a share of the rollouts (Jaccard{plain})  {jaccards}")
    console.print(
        f"control: {len(control['ids'])} other types, {control['occurrences']} occurrences against "
        f"{listed['occurrences']}, {control['coverage']['kl']:.1%} of the KL"
    )
    if control["occurrences"] < 0.98 * listed["occurrences"]:
        console.print("warning: the other tokens do not occur as often as the list; lower --top for an equal control")


def rank(counts: Int[Tensor, " V"], score: Float[Tensor, " V"], *, top: int, min_count: int) -> tuple[int, ...]:
    """Return up to `top` types with the highest scores and at least `min_count` occurrences, best first."""
    score = score.where(counts >= min_count, -torch.inf)
    best = score.argsort(descending=True, stable=True)[:top]
    return tuple(best[score[best] > -torch.inf].tolist())


def stability(corpus: Corpus, *, top: int, min_count: int, seed: int, draws: int = 10) -> dict[float, float]:
    """Return the Jaccard index of the list from a random share of the rollouts with the full list, by share.

    Each value is the mean over `draws` random subsets.  A subset is part of the whole corpus, so disjoint halves would
    agree less.
    """
    ranked = lambda part: set(rank(*part.tally(), top=top, min_count=min_count))
    full_list, rollouts = ranked(corpus), corpus.rollout.unique()
    generator, out = torch.Generator().manual_seed(seed), {}
    for share in SHARES:
        size = max(1, round(share * len(rollouts)))
        samples = [rollouts[torch.randperm(len(rollouts), generator=generator)[:size]] for _ in range(draws)]
        lists = [ranked(corpus.part(sample)) for sample in samples]
        out[share] = sum(len(x & full_list) / max(1, len(x | full_list)) for x in lists) / draws
    return out


def control_types(counts: Int[Tensor, " V"], types: Sequence[int]) -> tuple[int, ...]:
    """Return other types with as many occurrences in total as `types`, and with similar frequencies if possible.

    For each of `types`, from the most frequent down, take the unused type nearest in log frequency that fits into the
    remaining number of occurrences.  Then fill up with the most frequent types that fit.  The total never exceeds that
    of `types`; it is smaller if the rest of the corpus is too small.
    """
    type_ids = list(types)
    budget, unused_counts = int(counts[type_ids].sum()), counts.clone()
    unused_counts[type_ids] = 0
    log_counts, out = counts[type_ids].sort(descending=True).values.double().log(), list[int]()
    while bool((fits := (unused_counts > 0) & (unused_counts <= budget)).any()):
        size = unused_counts.double().log()
        distance = (size - log_counts[len(out)]).abs() if len(out) < len(log_counts) else -size
        best = int(distance.where(fits, torch.inf).argmin())
        out.append(best)
        budget -= int(unused_counts[best])
        unused_counts[best] = 0
    return tuple(out)


def consistency(
    ids: Int[Tensor, " M"], contexts: Float[Tensor, "M H"], counts: Int[Tensor, " V"], *, similar: float, share: float
) -> Float[Tensor, " V"]:
    """Return the paper's CCR: for each type, the share of its occurrences whose KL persists in recurring contexts.

    `ids` and `contexts` describe the persistent occurrences.  An occurrence recurs if at least `share` of the other
    occurrences of its type have a context with cosine `similar` or more.  A single occurrence does not recur.
    """
    unit = torch.nn.functional.normalize(contexts, dim=-1)
    persistent = torch.zeros_like(counts)
    for token in ids.unique().tolist():
        same = unit[ids == token]
        if len(same) > 1:
            num_similar = torch.cat([((part @ same.T) >= similar).sum(1) for part in same.split(BLOCK)])
            persistent[token] = (num_similar - 1 >= share * (len(same) - 1)).sum()  # not counting itself
    return persistent.double() / counts.clamp(min=1)


def is_above_quantile(kl: Float[Tensor, " N"], quantile: float) -> Bool[Tensor, " N"]:
    """Return a mask of the occurrences at or above a quantile (in [0, 1)) of the KL."""
    return kl >= kl.sort().values[min(len(kl) - 1, int(quantile * len(kl)))]  # torch.quantile is limited to 2^24 values
