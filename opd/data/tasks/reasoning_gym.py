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
from opd.data.tasks.task import SIZES, Made, Task, ask
from opd.data.verifiers import sandbox as guarded
from opd.data.verifiers.extract import marked, spoken

SEEDS = 2**10  # distinct seeds; each has 2**21 problems and two splits, which fills numpy's 2**32 seeds


def task(name: str, data: Data) -> Task:
    """Make the task NAME?option=value&option=value.

    In reasoning-gym, item i of seed s equals item 0 of seed s + i, so neighbouring seeds share nearly all problems.
    Therefore the run's seeds are spread 2**21 apart.  A generator with few distinct problems still repeats some of
    them in the other split.

    Raises:
        Refusal: the name, an option or its value is unknown to reasoning-gym.
    """
    name, _, query = name.partition("?")
    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else f"choose one of {', '.join(sorted(DATASETS))}"
        raise Refusal(f"--prompts {data.source}: reasoning-gym has no {name!r}; {hint}")
    options = {key: _value(text) for key, text in parse_qsl(query, keep_blank_values=True)}
    known = {field.name for field in dataclasses.fields(DATASETS[name][1])} - {"seed", "size"}
    if unknown := sorted(options.keys() - known):
        raise Refusal(f"--prompts {data.source}: {name} has no option {unknown[0]}; it has {', '.join(sorted(known))}")
    size = data.limit or SIZES[data.split]
    seed = (data.split == "test") * 2**31 + data.seed % SEEDS * 2**21
    try:
        made = reasoning_gym.create_dataset(name, seed=seed, size=size, **options)
        made[0]
    except Exception as error:  # each generator raises different exceptions for invalid options
        raise Refusal(f"--prompts {data.source}, --limit {size}: {name} refuses: {error!r}; change them") from error
    score = partial(_score, name, json.dumps(options))
    return Task(name=name, prompts=Made(partial(_prompt, made, data), size), verify=score)


def _value(text: str) -> object:
    """Read an option as JSON where it is JSON, else as text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _prompt(made: ProceduralDataset, data: Data, index: int) -> Prompt:
    entry = made[index]
    return ask(entry["question"], data, answer=entry["answer"] or "", columns=entry)


def _score(name: str, options: str, response: str, prompt: Prompt) -> float:
    """Score only the final answer, as the scorers expect; some give partial credit to a wrong answer."""
    text = spoken(response)
    return guarded.score("reasoning-gym", name, options, marked(text) or text, prompt.columns)
