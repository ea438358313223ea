"""Loading a task: `load(Data(source=...)) -> Task`, whatever the source is; it refuses what could not work."""

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from opd.config.data import Data
from opd.core.errors import Refusal
from opd.core.sampling import Prompt
from opd.data.tasks import ledger
from opd.data.tasks.task import SIZES, LazyPrompts, Task, make_prompt
from opd.data.verifiers.verify import VERIFIERS, find

if TYPE_CHECKING:
    from datasets import Dataset

LEDGERS = {"ledger": "full", "ledger-short": "short"}


def load(data: Data) -> Task:
    """Make the task that `data` describes."""
    if data.limit < 0:
        raise Refusal(f"--limit {data.limit}: a number of prompts is not negative; 0 keeps all of them")
    if data.system and not data.chat:
        raise Refusal(f"system={data.system!r} needs chat, and chat is off: plain text has no system message")
    kind, _, name = data.source.partition(":")
    if kind not in PROCEDURAL:
        return table(data)
    if data.split not in SIZES:
        raise Refusal(f"--split {data.split}: {data.source} has the splits {' and '.join(SIZES)}")
    return PROCEDURAL[kind](name, data)


def table(data: Data, dataset: "Dataset | None" = None) -> Task:
    """Make a task of the rows of a file, folder or hub dataset, or of `dataset`, scored against their answers."""
    from opd.data.tasks import columns as rows  # `datasets` takes seconds to import, and the embedded tasks do without
    from opd.data.tasks import files as tables

    score = find(data.verifier)
    built_in = data.verifier in VERIFIERS and data.verifier != "none"
    prompts = rows.prompts(dataset or tables.read(data), data, needs_answers=built_in)
    for i in range(0, len(prompts) if built_in else 0, 1 + len(prompts) // 200):
        answer = prompts[i].answer
        if answer and not score(answer, answer):  # a score that is always 0 may not be noticed for days
            raise Refusal(
                f"--verifier {data.verifier} cannot read the expected answer {answer[:80]!r} of prompt {i} of"
                f" {data.source}; choose another verifier or answer_column"
            )
    path = Path(data.source).expanduser()
    name = path.stem if path.is_file() else path.name if path.is_dir() else data.source
    scored = data.verifier != "none"
    return Task(name=name, prompts=prompts, verify=partial(_by_answer, score), scored=scored, by_answer=scored)


def embedded(name: str, data: Data) -> Task:
    """Make the task of the embedded models; its verifier is strict about the form of the whole response."""
    if name not in LEDGERS:
        raise Refusal(f"--prompts {data.source} is not known: choose embedded:{' or embedded:'.join(LEDGERS)}")
    prompts = LazyPrompts(partial(_ledger_prompt, data, LEDGERS[name]), data.limit or SIZES[data.split])
    return Task(name=name, prompts=prompts, verify=partial(_by_answer, ledger.verify))


def reasoning_gym(name: str, data: Data) -> Task:
    """Make a reasoning-gym task, scored by the dataset's own scorer."""
    return importlib.import_module("opd.data.tasks.reasoning_gym").task(name, data)  # seconds to import, as `datasets`


def _ledger_prompt(data: Data, level: str, index: int) -> Prompt:
    problem = ledger.problem_at(data.seed, index, level=level, heldout=data.split == "test")
    return make_prompt(problem.prompt, data, answer=problem.answer, response=problem.solution)


def _by_answer(score: Callable[[str, str], float], response: str, prompt: Prompt) -> float:
    return score(response, prompt.answer)


PROCEDURAL: dict[str, Callable[[str, Data], Task]] = {"embedded": embedded, "reasoning-gym": reasoning_gym}
