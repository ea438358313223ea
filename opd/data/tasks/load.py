"""Loading a task: `load(Data(source=...)) -> Task`, whatever the source is; it refuses what could not work."""

from functools import partial

from opd.config.data import Data
from opd.core.errors import Refusal
from opd.core.sampling import Prompt
from opd.data.tasks import ledger
from opd.data.tasks.task import SIZES, LazyPrompts, Task, by_answer, make_prompt
from opd.data.verifiers import verify

PROCEDURAL = ("embedded", "reasoning-gym")  # kinds of sources that generate their problems
TABLE_FIELDS = ("subset", "prompt_column", "answer_column", "response_column", "choices_column", "verifier")
LEDGERS = {"ledger": "full", "ledger-short": "short"}


def load(data: Data) -> Task:
    """Make the task that `data` describes."""
    verify.find(data.verifier)  # a name that is unknown is refused for procedural sources, too
    if data.limit < 0:
        raise Refusal(f"--limit {data.limit}: a number of prompts is not negative; 0 keeps all of them")
    if data.system and not data.chat:
        raise Refusal(
            f"--system {data.system!r}: plain text has no system message, and --no-chat is given; leave one out"
        )
    kind, _, name = data.source.partition(":")
    if kind in PROCEDURAL and data.split not in SIZES:
        raise Refusal(f"--split {data.split}: {data.source} has the splits {' and '.join(SIZES)}")
    if kind == "embedded":
        return embedded(name, data)
    if kind == "reasoning-gym":
        from opd.data.tasks import reasoning_gym  # takes seconds to import

        return reasoning_gym.task(name, data)
    from opd.data.tasks.tables import table  # `datasets` takes seconds to import, and the embedded tasks do without

    return table(data)


def check_columns(data: Data, *sources: str) -> None:
    """Refuse columns and a verifier that none of the sources of a run reads, because each has built-in ones."""
    if not all(source.partition(":")[0] in PROCEDURAL for source in filter(None, sources)):
        return
    for name in TABLE_FIELDS:
        value = getattr(data, name)
        if value not in (getattr(Data(), name), "none"):  # `opd rock` sets the verifier none
            raise Refusal(
                f"--{name.replace('_', '-')} {value}: is not read, because {sources[0]} has built-in columns and a "
                "built-in verifier; leave it out"
            )


def embedded(name: str, data: Data) -> Task:
    """Make the task of the embedded models; its verifier is strict about the form of the whole response."""
    if name not in LEDGERS:
        raise Refusal(f"--prompts {data.source} is not known: choose embedded:{' or embedded:'.join(LEDGERS)}")
    prompts = LazyPrompts(partial(_ledger_prompt, data, LEDGERS[name]), data.limit or SIZES[data.split])
    return Task(name=name, prompts=prompts, verify=partial(by_answer, ledger.verify))


def _ledger_prompt(data: Data, level: str, index: int) -> Prompt:
    problem = ledger.problem_at(data.seed, index, level=level, heldout=data.split == "test")
    return make_prompt(problem.prompt, data, answer=problem.answer, response=problem.solution)
