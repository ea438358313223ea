"""Every method by name on the embedded pair, as the command line trains it; and what is peculiar to it happened."""

import math

import pytest

from opd import cli
from opd.methods import METHODS
from tests.tiny_models import logged

PAIR = "--student embedded:student --teacher embedded:teacher --prompts embedded:ledger-short --preset embedded"
SIZE = "--steps 3 --batch 16 --max-new-tokens 48 --warmup 0 --save-every 100 --quiet"
STUDENT = PAIR.replace("--teacher embedded:teacher ", "")
TOLD = ("--context-template", "{context} {prompt}")  # in the alphabet of the embedded tokenizer

NOTED = "{prompt} {reflection}"
RUN = {  # the method's flags, where they are not the preset's
    "async-opd": ["--exact-staleness"],
    "gkd": ["--share", "0.5"],
    "npd": ["--pool", "1", "--epochs", "3", "--refresh", "2"],
    "kat": ["--window", "4", "--floor", "2", "--ready", "8", "--after", "1", "--patience", "2"],
    "trb": ["--anneal", "3"],
    "rock-freeze": ["--tokens", "ROCKS"],
    "ropd": ["--prompts", "embedded:ledger", "--max-new-tokens", "128"],  # whose answers differ
    "rubricem": ["--reflections", "4", "--window", "1", "--reflect", "{prompt} {response}", "--remember", NOTED],
}
FIRED = {  # of each step's numbers; a list of them where it takes a step or more
    "fire": lambda r: r["weighted"] < 0.95 and r["effective"] < r["weighted"],
    "scope": lambda r: r["weighted_0"] + r["weighted_1"] == pytest.approx(1) and r["weighted_0"] > 0,
    "entropy": lambda r: 0.1 < r["weighted"] < 0.3,
    "eopd": lambda r: 0.1 < r["weighted_1"] < 0.3 and r["weighted_0"] == 1,
    "eopd-sampled": lambda r: 0 <= r["weighted_1"] < 0.9 and r["weighted_0"] == 1,
    "iw-opd": lambda r: 0.5 < r["effective"] < 0.999,
    "rock-freeze": lambda r: 0 < r["weighted"] < 1,
    "tropd": lambda rows: (  # the teacher writes all at first, then less; of the student's tokens some are rejected
        rows[0]["prefix_share"] == 1 > rows[2]["prefix_share"] > 0 and 0 < rows[2]["weighted_1"] < rows[2]["weighted_0"]
    ),
    "g-opd": lambda r: r["advantage_std"] > 0,
    "oprd": lambda r: 0 < r["hidden_cosine"] < 1 and "reverse_kl" not in r,
    "opsd": lambda r: r["reverse_kl"] > 0.01,
    "sdft": lambda r: r["reverse_kl"] > 0.01,
    "sdpo": lambda r: r["tokens"] > 0 and r["reverse_kl"] > 0.01,
    "omniopd": lambda r: 0 < r["weighted_0"] == pytest.approx(r["audited"]) and 0.5 < r["agreement"] <= 1,
    "ropd": lambda r: 0 < r["verdict"] < 1 and not r["unjudged"],
    "rubricem": lambda rows: (  # the student reflects on step 1 and is trained on it in step 2; stages are scored apart
        "reflections" not in rows[0]
        and rows[1]["reflections"] == 2 * 4
        and 0 < rows[1]["reflection"] <= 1
        and len({row[f"stage_{k}"] for row in rows for k in (1, 2, 3, 4)}) > 4
        and not any(r["unjudged"] for r in rows)
    ),
    "trb": lambda rows: rows[0]["beta"] > 0 and rows[0]["behavior_kl"] <= 0.02 + 1e-4,
    "kat": lambda rows: rows[-1]["cut"] > 0 and rows[-1]["cut_tokens"] > 0,
    "async-opd": lambda rows: (  # its preset is four behind: all three steps are of the first weights
        [r["staleness_max"] for r in rows] == [0, 1, 2] and rows[2]["drift"] > 1e-6 > abs(rows[0]["drift"])
    ),
    "npd": lambda rows: (  # the second step trains on the first's rollouts, and some are left out
        [r["staleness"] for r in rows] == [0, 1, 0]
        and rows[1]["tokens"] == rows[0]["tokens"]
        and rows[1]["drift"] > 1e-6 > abs(rows[0]["drift"])
        and all(r["weighted_0"] == r["weighted_1"] == 1 > r["admitted"] > 0 for r in rows)
    ),
    "opd-zscore": lambda r: r["advantage_std"] > 0,
}
OF_ALL = {"async-opd", "npd", "trb", "kat", "tropd", "rubricem"}


@pytest.fixture(scope="module")
def rocks(tmp_path_factory):
    """A list of rock tokens of the embedded student."""
    file = tmp_path_factory.mktemp("rocks") / "rocks.json"
    pair = PAIR.replace(" --preset embedded", "")
    assert cli.main(["rock", *pair.split(), "--rollouts", "32", "--top", "4", "--out", str(file)]) == 0
    return file


@pytest.mark.parametrize("name", METHODS)
def test_trains_the_embedded_pair(name, tmp_path, request, capsys):
    own = [str(request.getfixturevalue("rocks")) if word == "ROCKS" else word for word in RUN.get(name, [])]
    base = STUDENT if METHODS[name]().teacher else PAIR
    out = tmp_path / "run"
    assert cli.main(["train", *base.split(), *SIZE.split(), "--out", str(out), name, *own]) == 0, capsys.readouterr()
    rows = logged(out)
    steps = [row for row in rows if "grad_norm" in row]
    assert len(steps) == 3
    for row in steps:
        assert math.isfinite(row["loss"]) and row["grad_norm"] > 0 and not row["refused"]
    if name in FIRED:
        fired = FIRED[name]
        assert fired(steps) if name in OF_ALL else all(map(fired, steps)), steps
