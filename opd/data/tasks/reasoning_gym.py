"""Tasks of reasoning-gym, `task(name, data) -> Task`: generated problems, scored by reasoning-gym's scorers."""

import dataclasses
import difflib
import json
from functools import partial
from urllib.parse import parse_qsl

import reasoning_gym
from reasoning_gym.dataset import ProceduralDataset
from reasoning_gym.factory import DATASETS

from opd.config.data import Data
from opd.core.errors import Refusal
from opd.core.sampling import Prompt
from opd.data.tasks.task import SIZES, LazyPrompts, Task, make_prompt
from opd.data.verifiers import sandbox
from opd.data.verifiers.extract import marked, without_thinking

SEEDS = 2**10  # distinct seeds; each has 2**21 problems and two splits, which fills numpy's 2**32 seeds


def task(name: str, data: Data) -> Task:
    """Make the task NAME?option=value&option=value.

    In reasoning-gym, item i of seed s equals item 0 of seed s + i, so neighbouring seeds share nearly all problems.
    Therefore the run's seeds are spread 2**21 apart.  A generator with few distinct problems still repeats some of
    them in the other split.  Raises Refusal if the name, an option or its value is unknown to reasoning-gym.
    """
    name, _, query = name.partition("?")
    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else f"choose one of {', '.join(sorted(DATASETS))}"
        raise Refusal(f"--prompts {data.source}: reasoning-gym has no {name!r}; {hint}")
    options = {key: _value(text) for key, text in parse_qsl(query, keep_blank_values=True)}
    allowed = {field.name for field in dataclasses.fields(DATASETS[name][1])} - {"seed", "size"}
    if unknown := sorted(options.keys() - allowed):
        raise Refusal(
            f"--prompts {data.source}: {name} has no option {unknown[0]}; it has {', '.join(sorted(allowed))}"
        )
    size = data.limit or SIZES[data.split]
    seed = (data.split == "test") * 2**31 + data.seed % SEEDS * 2**21
    try:
        dataset = reasoning_gym.create_dataset(name, seed=seed, size=size, **options)
        dataset[0]
    except Exception as error:  # each generator raises different exceptions for invalid options
        raise Refusal(f"--prompts {data.source}, --limit {size}: {name} refuses: {error!r}; change them") from error
    score = partial(_score, name, json.dumps(options))
    return Task(name=name, prompts=LazyPrompts(partial(_prompt, dataset, data), size), verify=score)


def _value(text: str) -> object:
    """Read an option as JSON where it is JSON, else as text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _prompt(dataset: ProceduralDataset, data: Data, index: int) -> Prompt:
    entry = dataset[index]
    return make_prompt(entry["question"], data, answer=entry["answer"] or "", columns=entry)


def _score(name: str, options: str, response: str, prompt: Prompt) -> float:
    """Score only the final answer, as the scorers expect; some give partial credit to a wrong answer."""
    text = without_thinking(response)
    return sandbox.score("reasoning-gym", name, options, marked(text) or text, prompt.columns)
