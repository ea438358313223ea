"""Evaluation of a model: avg@k, pass@k, maj@k and their intervals, `evaluate(Evaluate(...)) -> Scores`."""

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain
from pathlib import Path

import numpy as np

from opd.config.evaluate import Evaluate
from opd.config.precision import dtype_of
from opd.core.disk import OutputFile
from opd.core.errors import Refusal, at_least, check_seed
from opd.core.intervals import INTERVALS, Paired, paired
from opd.core.sampling import Prompt
from opd.data import prompts
from opd.data.tasks import benchmarks as sets
from opd.data.tasks.load import check_columns, load
from opd.data.tasks.task import Task
from opd.data.verifiers import response_text
from opd.data.verifiers.extract import final, plain, without_thinking
from opd.models import load as models
from opd.models.context import context_of
from opd.models.source import locate
from opd.rollouts.engines.base import GenerateRequest, Sample
from opd.rollouts.engines.hf import HFEngine
from opd.rollouts.engines.verify_cache import verify_cache
from opd.training.progress import loading
from opd.training.prompt_shares import Processes


def pass_at_k(correct: int, samples: int, k: int) -> float:
    """Return the unbiased pass@k estimate: the probability that at least 1 of k samples is correct.

    `correct` counts the correct responses among `samples`.  Raises ValueError if k > samples.  Chen et al.,
    arXiv:2107.03374, Eq. 1.
    """
    if k > samples:
        raise ValueError(f"k={k}: pass@k needs at least k samples per prompt, and there are {samples}")
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority(answers: Sequence[str], outcomes: Sequence[float], same: Callable[[int, int], bool]) -> float:
    """Return maj@k: the outcome of the most frequent answer, or the mean outcome of several answers in a tie.

    `same(i, j)` returns True if samples i and j give the same answer.  An empty answer has no vote.
    """
    votes: Counter[int] = Counter()  # votes for an answer, by the first sample that gives it
    for j, answer in enumerate(answers):
        if answer:
            votes[next((i for i in votes if answers[i] == answer or same(i, j)), j)] += 1
    leading = [outcomes[i] for i, count in votes.items() if count == max(votes.values())]
    return sum(leading) / len(leading) if leading else 0.0


def final_answer(response: str) -> str:
    """Return the answer of a response as text: the marked answer, else the stated answer, else the last line."""
    return plain(final(without_thinking(response)))


@dataclass(frozen=True)
class EvaluationScores:
    """Outcomes, lengths and texts of k samples for each prompt."""

    outcomes: tuple[tuple[float, ...], ...]  # [prompts][k]
    lengths: tuple[int, ...]  # tokens of each response
    stopped: tuple[bool, ...]
    majorities: tuple[float, ...]  # maj@k of each prompt
    prompts: tuple[Prompt, ...]
    responses: tuple[str, ...]  # texts, k for each prompt in order

    def each(self) -> dict[str, list[float]]:
        """Return each measure (avg@k, pass@j, maj@k) as a list over prompts."""
        k = len(self.outcomes[0])
        right = [sum(x >= 1 for x in row) for row in self.outcomes]  # pass@k counts outcomes of 1 or more as correct
        measures = {f"avg@{k}": [sum(row) / k for row in self.outcomes]}
        if k > 1:
            sizes = sorted({2**i for i in range(k.bit_length())} | {k})
            measures |= {f"pass@{j}": [pass_at_k(n, k, j) for n in right] for j in sizes}
            measures[f"maj@{k}"] = list(self.majorities)
        return measures

    def problems(self) -> list[dict[str, object]]:
        """Return a json row for each problem: question, answer, outcomes, lengths and responses."""
        k = len(self.outcomes[0])
        return [
            {
                "prompt": prompts.digest(prompt),
                "question": prompt.question(),
                "answer": prompt.answer,
                "outcomes": row,
                "majority": self.majorities[i],
                "lengths": self.lengths[i * k : (i + 1) * k],
                "stopped": self.stopped[i * k : (i + 1) * k],
                "responses": self.responses[i * k : (i + 1) * k],
            }
            for i, (prompt, row) in enumerate(zip(self.prompts, self.outcomes, strict=True))
        ]

    def table(self, interval: str = "wilson") -> dict[str, object]:
        """Return all numbers for json; `interval` is a key of INTERVALS."""
        return {
            "prompts": len(self.outcomes),
            "samples": len(self.outcomes[0]),
            **{name: asdict(INTERVALS[interval](values)) for name, values in self.each().items()},
            "length": sum(self.lengths) / len(self.lengths),
            "stopped": sum(self.stopped) / len(self.stopped),
        }


def compare_scores(a: tuple[str, EvaluationScores], b: tuple[str, EvaluationScores]) -> dict[str, Paired]:
    """Return the paired difference of two models on the same problems, for each measure by name."""
    (first_name, first), (second_name, second) = a, b
    assert first.prompts == second.prompts
    measures = ((name, values, second.each()[name]) for name, values in first.each().items())
    return {name: paired(np.array([x]), np.array([y]), (first_name, second_name)) for name, x, y in measures}


def evaluate(config: Evaluate, processes: Processes = Processes()) -> EvaluationScores:
    """Generate responses, verify them and return the scores.  Raises Refusal for errors that the user can fix.

    Several `processes` share the prompts; all of them must call this function, and all get the whole scores.
    """
    at_least(config, samples=0, decode_rows=1)
    config.sampling.check()
    check_seed(config.seed)
    default_samples = sets.find(config.set).samples if config.set and config.sampling.temperature > 0 else 1
    config = replace(config, samples=config.samples or default_samples)
    if config.samples > 1 and config.sampling.temperature == 0:
        raise Refusal(f"--samples {config.samples}: greedy samples are all the same; add --temperature 0.6, say")
    with loading(config.model, quiet=False):
        source = locate(config.model, field="model", trust_remote_code=config.trust_remote_code)
    data = replace(config.data, source=config.prompts, seed=config.seed)
    check_columns(data, config.prompts)
    task = sets.load(config.set, data) if config.set else load(data)
    if not task.scored:
        raise Refusal(
            "--verifier none: opd eval scores responses, and needs problems with answers: name a verifier (math, "
            "numeric, exact, choice), and the column of the answers by --answer-column"
        )
    tokenizer = models.tokenizer(source, field="model")
    config.sampling.check_vocabulary(len(tokenizer))
    stop = models.stop_ids(source, tokenizer)
    device = models.device(config.device, field="device")
    with loading(config.model, quiet=False):
        model = models.load(source, field="model", dtype=dtype_of(config.precision), device=device)
    models.small_threads(model)
    arguments = prompts.parse_template_arguments(config.data.template_args)
    ids = [prompts.render(tokenizer, p, chat_template_kwargs=arguments) for p in task.prompts]
    verify_cache(model, field="model")
    context = context_of(models.base(model).config.get_text_config())
    rows = len(models.head(model).weight)
    if beyond := [token for prompt_ids in ids for token in prompt_ids if token >= rows]:
        raise Refusal(
            f"--model {config.model}: a prompt holds token {beyond[0]} ({tokenizer.decode([beyond[0]])!r}), and the "
            f"model has {rows} rows of embeddings: use the tokenizer that these weights came with"
        )
    longest = max(range(len(ids)), key=lambda i: len(ids[i]))
    if len(ids[longest]) + config.sampling.max_new_tokens > context.tokens:
        fits = len(ids[longest]) < context.tokens
        remedy = "lower --max-new-tokens" if fits else "shorten or remove the row"
        raise Refusal(
            f"--prompts {config.prompts}: row {longest} ({prompts.short(task.prompts[longest].question())}) has "
            f"{len(ids[longest])} tokens; with --max-new-tokens "
            f"{config.sampling.max_new_tokens} it passes the model's context of {context}; {remedy}"
        )
    engine = HFEngine(model, len(tokenizer), stop, config.decode_rows)
    part, k = processes.share(len(ids)), config.samples
    prompt_rows = [ids[i] for i in part for _ in range(k)]
    index = range(part.start * k, part.start * k + len(prompt_rows))
    samples = engine.generate(GenerateRequest(prompt_rows, config.sampling, seed=config.seed, step=0, index=index))
    texts = tuple(response_text.decode(tokenizer, s.ids, config.data.think_end) for s in samples)
    return _joined(processes.gather([_scores(task, [task.prompts[i] for i in part], samples, texts)]))


def _scores(
    task: Task, answered: Sequence[Prompt], samples: Sequence[Sample], texts: tuple[str, ...]
) -> EvaluationScores:
    """Verify the responses to some prompts, as many `samples` with their `texts` for each of them."""
    outcomes, majorities = list[tuple[float, ...]](), list[float]()
    for i, prompt in enumerate(answered):
        k = len(samples) // len(answered)
        part = texts[i * k : (i + 1) * k]
        outcomes.append(tuple(task.verify(response, prompt) for response in part))
        majorities.append(majority_score(task, prompt, part, outcomes[-1]))
    return EvaluationScores(
        tuple(outcomes),
        tuple(len(s.ids) for s in samples),
        tuple(s.stopped for s in samples),
        tuple(majorities),
        tuple(answered),
        texts,
    )


def _joined(parts: Sequence[EvaluationScores]) -> EvaluationScores:
    """Return the scores of all parts of the prompts as one."""
    return EvaluationScores(*(tuple(chain(*(vars(part)[f.name] for part in parts))) for f in fields(EvaluationScores)))


def output(config: Evaluate) -> OutputFile:
    """Return the file that --out names."""
    inputs = tuple(filter(None, (config.prompts, config.model, config.against)))
    return OutputFile(path=Path(config.out), ours=_is_saved, overwrite=config.overwrite, inputs=inputs)


def save(file: OutputFile, scores: Mapping[str, EvaluationScores]) -> None:
    """Write a json line for each problem and model."""
    rows = [{"model": name, **row} for name, score in scores.items() for row in score.problems()]
    file.write("".join(json.dumps(row) + "\n" for row in rows))


def _is_saved(path: Path) -> bool:
    """Return whether a file is one that `save` wrote, by its first line."""
    with path.open() as lines:
        first = json.loads(next(lines, ""))
    return isinstance(first, dict) and {"model", "prompt", "outcomes", "responses"} <= first.keys()


def majority_score(task: Task, prompt: Prompt, responses: Sequence[str], outcomes: Sequence[float]) -> float:
    """Return maj@k of a prompt; two answers are the same if their texts are equal or the task's verifier accepts it."""
    answers = [final_answer(response) for response in responses]

    def same(i: int, j: int) -> bool:
        return task.by_answer and task.verify(responses[j], replace(prompt, answer=answers[i], other_answers=())) >= 1

    return majority(answers, outcomes, same)
