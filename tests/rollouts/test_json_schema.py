"""Answers that keep to a JSON schema: any model's, valid every time, from the model's own distribution."""

import hashlib
import json
import sys
from typing import Literal

import pytest
import torch
from pydantic import BaseModel, ConfigDict
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import opd
from opd.config import model_names
from opd.config.servers import Remote
from opd.core.sampling import Prompt, Sampling
from opd.rollouts.engines.base import GenerateRequest
from opd.rollouts.engines.hf import HFEngine
from opd.rollouts.engines.json_schema import GrammarCompiler
from opd.teachers.judges import rubric_judge, stage_judge
from opd.teachers.judges.judge_requests import AGAIN, FormModel, ListBounds, schema
from opd.teachers.judges.rubric_judge import AnswerGroup, Criterion, ModelJudge, Rubric
from opd.teachers.judges.rubric_memory import StageCriterion
from opd.teachers.judges.stage_judge import Contrast, Evolved, Marking, ModelStageJudge, Proposed
from opd.teachers.text.answer_cache import AnswerCache
from opd.teachers.text.text_models import CONTINUE_REQUEST, EndpointModel, Failure, InProcessModel
from opd.teachers.text.text_teacher import FailureLimit, TextTeacher
from scripts.soak import serving
from tests.tiny_models import tiny_bytes

pytest.importorskip("llguidance")


class Closed(BaseModel):
    """No other field, which a schema must say."""

    model_config = ConfigDict(extra="forbid")


class Mark(Closed):
    """One answer's."""

    index: Literal[1, 2, 3]
    met: tuple[bool, bool]


class Sheet(Closed):
    """All of them."""

    marks: tuple[Mark, Mark]


SCHEMA = Sheet.model_json_schema()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model that knows all bytes."""
    return tiny_bytes(tmp_path_factory.mktemp("bytes"))


@pytest.fixture(scope="module")
def pair(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval(), PreTrainedTokenizerFast.from_pretrained(folder)


def written(pair, compiler, **options):
    model, text = pair
    engine = HFEngine(model, len(text), (256,), **options)
    prompts = [text(f"question {i % 3}:")["input_ids"] for i in range(8)]
    made = [compiler.grammar(SCHEMA) for _ in prompts]
    return prompts, engine.generate(
        GenerateRequest(prompts, Sampling(max_new_tokens=200), seed=1, step=2, index=range(8), grammars=made)
    )


def test_every_answer_is_a_filled_form(pair):
    _, found = written(pair, GrammarCompiler.of(pair[1], 258, (256,)))
    assert all(sample.stopped for sample in found)
    read = [Sheet.model_validate_json(pair[1].decode(sample.ids[:-1])) for sample in found]
    assert len({str(sheet) for sheet in read}) > 4  # a random model fills them in at random


def test_in_whatever_company(pair):
    compiler = GrammarCompiler.of(pair[1], 258, (256,))
    assert [x.ids for x in written(pair, compiler, rows=3)[1]] == [x.ids for x in written(pair, compiler)[1]]


def test_tokens_come_from_the_models_distribution_within_the_form(pair):
    """Log-probs of the softmax over what the grammar lets through, by a matcher that reads each prefix anew."""
    compiler = GrammarCompiler.of(pair[1], 258, (256,))
    prompts, found = written(pair, compiler)
    for prompt, sample in zip(prompts[:3], found, strict=False):
        logits = pair[0](torch.tensor([[*prompt, *sample.ids]])).logits[0, len(prompt) - 1 : -1].detach()
        for t, (token, logp) in enumerate(zip(sample.ids, sample.logp, strict=True)):
            matcher = compiler.grammar(SCHEMA).matcher
            assert matcher.consume_tokens(list(sample.ids[:t]))
            may = [i for i in range(258) if matcher.validate_tokens([i]) == 1] or [256]  # the grammar is filled
            assert token in may
            assert logp == pytest.approx(float(logits[t, may].log_softmax(-1)[may.index(token)]), abs=1e-4)


def test_what_cannot_be_kept_to(pair, monkeypatch):
    with pytest.raises(opd.Refusal, match="response_format: Invalid type: nothing"):
        GrammarCompiler.of(pair[1], 258, (256,)).grammar({"type": "nothing"})
    monkeypatch.setitem(sys.modules, "llguidance", None)
    monkeypatch.setitem(sys.modules, "llguidance.hf", None)
    with pytest.raises(opd.Refusal, match=r"needs llguidance; pip install 'opd\[text\]'"):
        GrammarCompiler.of(pair[1], 258, (256,))


def test_the_openai_client_gets_filled_forms_from_a_server(folder):
    openai = pytest.importorskip("openai")
    told = {"type": "json_schema", "json_schema": {"name": "sheet", "schema": SCHEMA, "strict": True}}
    with serving(folder, "--name", "any") as (url, _):
        client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
        ask = lambda **more: client.chat.completions.create(
            model="any", messages=[{"role": "user", "content": "grade"}], max_tokens=200, **more
        )
        said = ask(n=3, seed=1, response_format=told)
        assert [choice.finish_reason for choice in said.choices] == ["stop"] * 3
        assert all(Sheet.model_validate(json.loads(choice.message.content)) for choice in said.choices)
        wrong = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
        for grammar in (wrong, {"type": "json_object"}):
            with pytest.raises(openai.BadRequestError, match="response_format"):
                ask(response_format=grammar)


def graded(writer, tmp_path, *, schemas):
    """What a random model says of five answers by a rubric of three, and of two stages' marks."""
    model = TextTeacher(writer, AnswerCache(tmp_path / f"{schemas}.sqlite"), FailureLimit("judge x", 1.0))
    judge = ModelJudge(FormModel(model, 400, schemas=schemas))
    rubric = Rubric(criteria=tuple(Criterion(criterion=f"says {i}", points=i) for i in (1, 2, 3)))
    groups = [AnswerGroup(Prompt(text=f"question {i}"), ("one",), ("two", "three", "four", "five")) for i in range(2)]
    return judge.grades(groups, [rubric] * 2, 0), judge.model.traffic()


def test_a_local_judge_that_knows_nothing_fills_its_form_in(folder, pair, tmp_path):
    """A model in this process: with a schema every verdict is one, without none is, and all are counted."""
    model, text = pair
    writer = InProcessModel("here", HFEngine(model, len(text), (256,)), text, 4096, {})
    found, traffic = graded(writer, tmp_path, schemas=True)
    assert all(len(met) == 5 and {len(x) for x in met} == {3} for met in found)
    assert traffic["judge_calls"] == 2 and traffic["judge_failed"] == 0 < traffic["judge_written_tokens"]
    found, traffic = graded(writer, tmp_path, schemas=False)
    assert [isinstance(met, Failure) for met in found] == [True, True]
    assert traffic["judge_calls"] + traffic["judge_failed"] > 2


def test_a_judge_behind_a_server_keeps_to_the_schema(folder, tmp_path):
    with serving(folder, "--name", "any") as (url, _):
        writer = EndpointModel(model_names.parse(f"openai:any@{url}/v1"), Remote(), field="judge")
        assert all(isinstance(met, tuple) for met in graded(writer, tmp_path, schemas=True)[0])


def test_the_schema_of_a_form():
    told = json.loads(schema(Marking, {"marks": ListBounds(2, 2, "index", (1, 2))}))
    assert told["properties"]["marks"]["minItems"] == told["properties"]["marks"]["maxItems"] == 2
    assert [x["properties"]["index"] for x in told["properties"]["marks"]["prefixItems"]] == [
        {"const": 1},
        {"const": 2},
    ]
    assert not told["additionalProperties"] and not told["$defs"]["Marked"]["additionalProperties"]
    told = json.loads(schema(Rubric, {"criteria": ListBounds(4, 12)}))
    assert "prefixItems" not in told["properties"]["criteria"] and told["properties"]["criteria"]["maxItems"] == 12


def test_criteria_by_the_schema_pass_the_judges_own_check(pair, tmp_path, monkeypatch):
    """Of each stage as many as are due, at the fewest and the most; of a stage with criteria there may be none."""
    asked = []

    def fill(self, requests, form, check, seed, *, temperature, bounds):
        asked.append((check, [bounds(i) for i in range(len(requests))]))
        return [Failure("nobody was asked")] * len(requests)

    monkeypatch.setattr(FormModel, "fill", fill)
    text = pair[1]
    writer = InProcessModel("here", HFEngine(pair[0], len(text), (256,)), text, 4096, {})
    model = TextTeacher(writer, AnswerCache(tmp_path / "answers.sqlite"), FailureLimit("judge x", 1.0))
    judge = ModelStageJudge(FormModel(model, 400), ("<plan>", "<work>", "<check>", "<answer>"))
    kept = (StageCriterion(2, "old", 1, False),)
    judge.evolve([Contrast(Prompt(text="q"), (), (), ()), Contrast(Prompt(text="q"), (), (), kept)], 0)
    ((check, lists),) = asked
    assert [told["criteria"].values for told in lists] == [(1, 2, 3, 4, 4), (1, 3, 4, 4)]
    compiler = GrammarCompiler.of(text, len(text), (256,))
    for i, told in enumerate(lists):
        most = told["criteria"]
        assert most.longest - most.shortest == 3
        for extra in [(), *((stage,) * 3 for stage in (1, 2, 3, 4))]:
            new = [Proposed(stage=stage, description="x", weight=1) for stage in (*most.values, *extra)]
            assert not check(i, Evolved(criteria=tuple(new)))
            grammar = compiler.grammar(json.loads(schema(Evolved, told)))
            assert grammar.matcher.consume_tokens(text(Evolved(criteria=tuple(new)).model_dump_json())["input_ids"])
        bad = Evolved(criteria=tuple(Proposed(stage=5, description="x", weight=1) for _ in most.values))
        grammar = compiler.grammar(json.loads(schema(Evolved, told)))
        assert not grammar.matcher.consume_tokens(text(bad.model_dump_json())["input_ids"])


def test_what_a_judge_is_sent_stays_what_it_was():
    """Cached answers are found by prompt and schema, and docstrings of forms are in schemas: a change loses answers."""
    prompts = [rubric_judge.RUBRIC, rubric_judge.GRADE, stage_judge.EVOLVE, stage_judge.MARK, stage_judge.WEIGH]
    forms = [rubric_judge.Rubric, rubric_judge.Sheet, Evolved, Marking, stage_judge.Weighed]
    sent = json.dumps([*prompts, AGAIN, CONTINUE_REQUEST, *(schema(form, {}) for form in forms)])
    assert hashlib.sha256(sent.encode()).hexdigest()[:16] == "883990afc41e12a4"
