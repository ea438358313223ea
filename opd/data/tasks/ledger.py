"""Ledger word problems with worked solutions and a strict verifier: the embedded task.

A problem opens an account, books one gain or loss a month, and asks for the balance:

    Mia has 47 coins. Nov: wins 35. Dec: loses 18. How many does Mia have?

A solution has four stages. Sums run over the digit columns from the ones up. The mark between two columns is `^` if
a 1 is carried (or borrowed) into the next column, else `_`:

    <plan>Nov: +35
    Dec: -18
    <work>Nov: 7+5=2^4+3=8
    Dec: 2-8=4^8-1=6
    <check>64+18=82
    <answer>64
"""

import random
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, pairwise


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


MONTHS = _words("Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec")
GAINS = _words("wins earns finds gets gains buys makes saves collects receives borrows adds")
LOSSES = _words("loses spends drops gives lends sells eats breaks pays trades donates removes")
NAMES = _words(
    "Ada Ali Amy Ana Ben Bob Cal Dan Dee Eli Eva Fay Gus Hal Ian Ida Ivy Jim Joe Kai Kim Lea Leo Lin Liz "
    "Max Meg Mia Ned Nia Noa Oli Pam Pia Ray Rob Roy Sam Sue Tim Tom Uma Val Wes Yan Zoe"
)
OBJECTS = _words(
    "apples balls beads books bulbs cards coins cups eggs figs hats jars keys kites lamps maps mugs nuts pears "
    "pens pins plums ropes rings seeds shells stamps stones toys tiles"
)
STAGES = ("<plan>", "<work>", "<check>", "<answer>")
HELDOUT_SHARE = 8  # 1 in HELDOUT_SHARE prompts belongs to the held-out split
LEVELS = {  # digits per amount and balance, and the entry counts to sample from (repeats are weights)
    "short": (1, (1, 1, 2, 3)),  # 20 to 41 response tokens
    "full": (2, (2, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 6, 7, 8)),  # 51 to 160 response tokens
}


@dataclass(frozen=True)
class Problem:
    """A problem: the prompt, the bare answer, and a correct response without its end token."""

    prompt: str
    answer: str
    solution: str


def problem(rng: random.Random, *, level: str) -> Problem:
    """Sample a problem; every balance and amount has exactly the level's number of digits."""
    if level not in LEVELS:
        raise ValueError(f"unknown level {level!r}: choose one of {', '.join(LEVELS)}")
    digits, entry_counts = LEVELS[level]
    low, high = 10 ** (digits - 1), 10**digits - 1
    entries, first = rng.choice(entry_counts), rng.randrange(len(MONTHS))
    balances = [rng.randint(low, high)]
    for _ in range(entries):
        balances.append(rng.choice([b for b in range(low, high + 1) if abs(b - balances[-1]) >= low]))
    name, thing = rng.choice(NAMES), rng.choice(OBJECTS)
    booked = ""
    for i, (old, new) in enumerate(pairwise(balances), first):
        booked += f"{MONTHS[i % len(MONTHS)]}: {rng.choice(GAINS if new > old else LOSSES)} {abs(new - old)}. "
    prompt = f"{name} has {balances[0]} {thing}. {booked}How many does {name} have?"
    return Problem(prompt, str(balances[-1]), _write(*_read(prompt), lambda: False))


def careless(problem: Problem, rng: random.Random, *, rate: float) -> str:
    """Return a response with two kinds of arithmetic error, each made with probability `rate` wherever it is possible.

    The errors are a forgotten carry, and subtracting the smaller digit from the larger instead of borrowing. The
    format is correct, and each line continues correctly from the line before. A model trained on such responses is a
    weak but fluent student.
    """
    return _write(*_read(problem.prompt), lambda: rng.random() < rate)


def _read(prompt: str) -> tuple[str, list[tuple[str, str, str]]]:
    """Return the opening balance of the prompt and its entries, as (month, sign, amount)."""
    booked = re.findall(r"(\w+): (\w+) (\d+)", prompt)
    entries = [(month, "+" if verb in GAINS else "-", amount) for month, verb, amount in booked]
    return re.findall(r"\d+", prompt)[0], entries


def _write(balance: str, entries: list[tuple[str, str, str]], slips: Callable[[], bool]) -> str:
    """Return the response with its four stages; `slips()` decides at each carry and borrow whether to make an error."""
    plan = work = old_balance = ""
    for month, sign, amount in entries:
        plan += f"{month}: {sign}{amount}\n"
        old_balance, balance, columns, mark = balance, "", "", ""
        for a, b in zip(reversed(old_balance), reversed(amount), strict=True):
            total = _column(int(a), sign, int(b), carried=mark == "^", slips=slips)
            columns += f"{mark}{a}{sign}{b}={total % 10}"
            mark = "_" if 0 <= total <= 9 else "^"
            balance = f"{total % 10}{balance}"
        work += f"{month}: {columns}\n"
    _, sign, amount = entries[-1]
    check = f"{balance}{'-' if sign == '+' else '+'}{amount}={old_balance}\n"
    return "".join(tag + text for tag, text in zip(STAGES, (plan, work, check, balance), strict=True))


def _column(a: int, sign: str, b: int, *, carried: bool, slips: Callable[[], bool]) -> int:
    """Return `a + b` or `a - b` with the carry or borrow included; a result outside 0..9 carries or borrows again."""
    if sign == "+":
        return a + b + int(carried and not slips())
    total = a - b - carried
    return -total if total < 0 and slips() else total


def verify(response: str, answer: str) -> float:
    """Return 1.0 if the response ends with the answer tag and the correct answer, else 0.0.

    All four stage tags must occur once and in order, and only the answer may follow the last tag.  `response` must not
    contain the end token.
    """
    tags = tuple(re.findall(r"<[a-z]+>", response))
    return float(tags == STAGES and response.partition(STAGES[-1])[2] == answer)


def problem_at(seed: int, index: int, *, level: str, heldout: bool = False) -> Problem:
    """Return problem `index` of stream `seed`; a hash of the prompt decides its split, so splits share no prompt."""
    rng = random.Random(f"{seed}/{index}/{level}/{heldout}")
    while True:
        sampled = problem(rng, level=level)
        if (zlib.crc32(sampled.prompt.encode()) % HELDOUT_SHARE == 0) == heldout:
            return sampled


def problems(seed: int, *, level: str, heldout: bool = False) -> Iterator[Problem]:
    """Yield `problem_at(seed, 0)`, `problem_at(seed, 1)`, … without end."""
    return (problem_at(seed, index, level=level, heldout=heldout) for index in count())
