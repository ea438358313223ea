"""Prompts as models read them: what chat templates get, the longest rows, and renderings that repeat."""

import json
import warnings
from datetime import datetime
from pathlib import Path

import pytest
from tokenizers import normalizers

from opd.config.data import Data
from opd.config.plan import resolved
from opd.config.train import Train
from opd.core.errors import Refusal
from opd.core.sampling import Prompt
from opd.data.prompt_stream import Prompts
from opd.data.prompts import _template_text, loses_text, render
from opd.data.tasks.load import load
from opd.data.verifiers import sandbox
from tests.data.test_tables import CHAT, TOOLS, write
from tests.data.test_tokenizers import byte_level

# A template in the form of Qwen's: tools in the system turn, calls as JSON.
QWEN = (
    "{% if tools %}[{% for tool in tools %}{{ tool | tojson }}{% endfor %}]{% endif %}"
    "{% for m in messages %}{{ m.role }}:{{ m.reasoning_content or '' }}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }}({{ call.function.arguments | tojson }}){% endfor %};"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
PLAIN = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"


def text(template: str | None, prompt: Prompt) -> str:
    tokenizer = byte_level(chat_template=template)
    return str(tokenizer.decode(list(render(tokenizer, prompt, chat_template_kwargs={}))))


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
def test_tool_calls_tools_and_reasoning_reach_the_template(tools):
    turns = tuple(turn | {"content": turn["content"] or ""} for turn in CHAT)
    with pytest.warns(UserWarning) as said:
        shown = text(QWEN, Prompt(messages=turns, columns={"tools": tools}))
    assert shown == (
        '[{"type": "function", "function": {"name": "weather"}}]user:hi;assistant:hmweather({"city": "Oslo"});'
        "tool:4;assistant:"
    )
    assert {str(w.message).partition(" of chat turns is not used")[0] for w in said} == {"name", "tool_call_id"}


@pytest.mark.parametrize("template", [PLAIN, None])
def test_tool_calls_that_no_template_reads_are_refused_and_the_rest_is_said(template):
    turns = tuple(turn | {"content": turn["content"] or ""} for turn in CHAT)
    with pytest.raises(Refusal, match="have tool_calls, which"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text(template, Prompt(messages=turns))
    with pytest.warns(UserWarning, match="column tools is not used"):
        assert "hi" in text(template, Prompt(messages=({"role": "user", "content": "hi"},), columns={"tools": TOOLS}))
    with warnings.catch_warnings():  # a column of other content with this name is no list of tool descriptions
        warnings.simplefilter("error")
        text(template, Prompt(messages=({"role": "user", "content": "hi"},), columns={"tools": ["hammer"]}))


def test_a_template_with_the_date_renders_the_same_on_every_day():
    dated = """{% set day = strftime_now( "%d %b %Y" ) %}{{ day }} {{ strftime_now('%Y') }} """ + PLAIN
    prompt = Prompt(messages=({"role": "user", "content": "hi"},))
    assert text(dated, prompt) == "26 Jul 2024 2024 user:hi;" and datetime.now().year > 2024
    with pytest.warns(UserWarning, match="resumed on another day"):
        text("{% set form = '%Y' %}{{ strftime_now(form) }}" + PLAIN, prompt)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 3000000000 }}",
        "{{ '%3000000000d' % 1 }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set s = namespace(x='ab') %}{% for i in range(60) %}{% set s.x = s.x ~ s.x %}{% endfor %}{{ s.x }}",
        "{% if tools %}{{ 'a' * 3000000000 }}{% endif %}",
        "{% if messages | length > 1 %}{{ 'a' * 3000000000 }}{% endif %}",
    ],
)
def test_a_template_without_end_is_refused(template):
    """In a child process: this one neither waits nor grows."""
    turns = ({"role": "user", "content": "a"},)
    with pytest.raises(Refusal, match="takes more than 2 s or 512 MB") as caught:
        text(template, Prompt(messages=turns, columns={"tools": TOOLS}))
    assert "\n" not in str(caught.value)


def test_a_long_prompt_is_no_fault_of_the_template():
    tokenizer, question = byte_level(chat_template=PLAIN + "long"), "a" * (2 * sandbox.TEMPLATE_CHARACTERS)
    assert _template_text(tokenizer, [{"role": "user", "content": question}], [], {}) == f"user:{question};long"


def test_the_trial_of_a_template_knows_what_transformers_knows():
    """Its tags and filters: where the trial failed for another reason, it would say nothing about time and memory."""
    template = (
        "{% for m in messages %}{% generation %}{{ m | tojson(indent=2) }}{% endgeneration %}{% break %}{% endfor %}"
        "{{ strftime_now('%Y') }}{{ eos_token }}{{ raise_exception('no') if add_generation_prompt is undefined }}"
    )
    arguments = {"messages": [{"role": "user", "content": "\u00e9"}], "add_generation_prompt": True}
    assert sandbox.score("template", template, [arguments])
    assert not sandbox.score("template", template + "{{ 'a' * 3000000000 }}", [arguments])


def stream(source: str, template: str = PLAIN, room: int = 60, **options) -> Prompts:
    tokenizer = byte_level(chat_template=template)
    plan = resolved(Train(student="", prompts="", **options))
    return Prompts(load(Data(source=source)), tokenizer, {"": tokenizer}, plan, room, str(room + 10))


def test_the_longest_row_of_a_file_is_checked_wherever_it_stands(tmp_path: Path):
    rows = [{"prompt": "1+1?", "answer": "2", "hint": "two"}] * 600
    stream(write(tmp_path / "short.jsonl", *rows)).check()
    for name, late in (("q.jsonl", {"prompt": "1+1? " * 40}), ("cjk.jsonl", {"prompt": "数学" * 20})):
        with pytest.raises(Refusal, match=r"row 550 \(.*\) has"):
            stream(write(tmp_path / name, *rows[:550], rows[0] | late, *rows[:40])).check()
    source = write(tmp_path / "hint.jsonl", *rows[:550], rows[0] | {"hint": "two " * 40}, *rows[:40])
    stream(source).check()
    template = {"context": "hint", "context_template": "{context} {prompt}"}
    with pytest.raises(Refusal, match=r"row 550 \(.*\) has"):
        stream(source, **template).check()


def test_a_template_that_renders_at_random_is_refused(tmp_path: Path):
    source = write(tmp_path / "a.jsonl", *[{"prompt": f"{i}+1?", "answer": "2"} for i in range(40)])
    with pytest.raises(Refusal, match="differently each time"):
        stream(source, "{{ ['a', 'b', 'c'] | random }}" + PLAIN).check()


def test_lost_text_is_more_than_blanks_and_composition():
    tokenizer = byte_level()
    assert not loses_text(tokenizer, "naïve  x\n数学")
    lowered = byte_level()
    lowered.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert loses_text(lowered, "Oslo") and not loses_text(lowered, "oslo")
    spaces = byte_level()
    spaces.backend_tokenizer.normalizer = normalizers.Strip()
    assert not loses_text(spaces, " oslo ")
