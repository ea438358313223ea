"""Files of stored answers (`answers.sqlite`) with damage: each answer is the one that was stored, is asked again, or
the file is refused."""

import random
import shutil
from collections.abc import Sequence
from pathlib import Path

from opd.core.errors import Refusal
from opd.teachers.text.answer_cache import AnswerCache, cache_key
from tests.campaigns import Counts
from tests.campaigns.damaged_reads import DAMAGES

ENTRIES = 60  # some pages of the file


def run(folder: Path, count: int, seed: int) -> Counts:
    """Damage a file `count` times, and look for each of its answers."""
    draw, counts = random.Random(seed), Counts()
    answers = {cache_key(i): [f"answer {i} " + "x" * draw.randrange(300)] for i in range(ENTRIES)}
    source = folder / "whole.sqlite"
    cache = AnswerCache(source)
    for key, texts in answers.items():
        cache.store(key, texts)
    assert cache.file is not None
    cache.file.close()
    for number in range(count):
        kind = list(DAMAGES)[number % len(DAMAGES)]
        path = folder / f"{number}.sqlite"
        shutil.copy(source, path)
        DAMAGES[kind](path, draw)
        found, end = _answers(path, list(answers))
        fault = "" if end is None or isinstance(end, Refusal) else repr(end)
        if any(texts not in (None, answers[key]) for key, texts in found.items()):
            fault = "another answer"
        counts.add(f"{kind}, attempt {number}", fault, refused=end is not None)
    return counts


def _answers(path: Path, keys: Sequence[str]) -> tuple[dict[str, list[str] | None], Exception | None]:
    """Return the answers of a file up to its first exception, and this exception."""
    cache, found = AnswerCache(path), dict[str, list[str] | None]()
    try:
        for key in keys:
            found[key] = cache.find(key)
        cache.store("new", ["an answer"])
    except Exception as error:
        return found, error
    finally:
        if cache.file is not None:
            cache.file.close()
    return found, None
