"""Verifiers on corpora of answers: equal ones in other writing, near misses, and responses that think."""

import json
import random
import time
from fractions import Fraction
from pathlib import Path

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from opd.core.errors import Refusal
from opd.core.types import Rollout
from opd.data.verifiers import response_text, sandbox, verify
from opd.data.verifiers.extract import same_number, without_thinking
from opd.data.verifiers.math_writing import latex
from opd.data.verifiers.thinking import MARKS
from opd.head.vocabulary import Vocabulary
from opd.rollouts.collector import Collector
from opd.rollouts.engines.hf import HFEngine
from opd.teachers.judges.annotator import TeacherTexts
from tests.data.test_tasks import REAL

CORPORA = Path(__file__).parent / "corpora"


def pairs(name: str) -> list[tuple[str, str]]:
    return [tuple(line.split("\t")) for line in (CORPORA / name).read_text().splitlines()]


SAME, MISSES = pairs("same_answers.tsv"), pairs("near_misses.tsv")
ANSWERS = sorted({answer for pair in SAME + MISSES for answer in pair})


def boxed(answer: str) -> str:
    return rf"so \boxed{{{answer}}}"


@pytest.mark.parametrize("corpus", ["same_answers.tsv", "near_misses.tsv"])
def test_corpus(corpus):
    want = float(corpus == "same_answers.tsv")
    wrong = [
        (a, b)
        for a, b in pairs(corpus)
        if {verify.math(boxed(b), a), verify.math(boxed(a), b), verify.math(f"The answer is {b}", a)} != {want}
    ]
    assert not wrong
    assert len(pairs(corpus)) >= 150


def test_each_answer_equals_itself():
    assert [x for x in ANSWERS if verify.math(x, x) != 1 or verify.math(boxed(x), x) != 1] == []
    assert len(ANSWERS) > 500


@pytest.mark.skipif(REAL is None, reason="no folder shared/data (or OPD_DATA) with real data sets")
def test_each_answer_of_the_real_sets_equals_itself():
    columns = {"answer", "expected_answer", "final_answer", "solution"}
    answers = {
        str(value)
        for path in sorted(REAL.glob("*.jsonl"))
        if not path.name.startswith("sciknoweval")
        for row in map(json.loads, path.read_text().splitlines())
        for column in columns & row.keys()
        for value in (row[column] if isinstance(row[column], list) else [row[column]])
    }
    assert [x for x in answers if x and verify.math(x, x) != 1] == []
    assert len(answers) > 5000


@given(st.sampled_from(ANSWERS), st.sampled_from(ANSWERS))
@settings(max_examples=150, deadline=None)
def test_the_verdict_is_the_same_in_both_directions(a, b):
    assert verify.math(boxed(a), b) == verify.math(boxed(b), a)


LATEX = st.lists(
    st.sampled_from(
        [*r"\{}()[]$^_+-*/=<>,.:;'!%0123456789xym e√²½°∞π", r"\frac", r"\sqrt", r"\text{ m}", r"\pm", " or "]
    ),
    max_size=20,
).map("".join)


@given(LATEX, LATEX)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_writing_has_a_verdict_that_does_not_depend_on_the_direction(a, b):
    assert verify.math(boxed(a), b) in (0.0, 1.0)
    if "{" not in a + b and "}" not in a + b and "answer" not in a + b:
        assert verify.math(boxed(a), b) == verify.math(boxed(b), a) or not (a.strip() and b.strip())
    assert latex(latex(a)) is not None


@given(st.fractions(), st.fractions())
def test_fractions_are_equal_by_value(a, b):
    written = [rf"\frac{{{x.numerator}}}{{{x.denominator}}}" for x in (a, b)]
    assert same_number(a, b) == same_number(b, a)
    if {1} != {a.denominator, b.denominator} and a != b and a.denominator * b.denominator < 10**6:
        assert verify.math(boxed(written[0]), written[1]) == float(same_number(a, b))


@given(st.integers(min_value=1, max_value=10**6 - 1), st.integers(min_value=-300, max_value=300))
@settings(max_examples=60, deadline=None)
def test_numbers_of_any_size_are_compared_at_full_precision(digits, exponent):
    a, b = (rf"{x} \times 10^{{{exponent}}}" for x in (digits, digits + 1))
    assert verify.math(boxed(a), a.replace(r"\times", "\u00d7")) == 1
    assert verify.math(boxed(a), b) == 0


def test_a_decimal_may_be_rounded_to_six_digits():
    third = Fraction(1, 3)
    assert same_number(Fraction("0.333333"), third) and same_number(third, Fraction("0.333333"))
    assert not same_number(Fraction("0.33333"), third) and same_number(Fraction("0.33333"), third, digits=5)
    assert not same_number(Fraction("0.333334"), third)
    assert same_number(Fraction("0.30000000000000004"), Fraction("0.3"))
    assert not same_number(Fraction("123456789.1"), Fraction("123456789.2"))
    assert not same_number(Fraction("999999.6"), Fraction(1000000))
    assert not same_number(Fraction(10) ** -5000, Fraction(0))


HANGS = [
    r"9^{9^{9^{9}}}",
    r"10^{10^{10}}+1",
    r"\sum_{k=1}^{10^{9}} \frac{1}{k^2}",
    r"\int_0^1 \sin(x^x \cos(x^x))^{x^x} dx",
    ",".join(rf"\sqrt{{{i}}}+\sqrt{{{i + 1}}}" for i in range(80)),
    ",".join(["9^{9^{9^{9}}}"] * 40),
    "(" * 500 + "1" + ")" * 500,
    r"\frac{1}{" * 60 + "2" + "}" * 60,
    "((x+1)^{50}+1)^{50}",
]


@pytest.mark.parametrize("answer", HANGS, ids=range(len(HANGS)))
def test_no_comparison_exceeds_its_time_limit(answer):
    start = time.monotonic()
    assert verify.math(boxed(answer), r"\frac{7}{3}x+1, 2") == 0.0
    assert time.monotonic() - start < sandbox.WALL_LIMIT / 2


@pytest.mark.parametrize("text", ["\\boxed{" + "(" * 10**5, "answer is " * 10**4, "$" * 10**5 + "1", "1 000" * 10**4])
def test_long_responses_are_read_quickly(text):
    start = time.process_time()
    assert verify.math(text, "2") == verify.exact(text, "2") == 0.0
    assert verify.numeric(text, "2") == 0.0
    assert time.process_time() - start < 5


# ---- thinking ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("opening", "closing"), MARKS)
@pytest.mark.parametrize("name", ["math", "numeric", "exact"])
def test_thinking_is_not_read(opening, closing, name):
    score = verify.VERIFIERS[name]
    assert score(rf"{opening}try \boxed{{7}}{closing}The answer is 12.", "12") == 1
    assert score(rf"try \boxed{{7}}{closing}The answer is 12.", "12") == 1  # the template opened it
    assert score(rf"{opening}try \boxed{{12}}{closing}The answer is 7.", "12") == 0
    assert score(rf"{opening}The answer is \boxed{{12}}", "12") == 0, "it never stopped thinking"
    assert score(rf"\boxed{{7}} {opening} no {closing} \boxed{{12}}", "12") == 1


def test_a_number_with_a_large_exponent_is_no_other_number():
    assert verify.numeric("1e100", "1") == verify.numeric("1e999999999", "1") == 0
    assert verify.numeric("1e100", f"1{'0' * 100}") == 1


def test_a_short_statement_after_the_box_is_the_final_answer():
    assert verify.math(r"try \boxed{7}The answer is 12.", "12") == 1
    assert verify.math(r"\boxed{7}. The answer is $\frac{1}{2}$.", "0.5") == 1
    assert verify.math(r"\boxed{7}. So the answer is clear.", "7") == 1
    assert verify.math(r"\boxed{7}, and the answer is an integer", "7") == 1


WORDS = ["try", "\\boxed{7}", "\\boxed{12}", "12", "analysis", "commentary", "final", "think", "response", "<", ">"]


def tokenizer(*special: str, added: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A tokenizer with words, and marks that are special tokens or added ones."""
    vocabulary = {word: i for i, word in enumerate(["[UNK]", *WORDS])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    text = PreTrainedTokenizerFast(tokenizer_object=model, unk_token="[UNK]")
    text.add_special_tokens({"additional_special_tokens": list(special)})
    text.add_tokens(list(added))
    return text


SINGLE = [mark for mark in MARKS if mark[0].count("|>") + mark[0].count("<|") <= 2 and " " not in mark[0]]
PARTS = {  # the special tokens of marks that are several tokens
    "<|channel|>analysis<|message|>": ("<|channel|>", "<|message|>"),
    "<|open|>think<|sep|>": ("<|open|>", "<|close|>", "<|sep|>"),
}


@pytest.mark.parametrize(("opening", "closing"), [m for m in MARKS if m[0] in PARTS or m in SINGLE])
def test_marks_that_decoding_drops_are_found_by_their_ids(opening, closing):
    text = tokenizer(*PARTS.get(opening, (opening, closing)), "<|end|>")
    ids = text(rf"{opening} try \boxed{{7}} <|end|> {closing} 12 <|end|>")["input_ids"]
    assert closing not in text.decode(ids, skip_special_tokens=True)
    shown = response_text.decode(text, ids)
    assert without_thinking(shown) == "12" and "<|end|>" not in shown and "try" in shown
    assert verify.math(shown, "12") == 1
    unfinished = text(rf"{opening} try 12")["input_ids"]
    assert verify.math(response_text.decode(text, unfinished), "12") == 0


def test_marks_that_decoding_keeps_are_left_alone():
    text = tokenizer("<|end|>", added=("<think>", "</think>"))
    ids = text("<think> try </think> 12 <|end|>")["input_ids"]
    assert response_text.decode(text, ids) == text.decode(ids, skip_special_tokens=True)


def test_a_mark_of_an_unknown_family():
    text = tokenizer("<|done|>", "<|end|>")
    ids = text(r"try \boxed{7} <|done|> 12 <|end|>")["input_ids"]
    assert verify.math(response_text.decode(text, ids), "12") == 0
    assert verify.math(response_text.decode(text, ids, "<|done|>"), "12") == 1
    assert verify.math(response_text.decode(text, text("final try 12")["input_ids"], "try"), "12") == 1
    with pytest.raises(Refusal, match="--think-end"):
        response_text.decode(text, ids, " ")


def test_decoding_agrees_with_the_tokenizer_where_no_mark_is_special():
    text, rng = tokenizer("<|end|>"), random.Random(0)
    for _ in range(50):
        ids = [rng.randrange(len(WORDS)) for _ in range(rng.randrange(12))]
        assert response_text.decode(text, ids) == text.decode(ids, skip_special_tokens=True)


def test_the_flag_reaches_the_text_that_the_verifier_and_the_judges_read():
    text = tokenizer("<|done|>", "<|end|>")
    ids = tuple(text(r"try \boxed{7} <|done|> 12 <|end|>")["input_ids"])
    config = LlamaConfig(
        vocab_size=len(text), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    engine = HFEngine(LlamaForCausalLM(config), len(text), (len(text) - 1,))
    collector = Collector(engine, {}, text, Vocabulary(len(text)), think_end="<|done|>")
    assert verify.math(collector.text(ids), "12") == 1
    rollout = Rollout(
        prompt_ids=(1,),
        teacher_prompt_ids=(1,),
        ids=ids,
        sampler_logp=(0.0,) * len(ids),
        index=0,
        group=0,
        stopped=True,
    )
    texts = TeacherTexts({}, text, max_tokens=1, seed=0, think_end="<|done|>")
    assert texts.response(rollout) == "12"
