"""Tables: files of rows are read without a change, and nothing of a row is dropped in silence."""

import csv
import gzip
import json
import math
import subprocess
import sys
from pathlib import Path

import datasets
import pandas as pd
import pyarrow
import pytest
from PIL import Image

from opd.config.data import Data
from opd.core.errors import Refusal
from opd.core.sampling import Prompt
from opd.data.tasks.load import load
from opd.data.tasks.tables import table
from opd.data.tasks.task import Task


def write(path: Path, *rows: object) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def tasked(source: object, **options) -> Task:
    return load(Data(source=str(source), **{"verifier": "exact", **options}))


def refusal(source: object, **options) -> str:
    with pytest.raises(Refusal) as caught:
        tasked(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def question(prompt: Prompt) -> str:
    return prompt.messages[-1]["content"]


# ---- files ---------------------------------------------------------------------------------------------------------

TEXTS = {
    '"007"': "007",
    "1e400": "1e400",
    "0.1000": "0.1000",
    "true": "true",
    "123456789012345678901234567890": "123456789012345678901234567890",
    '"2020-01-01"': "2020-01-01",
    '"2020-01-01 00:00:00"': "2020-01-01 00:00:00",
    '"None"': "None",
    '"NA"': "NA",
    "5": "5",
    "27.0": "27",
    '"27.0"': "27.0",
    "0.1234567890123456789": "0.1234567890123456789",
}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize("order", [1, -1])
def test_json_answers_keep_their_text_beside_values_of_other_types(tmp_path, name, order):
    golds = list(TEXTS)[::order]
    rows = [f'{{"question": "q{i}", "answer": {gold}}}' for i, gold in enumerate(golds)]
    (tmp_path / name).write_text("\n".join(rows) if name == "a.jsonl" else f"[{', '.join(rows)}]")
    task = tasked(tmp_path / name)
    assert [prompt.answer for prompt in task.prompts] == [TEXTS[gold] for gold in golds]
    assert all(task.verify(TEXTS[gold], prompt) == 1 for gold, prompt in zip(golds, task.prompts, strict=True))


def test_a_folder_of_json_lines_is_read_as_its_files_are(tmp_path):
    write(tmp_path / "train.jsonl", '{"question": "q", "answer": 0.1000}')
    write(tmp_path / "test.jsonl", {"question": "q", "answer": "2020-01-01"})
    assert [tasked(tmp_path, split=split).prompts[0].answer for split in ("train", "test")] == ["0.1000", "2020-01-01"]


def test_columns_that_appear_late_or_change_their_type_are_read(tmp_path):
    late = {"question": "q", "answer": "3", "note": "n", "more": {"deep": [1, "x"]}}
    source = write(tmp_path / "a.jsonl", *[{"question": f"q{i}", "answer": i, "note": None} for i in range(3000)], late)
    task = tasked(source)
    assert task.prompts[-1].columns == {"note": "n", "more": {"deep": [1, "x"]}}
    assert task.prompts[0].columns == {"note": None, "more": None} and task.prompts[2999].answer == "2999"


def test_missing_numbers_of_a_parquet_file_are_missing_answers(tmp_path):
    pd.DataFrame({"question": ["a", "b"], "answer": [27, math.nan]}).to_parquet(tmp_path / "a.parquet")
    with pytest.warns(UserWarning, match="1 of 2 rows"):
        task = tasked(tmp_path / "a.parquet")
    assert [prompt.answer for prompt in task.prompts] == ["27", ""]


@pytest.mark.parametrize("folder", ["exp[v1]", "a::b", "what*?", "x[0-9]::[!a]"])
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_any_path_is_read(tmp_path, folder, suffix):
    path = tmp_path / folder / f"train [1]::x.{suffix}"
    path.parent.mkdir()
    frame = pd.DataFrame({"question": ["2+2?"], "answer": ["4"]})
    if suffix == "jsonl":
        write(path, {"question": "2+2?", "answer": "4"})
    else:
        (frame.to_csv if suffix == "csv" else frame.to_parquet)(path)
    assert question(tasked(path).prompts[0]) == "2+2?"
    assert question(tasked(path.parent).prompts[0]) == "2+2?"


@pytest.mark.parametrize("folder", ["runs", "runs[1]"])
def test_a_folder_of_pictures_is_refused(tmp_path, folder):
    (tmp_path / folder).mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / folder / "train.png")
    assert "train.png has no rows that can be read" in refusal(tmp_path / folder)


def test_a_split_that_a_folder_lacks_is_refused(tmp_path):
    write(tmp_path / "train.jsonl", {"question": "a", "answer": "1"})
    message = refusal(tmp_path, split="test")
    assert message.startswith("--split test: no data file in --prompts") and "its splits are train" in message


def test_pictures_that_are_gone_or_broken_are_not_opened(tmp_path):
    gone, broken = {"path": str(tmp_path / "gone.png"), "bytes": None}, {"path": None, "bytes": b"no picture"}
    rows = datasets.Dataset.from_dict(
        {"question": ["2+2?"], "answer": ["4"], "image": [gone], "more": [[{"images": [broken]}]]},
        features=datasets.Features(
            {
                "question": datasets.Value("string"),
                "answer": datasets.Value("string"),
                "image": datasets.Image(),
                "more": datasets.List({"images": datasets.List(datasets.Image())}),
            }
        ),
    )
    with pytest.raises((FileNotFoundError, OSError)):
        rows[0]
    assert question(table(Data(), rows).prompts[0]) == "2+2?"
    assert rows.features["image"].decode, "the caller's rows are as they were"


def test_pandas_csv_comes_back_as_it_was(tmp_path):
    frame = pd.DataFrame({"question": ['say "x", y', "two\nlines", "2+2?"], "answer": ["007", "None", "1e5"]})
    frame.to_csv(tmp_path / "index.csv")
    frame.to_csv(tmp_path / "bom.csv", index=False, encoding="utf-8-sig", lineterminator="\r\n")
    for name in ("index.csv", "bom.csv"):
        prompts = tasked(tmp_path / name).prompts
        assert [question(prompt) for prompt in prompts] == list(frame.question)
        assert [prompt.answer for prompt in prompts] == list(frame.answer)
        assert prompts[0].columns == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("question,answer,level\nIf a = 2, what?,2,1\n", "row 0 (line 2) has 4 fields, and the header has 3 columns"),
        ("question,answer\n2+2?,4\n1+1?,2,\n", "row 1 (line 3) has 3 fields, and the header has 2 columns"),
        ("question,answer,level\n2+2?,4\n", "row 0 (line 2) has 2 fields"),
        ('question,answer\n"Solve \\"x\\", y",4\n', "line 2"),
        ('question,answer\n"open,4\n', "unexpected end of data"),
        ("question,answer,answer\na,1,2\n", "two columns have the name 'answer'"),
        ("question,answer,\na,1,2\n", "column 3 has no name"),
    ],
)
def test_csv_rows_that_would_shift_are_refused(tmp_path, text, words):
    (tmp_path / "a.csv").write_text(text)
    assert words in refusal(tmp_path / "a.csv")
    with (tmp_path / "b.csv").open("w", newline="") as file:  # the same rows, correctly quoted
        csv.writer(file).writerows([("question", "answer"), ("If a = 2, what?", "2")])
    assert question(tasked(tmp_path / "b.csv").prompts[0]) == "If a = 2, what?"


def test_a_broken_line_is_named_and_shown(tmp_path):
    said = refusal(write(tmp_path / "a.jsonl", {"question": "a", "answer": "1"}, "", '{"question": "b" "answer"'))
    assert "line 3 is not JSON" in said and '{"question": "b" "answer"' in said
    said = refusal(write(tmp_path / "b.jsonl", {"question": "a"}, "[1]"))
    assert "line 2: '[1]' is not an object" in said
    (tmp_path / "c.jsonl").write_bytes('{"question": "é"}'.encode("latin-1"))
    assert "not UTF-8" in refusal(tmp_path / "c.jsonl")


# ---- answers and options -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verifier", "golds", "right", "wrong"),
    [
        ("exact", ["Oslo", "Oslo, Norway"], ["Oslo", "oslo, norway"], "Oslo, Oslo, Norway"),
        ("numeric", ["7", "8"], ["7", "It is 8"], "9"),
        ("choice", ["A", "C"], ["A", "(C)"], "B"),
    ],
)
@pytest.mark.parametrize("form", [list, lambda golds: {"target": golds}])
def test_any_acceptable_answer_is_right(tmp_path, verifier, golds, right, wrong, form):
    source = write(tmp_path / "a.jsonl", {"prompt": "Which?", "reward_model": {"ground_truth": form(golds)}})
    task = tasked(source, verifier=verifier)
    (prompt,) = task.prompts
    assert (prompt.answer, *prompt.other_answers) == tuple(golds)
    assert [task.verify(text, prompt) for text in (*right, wrong)] == [1, 1, 0]


def test_a_users_verifier_gets_each_acceptable_answer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "same_length.py").write_text("score = lambda response, answer: float(len(response) == len(answer))\n")
    source = write(tmp_path / "a.jsonl", {"prompt": "Which?", "answer": ["ab", "abc"]})
    task = tasked(source, verifier="same_length:score")
    assert [task.verify(text, task.prompts[0]) for text in ("xx", "xxx", "x")] == [1, 1, 0]


def test_published_forms_of_answers(tmp_path):
    forms = {"value": "Oslo", "aliases": ["Kristiania"]}, {"text": ["Oslo", "Kristiania"], "answer_start": [1, 2]}
    for i, form in enumerate(forms):
        (prompt,) = tasked(write(tmp_path / f"{i}.jsonl", {"prompt": "Capital?", "answer": form})).prompts
        assert (prompt.answer, prompt.other_answers) == ("Oslo", ("Kristiania",))
    said = refusal(write(tmp_path / "a.jsonl", {"prompt": "24?", "answer": {"target": 24, "numbers": [1, 2]}}))
    assert "mapping with target, numbers" in said and "row 0" in said
    (prompt,) = tasked(tmp_path / "a.jsonl", answer_column="answer.target").prompts
    assert prompt.answer == "24"


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize(
    ("choices", "answer"),
    [
        (["3", "4"], 1),
        (["cat", "dog"], 1.0),
        ({"label": ["1", "2"], "text": ["cat", "dog"]}, 2),
        ({"A": "cat", "B": "dog"}, "B"),
        ([{"label": "A", "text": "cat"}, {"label": "B", "text": "dog"}], "B"),
        ([{"key": "A", "value": "cat"}, {"key": "B", "value": "dog"}], "dog"),
        ([f"option {i}" for i in range(26)], "(b)"),
    ],
)
def test_options_are_shown(tmp_path, choices, answer, saved):
    row = {"prompt": "Which?", "choices": choices, "answer": answer}
    source = write(tmp_path / "a.jsonl", row)
    if saved:
        datasets.Dataset.from_list([row]).to_parquet(source := str(tmp_path / "a.parquet"))
    (prompt,) = tasked(source, choices_column="choices", verifier="choice").prompts
    assert prompt.answer == "B" and question(prompt).splitlines()[2].startswith("B. ")


@pytest.mark.parametrize(
    ("choices", "answer", "words"),
    [
        ([f"opt{i}" for i in range(30)], 28, "30 options, and there are 26 letters"),
        ([f"opt{i}" for i in range(27)], 3, "27 options"),
        (["cat", "dog"], 2, "'2' is none of the 2 options"),
        (["cat", "dog"], "cow", "'cow' is none of the 2 options"),
        (["cat", "dog"], True, "'true' is none of the 2 options"),
        ("cat, dog", "cat", "write a list of texts"),
    ],
)
def test_options_that_cannot_be_shown_are_refused(tmp_path, choices, answer, words):
    good = {"question": "pick", "choices": ["x", "y"], "answer": 0}
    source = write(tmp_path / "a.jsonl", good, {"question": "pick", "choices": choices, "answer": answer})
    said = refusal(source, choices_column="choices", verifier="choice")
    assert words in said and "row 1" in said


# ---- conversations -------------------------------------------------------------------------------------------------

CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
TOOLS = [{"type": "function", "function": {"name": "weather"}}]
CHAT = [
    {"role": "user", "content": "hi", "name": "Ann"},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "hm"},
    {"role": "tool", "content": "4", "tool_call_id": "c1"},
]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_every_key_of_a_turn_is_kept(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    row = {"messages": CHAT, "answer": "4", "tools": TOOLS}
    write(path, row) if suffix == "jsonl" else datasets.Dataset.from_list([row]).to_parquet(path)
    (prompt,) = tasked(path).prompts
    assert prompt.messages == (CHAT[0], CHAT[1] | {"content": ""}, CHAT[2])
    assert prompt.columns["tools"] == TOOLS


def test_sharegpt_json_text_and_text_parts_are_read(tmp_path):
    sharegpt = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    plain = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]
    parts = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in plain]
    rows = {"conversations": sharegpt}, {"messages": json.dumps(plain)}, {"messages": parts}, {"messages": sharegpt}
    for i, row in enumerate(rows):
        (prompt,) = tasked(write(tmp_path / f"{i}.jsonl", row | {"answer": "1"})).prompts
        assert prompt.messages == tuple(plain[:2]) and prompt.response == "a"
    (prompt,) = tasked(write(tmp_path / "a.jsonl", {"prompt": "[1, 2] or [3]?", "answer": "1"})).prompts
    assert question(prompt) == "[1, 2] or [3]?"
    deep = "[" * 100_000 + "]" * 100_000  # deeper than a JSON parser goes
    (prompt,) = tasked(write(tmp_path / "deep.jsonl", {"prompt": deep, "answer": "1", "tools": deep})).prompts
    assert question(prompt) == deep


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        ([{"role": "user", "content": [{"type": "image", "image": "x.png"}]}], "turn 0 has a part of type image"),
        ([CHAT[0], {"role": "user", "content": [{"type": "audio_url"}]}], "turn 1 has a part of type audio_url"),
        ([{"role": "user", "content": [{"type": "video"}]}], "part of type video"),
        ([{"role": "user", "content": None}], "turn 0 (user) has no text content"),
        ([{"from": "alien", "value": "x"}], "turn 0 has the role 'alien'"),
        ([{"text": "x"}], "turn 0 has the role None, and its keys are text"),
        ([{"role": "system", "content": "Be brief."}], "ends with a system turn"),
        (["hello"], "turn 0, 'hello'"),
    ],
)
def test_turns_that_cannot_be_used_are_refused_with_row_and_turn(tmp_path, turns, words):
    for rows in ([{"messages": turns, "answer": "1"}], [{"messages": CHAT[:1], "answer": "1"}] * 2):
        rows = rows if len(rows) == 1 else [*rows, {"messages": turns, "answer": "1"}]
        said = refusal(write(tmp_path / "a.jsonl", *rows))
        assert words in said and f"row {len(rows) - 1} of" in said and "no such column" not in said


def test_instruction_data_keeps_its_input(tmp_path):
    rows = [
        {"instruction": "Add.", "input": "2 and 2", "answer": "4"},
        {"instruction": "Hi", "input": "", "answer": "x"},
    ]
    source = write(tmp_path / "a.jsonl", *rows)
    prompts = tasked(source).prompts
    assert [question(prompt) for prompt in prompts] == ["Add.\n\n2 and 2", "Hi"] and prompts[0].columns == {}
    with pytest.warns(UserWarning, match=r"'input' is not used: --prompt-column instruction\+input"):
        tasked(source, prompt_column="instruction")


def test_what_is_not_used_is_said(tmp_path):
    turns = [CHAT[0], {"role": "assistant", "content": "a", "reasoning_content": "hm"}]
    source = write(tmp_path / "a.jsonl", {"messages": turns, "answer": "1", "image": "cat.png"})
    with pytest.warns(UserWarning) as said:
        assert tasked(source).prompts[0].response == "a"
    assert "'reasoning_content', which is not used" in str(said[0].message)
    assert "column 'image' is not used" in str(said[1].message)


# ---- other writings of the same rows ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.tsv", "question\tanswer\nx, y?\t007\n"),
        ("a.CSV", 'question,answer\n"x, y?",007\n'),
        ("a.csv", "question;answer\nx, y?;007\n"),
        ("a.csv", "question|answer\nx, y?|007\n"),
        ("a.csv", 'question, answer\n"x, y?", "007"\n'),
        ("a.csv", '\n question ,answer\r\n\r\n"x, y?",007\r\n  \r\n'),
        ("a.csv", 'question,answer,,\n"x, y?",007,,\n'),
        ("a.ndjson", '{"question": "x, y?", "answer": "007"}\r\n\r\n'),
        ("a.json", '{\n "question": "x, y?",\n "answer": "007"\n}'),
        ("a.json", '{"version": 1, "data": [{"question": "x, y?", "answer": "007"}]}'),
        ("a.json", '{\n "data": [\n  {"question": "x, y?", "answer": "007"}\n ]\n}'),
        ("a.jsonl", ' [ {"question": "x, y?", "answer": "007"} ]\n'),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_usual_files_of_rows(tmp_path, name, text, zipped):
    content = text.encode("utf-8-sig")
    path = tmp_path / (f"{name}.gz" if zipped else name)
    path.write_bytes(gzip.compress(content) if zipped else content)
    (prompt,) = tasked(path).prompts
    assert (question(prompt), prompt.answer, prompt.columns.keys() - {"version"}) == ("x, y?", "007", set())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[{}, 5]", "item 1 is '5'"),
        ('[{"question": "a"} {}]', "Expecting ',' or ']'"),
        ('[{"question": "a"}', "Expecting ',' or ']'"),
        ('[{"question": "a"}]\n[{}]', "Extra data"),
        ("[" * 10**5, "is not JSON (maximum recursion depth"),
        ('{"question": ' + "[" * 10**5, "line 1 is not JSON (it is nested more than 64 deep"),
        ('{"question": "\\ud800", "answer": "1"}', "line 1 is not JSON (it has half of a pair of surrogates"),
    ],
)
def test_json_that_cannot_be_read_is_refused_with_the_place(tmp_path, text, words):
    (tmp_path / "a.json").write_text(text)
    assert words in refusal(tmp_path / "a.json")


def test_an_unnamed_column_that_does_not_number_the_rows_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text(",question,answer\nimportant,a,1\n")
    assert "column 1 has no name" in refusal(tmp_path / "a.csv")


@pytest.mark.parametrize("opened", [pyarrow.ipc.new_file, pyarrow.ipc.new_stream])
def test_arrow_files_and_the_digits_of_small_floats(tmp_path, opened):
    table = pyarrow.table({"question": ["a"], "answer": pyarrow.array([0.1], pyarrow.float32())})
    with pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as file, opened(file, table.schema) as writer:
        writer.write_table(table)
    assert tasked(tmp_path / "a.arrow").prompts[0].answer == "0.1"


def test_files_of_another_format_in_a_folder_are_named(tmp_path):
    write(tmp_path / "a.jsonl", {"question": "a", "answer": "1"})
    (tmp_path / "b.csv").write_text("question,answer\nb,2\n")
    with pytest.warns(UserWarning, match=r"only .jsonl files are read, not b.csv"):
        tasked(tmp_path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_file_takes_about_its_size_in_memory(tmp_path, name):
    """In a process of its own, at the peak: what the process has beyond a small file."""
    lines = {"a.csv": "{q},{i}", "a.jsonl": '{{"question": "{q}", "answer": {i}}}'}
    line = lines.get(name, lines["a.jsonl"])
    rows = [line.format(q="x" * 2000, i=i) for i in range(20_000)]
    start, comma, end = {"a.json": ("[", ",", "]"), "a.csv": ("question,answer\n", "\n", "\n")}.get(
        name, ("", "\n", "\n")
    )
    code = "import sys, resource, pathlib; from opd.data.tasks.row_files import read_file;"
    code += "rows = read_file(pathlib.Path(sys.argv[1])); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    peaks = []
    for count in (1, len(rows)):
        path = tmp_path / f"{count}-{name}"
        path.write_text(start + comma.join(rows[:count]) + end)
        peaks.append(int(subprocess.check_output([sys.executable, "-c", code, str(path)])) << 10)
    assert peaks[1] - peaks[0] < 3 * path.stat().st_size


@pytest.mark.parametrize("form", [json.dumps, str])
def test_lists_in_a_csv_file_are_read_as_json_or_as_python_prints_them(tmp_path, form):
    turns, choices = [{"role": "user", "content": "Which?"}], ["it's", "b"]
    pd.DataFrame([{"messages": form(turns), "choices": form(choices), "answer": 1}]).to_csv(tmp_path / "a.csv")
    (prompt,) = tasked(tmp_path / "a.csv", choices_column="choices", verifier="choice").prompts
    assert (question(prompt), prompt.answer) == ("Which?\nA. it's\nB. b", "B")


@pytest.mark.parametrize(
    "text",
    [
        "[{'role': 'user' 'content': 'x'}]",
        '[{"role": "user", "content": "x"}',
        "[{'role': 'user', 'content': 'x'}\n {}]",
    ],
)
def test_text_that_is_nearly_turns_is_no_question(tmp_path, text):
    assert "looks like chat turns" in refusal(write(tmp_path / "a.jsonl", {"messages": text, "answer": "1"}))


def test_options_in_several_columns(tmp_path):
    for names in (["A", "B", "C"], ["option_a", "option_b", "option_c"]):
        row = dict(zip(["question", *names, "answer"], ["Which?", "cat", "dog", "", "B"], strict=True))
        source = write(tmp_path / "a.jsonl", row)
        (prompt,) = tasked(source, choices_column="+".join(names), verifier="choice").prompts
        assert (question(prompt), prompt.answer, prompt.columns) == ("Which?\nA. cat\nB. dog", "B", {})
        with pytest.warns(UserWarning, match=f"column '{names[0]}' is not used: --choices-column A\\+B"):
            tasked(source, verifier="choice")


@pytest.mark.parametrize(
    ("choices", "answer", "letters"),
    [
        (["cat", "dog", "cow"], "2", "C"),
        (["cat", "dog", "cow"], [0, 1, 0], "B"),
        (["cat", "dog", "cow"], [0, 2], "AC"),
        (["cat", "dog", "cat"], "cat", "AC"),
        (["5", "1", "7"], "1", "B"),
    ],
)
def test_right_options(tmp_path, choices, answer, letters):
    source = write(tmp_path / "a.jsonl", {"question": "Which?", "choices": choices, "answer": answer})
    (prompt,) = tasked(source, choices_column="choices", verifier="choice").prompts
    assert (prompt.answer, *prompt.other_answers) == tuple(letters)


def test_an_answer_that_may_be_a_text_or_a_number_of_an_option_is_refused(tmp_path):
    source = write(tmp_path / "a.jsonl", {"question": "Which?", "choices": ["1", "2", "3"], "answer": "1"})
    assert "text of option A, and the number from 0 of option B" in refusal(
        source, choices_column="choices", verifier="choice"
    )


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("context", "Oslo is a city.", r"--prompt-column context\+question joins the two"),
        ("system", "Be brief.", "make turns of it"),
        ("choices", ["a", "b"], "--choices-column shows"),
        ("answer", '["a", "b"]', "is compared as this text"),
    ],
)
def test_other_columns_of_a_question_are_named(tmp_path, column, value, words):
    source = write(tmp_path / "a.jsonl", {"question": "Which?", "answer": "1", column: value})
    with pytest.warns(UserWarning, match=words):
        tasked(source)


def test_tool_calls_are_mappings_or_refused(tmp_path):
    row = lambda calls: {"messages": [CHAT[0], {**CHAT[1], "tool_calls": calls}, CHAT[2]], "answer": "1"}
    (prompt,) = tasked(write(tmp_path / "a.jsonl", row(json.dumps([CALL])))).prompts
    assert prompt.messages[1]["tool_calls"] == [CALL]
    for calls in (["weather"], {"name": "weather"}, "weather()", [{"function": "weather"}]):
        assert "turn 1 has the tool_calls" in refusal(write(tmp_path / "a.jsonl", row(calls)))


def test_two_closing_assistant_turns_are_refused(tmp_path):
    turns = [CHAT[0], {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert "ends with two assistant turns" in refusal(write(tmp_path / "a.jsonl", {"messages": turns, "answer": "1"}))


@pytest.mark.parametrize(("builder", "suffix"), [("csv", "csv"), ("json", "jsonl")])
def test_answers_with_a_type_that_datasets_inferred_are_named(tmp_path, builder, suffix):
    (tmp_path / "a.csv").write_text("question,answer\na,007\n")
    write(tmp_path / "a.jsonl", {"question": "a", "answer": 1.5})
    rows = datasets.load_dataset(builder, data_files=str(tmp_path / f"a.{suffix}"), cache_dir=str(tmp_path / "cache"))
    rows.save_to_disk(tmp_path / "saved")
    with pytest.warns(UserWarning, match="which changes texts such as 007"):
        tasked(tmp_path / "saved")
