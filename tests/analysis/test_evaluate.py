"""Benchmarks: measures against enumeration and by hand, loaders on the real files and on rows like theirs."""

import itertools
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from opd.analysis.evaluate import EvaluationScores, compare_scores, evaluate, final_answer, majority, pass_at_k
from opd.cli import main
from opd.config.data import Data
from opd.config.evaluate import Evaluate
from opd.core.errors import Refusal
from opd.core.intervals import bootstrapped, interval
from opd.core.sampling import Sampling
from opd.data.tasks import benchmarks as sets
from opd.data.tasks.benchmarks import BENCHMARKS, BOXED, LETTER
from tests.tiny_models import tiny

ROOT = Path(__file__).parents[2]
PLACES = (Path(os.environ.get("OPD_DATA") or "-"), ROOT / "shared/data", ROOT.parent / "shared/data")
REAL = next((place for place in PLACES if place.is_dir()), None)


def test_the_bootstrap_against_all_its_draws():
    values = [0.0, 0.25, 1.0, 1.0, 0.5]
    means = sorted(sum(draw) / 5 for draw in itertools.product(values, repeat=5))
    found = bootstrapped(values)
    assert found.value == 0.55
    for end, at in ((found.low, 0.025), (found.high, 0.975)):  # within what 4000 draws can tell of the quantile
        assert means[int((at - 0.01) * len(means))] <= end <= means[int((at + 0.01) * len(means))]
    assert (found.low, found.high) != (interval(values).low, interval(values).high)
    table = EvaluationScores((tuple(values),), (1,) * 5, (True,) * 5, (1.0,), (), ()).table("bootstrap")
    assert table["avg@5"] == {"value": 0.55, "low": 0.55, "high": 0.55}  # one prompt: all draws are alike


@pytest.mark.parametrize("n", [1, 4, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n):
    for right in range(n + 1):
        for k in range(1, n + 1):
            subsets = list(itertools.combinations([True] * right + [False] * (n - right), k))
            assert pass_at_k(right, n, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize(
    ("said", "outcomes", "value"),
    [
        (["4", "4", "5"], [1, 1, 0], 1.0),
        (["5", "5", "4"], [0, 0, 1], 0.0),
        (["4", "5"], [1, 0], 0.5),  # no majority: a fair coin
        (["a", "b", "c"], [0, 1, 0], 1 / 3),
        (["", "", "4"], [0, 0, 1], 1.0),  # who says nothing has no vote
        (["", ""], [0, 0], 0.0),
        (["1/2", "0.5", "3", "3", "2/4"], [1, 1, 0, 0, 1], 1.0),  # one answer in three spellings
    ],
)
def test_the_majority_by_hand(said, outcomes, value):
    same = lambda i, j: {said[i], said[j]} <= {"1/2", "0.5", "2/4"}
    assert majority(said, list(map(float, outcomes)), same) == pytest.approx(value)


def test_the_final_answer_of_a_response():
    assert final_answer(r"so \boxed{\frac12}.") == r"\frac12" and final_answer("first\nThe answer is 7.") == "7"
    assert final_answer("<think>\\boxed{1}</think> nothing\n8") == "8" and final_answer("") == ""


# What the published files hold: how many problems, how one begins, the answer that it is compared with, a wrong one.
GOLDEN = [
    ("gsm8k", "gsm8k-test.jsonl", 1319, 0, "Janet\u2019s ducks lay 16 eggs per day.", "18", "17"),
    ("math-500", "math500-test.jsonl", 500, 1, "Define\n\\[p = \\sum", "p - q", "q - p"),
    ("aime24", "aime24-test.jsonl", 30, 0, "Every morning Aya goes for a $9$-kilometer-long walk", "204", "240"),
    ("aime25", "aime25-test.jsonl", 30, 1, "In  $\\triangle ABC$  points", "588", "589"),
    ("amc23", "amc23-test.jsonl", 40, 0, "Cities $A$ and $B$ are $45$ miles apart.", "27", "45"),
    ("minerva", "minerva_math-test.jsonl", 272, 0, "Each of the two Magellan telescopes", "1.6", "16"),
    ("olympiad", "olympiadbench-test.jsonl", 675, 1, "Given a positive integer $n$", "\\frac{1}{2n+2}", "2n+2"),
    ("sciknoweval", "sciknoweval-chemistry-molar-weight.jsonl", 600, 1, "What is the molar weight (g/mol)", "D", "A"),
    ("sciknoweval", "sciknoweval-chemistry-reaction-mechanism.jsonl", 269, 0, "The process of olefin", "B", "C"),
    (
        "sciknoweval-filling",
        "sciknoweval-chemistry-balancing.jsonl",
        300,
        1,
        "Here is a unbalanced chemical equation:\nBa(NO3)2",
        "Ba(NO3)2 + H2SO4 = BaSO4 + 2HNO3",
        "Ba(NO3)2 + H2SO4 = BaSO4 + HNO3",
    ),
]  # fmt: skip


@pytest.mark.skipif(REAL is None, reason="the published files are not here: set OPD_DATA to their folder")
@pytest.mark.parametrize(("name", "file", "size", "at", "begins", "right", "wrong"), GOLDEN)
def test_the_published_files(name, file, size, at, begins, right, wrong):
    task = sets.load(name, Data(source=str(REAL / file), split="test"))
    assert len(task.prompts) == size and task.name == name
    prompt = task.prompts[at]
    text = prompt.messages[-1]["content"]
    assert text.startswith(begins) and text.endswith(BENCHMARKS[name].instruction)
    assert task.verify(f"Thus \\boxed{{{right}}}", prompt) == 1
    assert task.verify(f"Thus \\boxed{{{wrong}}}", prompt) == 0
    if name == "sciknoweval":
        assert "\nA. " in text and "\nD. " in text


FIXTURES = {
    "gsm8k": ({"question": "1+1?", "answer": "It is <<1+1=2>>2.\n#### 2"}, "2"),
    "math-500": ({"problem": "1/2?", "solution": r"\boxed{\frac12}", "answer": r"\frac12", "level": 2}, "0.5"),
    "aime24": ({"id": 60, "problem": "4?", "solution": r"\boxed{204}", "answer": "204"}, "204"),
    "aime25": ({"problem": "70?", "expected_answer": "70", "reference_solution": r"\boxed{70}"}, "70"),
    "amc23": ({"problem": "27?", "answer": 27.0, "question": "27?"}, "27"),
    "minerva": ({"problem": "f?", "solution": r"first \boxed{1} then \boxed{4.5e33}", "type": "x"}, "4.5e33"),
    "olympiad": ({"question": "2?", "solution": ["so 2"], "final_answer": ["2"], "unit": None}, "2"),
    "gpqa": (
        {"Question": "Q?", "Correct Answer": " yes\n", **{f"Incorrect Answer {i}": f"no {i}" for i in (1, 2, 3)}},
        None,
    ),
    "sciknoweval": (
        {"question": "Q?", "choices": {"text": ["p", "q"], "label": ["A", "B"]}, "answerKey": "B", "prompt": {}},
        "B",
    ),
    "sciknoweval-filling": (
        {"question": "H2 + O2 =", "answer": "2H2 + O2 = 2H2O", "answerKey": "", "choices": {"text": [], "label": []}},
        "2H2 + O2 = 2H2O",
    ),
}  # fmt: skip


def written(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_rows_of_every_set(name, tmp_path):
    row, right = FIXTURES[name]
    task = sets.load(name, Data(source=written(tmp_path / "set.jsonl", row)))
    (prompt,) = task.prompts
    text = prompt.messages[-1]["content"]
    assert text.endswith(BENCHMARKS[name].instruction)
    right = right or prompt.answer
    assert task.verify(f"\\boxed{{{right}}}", prompt) == 1 and task.verify("\\boxed{Z}", prompt) == 0


def test_options_are_shuffled_by_the_seed(tmp_path):
    rows = [dict(FIXTURES["gpqa"][0], Question=f"Q{i}?") for i in range(40)]
    path = written(tmp_path / "gpqa.jsonl", *rows)
    load = lambda seed: sets.load("gpqa", Data(source=path, seed=seed)).prompts
    prompts = load(0)
    for prompt in prompts:
        text = prompt.messages[0]["content"]
        assert f"\n{prompt.answer}. yes\n" in text and all(f". no {i}\n" in text for i in (1, 2, 3))
        assert text.endswith(LETTER)
    letters = [p.answer for p in prompts]
    assert set(letters) == set("ABCD")
    assert letters == [p.answer for p in load(0)] != [p.answer for p in load(1)]


def test_what_the_user_sets_wins(tmp_path):
    path = written(tmp_path / "set.jsonl", {**FIXTURES["gsm8k"][0], "other": "3"})
    task = sets.load("gsm8k", Data(source=path, answer_column="other", instruction="Be brief."))
    assert task.prompts[0].answer == "3" and task.prompts[0].messages[0]["content"] == "1+1?\nBe brief."
    assert sets.load("gsm8k", Data(source=path)).prompts[0].messages[0]["content"] == "1+1?\n" + BOXED


@pytest.mark.parametrize(
    ("name", "source", "told"),
    [
        ("gsm9k", "x.jsonl", "choose gsm8k, math-500"),
        ("gsm8k", "embedded:ledger", "from a file"),
        ("gpqa", "set.jsonl", "no column 'Correct Answer'; the columns are question, answer"),
        ("math-500", "set.jsonl", "--prompt-column problem"),
    ],
)
def test_what_is_no_set_is_refused_in_one_line(name, source, told, tmp_path):
    written(tmp_path / "set.jsonl", FIXTURES["gsm8k"][0])
    with pytest.raises(Refusal, match=told) as caught:
        sets.load(name, Data(source=source if ":" in source else str(tmp_path / source)))
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return [str(tiny(root / f"m{seed}", seed=seed)) for seed in (1, 2)]


def test_two_models_on_the_same_problems(tmp_path, capsys):
    flags = ["--prompts", "embedded:ledger-short", "--limit", "8", "--max-new-tokens", "64", "--samples", "4"]
    flags += ["--temperature", "1", "--model", "embedded:teacher", "--against", "embedded:student"]
    assert main(["eval", *flags, "--out", str(tmp_path / "rows.jsonl"), "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [r["model"] for r in rows] == ["embedded:teacher"] * 8 + ["embedded:student"] * 8
    assert [r["prompt"] for r in rows[:8]] == [r["prompt"] for r in rows[8:]]
    mine, theirs = (sum(sum(r["outcomes"]) / 4 for r in part) / 8 for part in (rows[:8], rows[8:]))
    assert [t["avg@4"]["value"] for t in table["models"]] == pytest.approx([mine, theirs])
    for name in ("avg@4", "pass@1", "pass@4", "maj@4"):
        found = table["paired"][name]
        assert found["value"] == pytest.approx(table["models"][0][name]["value"] - table["models"][1][name]["value"])
        assert found["low"] <= found["value"] <= found["high"]
    said = [[x.partition("<answer>")[2] for x in r["responses"]] for r in rows]
    for row, answers in zip(rows, said, strict=True):
        counts = {a: answers.count(a) for a in answers}
        if list(counts.values()).count(max(counts.values())) == 1:
            first = answers.index(max(counts, key=counts.get))
            assert row["majority"] in (row["outcomes"][first], max(row["outcomes"]))
    assert main(["eval", *flags]) == 0
    assert "better / worse" in capsys.readouterr().out


def test_the_same_model_makes_no_difference(models):
    what = Evaluate(model=models[0], prompts="embedded:ledger-short", sampling=Sampling(max_new_tokens=8), samples=1)
    scores = [evaluate(replace(what, data=Data(split="test", limit=3))) for _ in range(2)]
    assert scores[0] == scores[1] and scores[0].each().keys() == {"avg@1"}
    assert compare_scores(("a", scores[0]), ("b", scores[1]))["avg@1"].value == 0


def test_a_set_brings_its_number_of_samples_where_it_samples(models, tmp_path, capsys):
    path = written(tmp_path / "aime.jsonl", FIXTURES["aime24"][0])
    flags = ["eval", "--model", models[0], "--prompts", path, "--set", "aime24", "--max-new-tokens", "4", "--json"]
    assert main([*flags, "--no-chat"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 1
    assert main([*flags, "--no-chat", "--temperature", "0.6"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert table["samples"] == 32 and table["set"] == "aime24" and "maj@32" in table
    assert main([*flags, "--against", models[0]]) == 2
    assert "itself" in capsys.readouterr().err
