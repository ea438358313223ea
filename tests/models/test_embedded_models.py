"""The embedded tokenizer, teacher and students, and the ledger task they were trained on."""

import itertools
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd.data.tasks import ledger
from opd.models.source import EMBEDDED

MODELS = ("teacher", "student", "small")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED / "teacher")


def some(count: int, level: str, *, seed: int = 0, heldout: bool = True) -> list[ledger.Problem]:
    return list(itertools.islice(ledger.problems(seed, level=level, heldout=heldout), count))


def test_solution_in_the_docstring_is_one_the_task_writes():
    plan = "Nov: +35\nDec: -18\n"
    work = "Nov: 7+5=2^4+3=8\nDec: 2-8=4^8-1=6\n"
    expected = f"<plan>{plan}<work>{work}<check>64+18=82\n<answer>64"
    entries = [("Nov", "+", "35"), ("Dec", "-", "18")]
    assert ledger._write("47", entries, lambda: False) == expected


def test_arithmetic_is_right():
    for problem in some(200, "full"):
        start, entries = ledger._read(problem.prompt)
        assert int(problem.answer) == int(start) + sum(int(sign + amount) for _, sign, amount in entries)


def test_careless_solutions_are_fluent_and_often_wrong():
    rng, problems = random.Random(0), some(200, "full")
    assert all(ledger.careless(p, rng, rate=0.0) == p.solution for p in problems)
    careless = [ledger.careless(p, rng, rate=1.0) for p in problems]
    assert all(len(text) == len(p.solution) for text, p in zip(careless, problems, strict=True))
    assert 0.1 < sum(ledger.verify(text, p.answer) for text, p in zip(careless, problems, strict=True)) / 200 < 0.5


@pytest.mark.parametrize("level", ledger.LEVELS)
def test_tokenizer_round_trip(tokenizer, level):
    assert len(tokenizer) >= 128
    for problem in some(100, level):
        for text in (problem.prompt, problem.solution):
            tokens = tokenizer.encode(text, add_special_tokens=False)
            assert tokenizer.unk_token_id not in tokens
            assert tokenizer.decode(tokens) == text


def test_prompt_renders_bare_and_as_chat(tokenizer):
    problem = some(1, "full")[0]
    turns = [{"role": "user", "content": problem.prompt}]
    opened = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert opened == f"<bos><user>{problem.prompt}<assistant>"
    turns.append({"role": "assistant", "content": problem.solution})
    assert tokenizer.apply_chat_template(turns, tokenize=False) == f"{opened}{problem.solution}<eos>"
    assert tokenizer(problem.prompt)["input_ids"][0] == tokenizer.bos_token_id


@pytest.mark.parametrize("level", ledger.LEVELS)
def test_verify_tells_right_from_wrong(level):
    for problem in some(100, level):
        right, answer = problem.solution, problem.answer
        assert ledger.verify(right, answer) == 1.0
        wrong = right[:-1] + str((int(right[-1]) + 1) % 10)
        truncated = right[: right.index("<answer>")]
        for response in (wrong, truncated, right + "0", right + "\n", right.replace("<check>", ""), right * 2):
            assert ledger.verify(response, answer) == 0.0


@pytest.mark.parametrize("garbage", ["", "<answer>", "<answer>64", "<plan><work><check><answer>", "64", "\0<<>>"])
def test_verify_takes_garbage(garbage):
    assert ledger.verify(garbage, "64") == 0.0


def test_response_lengths(tokenizer):
    for level, least, low, high in (("full", 50, 150, 160), ("short", 15, 40, 45)):
        lengths = [len(tokenizer.encode(p.solution, add_special_tokens=False)) + 1 for p in some(400, level)]
        lengths.sort()
        assert least <= lengths[0] and low <= lengths[380] and lengths[-1] <= high


def test_streams_are_deterministic_and_disjoint():
    first, again = some(300, "short", heldout=False), some(300, "short", heldout=False)
    assert first == again
    assert first[7] == ledger.problem_at(0, 7, level="short")
    assert first != some(300, "short", seed=1, heldout=False)
    assert not {p.prompt for p in first} & {p.prompt for p in some(300, "short", heldout=True)}


def test_unknown_level_is_refused():
    with pytest.raises(ValueError, match="choose one of short, full"):
        ledger.problem(random.Random(0), level="hard")


@pytest.mark.parametrize("name", MODELS)
def test_folder_is_a_complete_model(name, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED / name)
    assert AutoTokenizer.from_pretrained(EMBEDDED / name).get_vocab() == tokenizer.get_vocab()
    assert model.dtype == torch.float32
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_total_size():
    assert sum(path.stat().st_size for path in EMBEDDED.rglob("*") if path.is_file()) < 10e6


def test_teacher_solves_short_problems(tokenizer):
    teacher = AutoModelForCausalLM.from_pretrained(EMBEDDED / "teacher").eval()
    problems = some(64, "short")
    inputs = tokenizer([p.prompt for p in problems], padding=True, return_tensors="pt")
    width = inputs["input_ids"].shape[1]
    out = teacher.generate(**inputs, max_new_tokens=48, do_sample=False)
    responses = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
    scores = [ledger.verify(r, p.answer) for r, p in zip(responses, problems, strict=True)]
    assert sum(scores) / len(scores) > 0.9
