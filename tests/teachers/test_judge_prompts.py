"""A user's prompts of a judge are sent in the place of the embedded ones, and the published forms are read."""

import pytest

from opd.cli import main
from opd.core.errors import Refusal
from opd.core.sampling import Prompt
from opd.teachers.judges import rubric_judge, stage_judge
from opd.teachers.judges.judge_prompts import filled, read_prompts
from opd.teachers.judges.judge_requests import FormModel
from opd.teachers.judges.rubric_judge import AnswerGroup, ModelJudge, Rubric, Sheet
from opd.teachers.text.text_teacher import TextTeacher

FORM = '{"rubrics": [{"criterion": "...", "points": 5}]}'
RUBRIC = f"Frage: {{question}}\nReferenzen: {{references}}\nAntworten: {{answers}}\n{FORM}"
GRADE = 'Frage: {question} Kriterien: {rubric} Antworten: {answers} {"answers": [{"answer_index": 1, "judgement": []}]}'


class Recorder(TextTeacher):
    """A judge that answers in the forms that the authors of ROPD published, and keeps what it was asked."""

    def __init__(self):
        self.asked = []

    def texts(self, requests, sampling, seed):
        self.asked += [request.prompt.messages[-1]["content"] for request in requests]
        form = (
            '{"schema_version": "x", "rubrics": [{"criterion_id": "c1", "criterion": "says 4", "points": 3}]}'
            if "Referenzen" in self.asked[-1]
            else '{"answers": [{"answer_index": 1, "judgement": [true]}, {"answer_index": 2, "judgement": [false]}]}'
        )
        return [[form] for _ in requests]

    def forget(self, requests, sampling, seed):
        assert not requests


def test_a_users_prompts_are_sent_and_the_published_forms_are_read(tmp_path):
    (tmp_path / "rubric.txt").write_text(RUBRIC)
    (tmp_path / "grade.txt").write_text(GRADE)
    model = Recorder()
    judge = ModelJudge(FormModel(model, 64, prompts=read_prompts(str(tmp_path), rubric_judge.PROMPTS)))
    group = AnswerGroup(Prompt(text="2 + 2 = {answers}?"), ("4",), ("5",))
    (rubric,) = judge.rubrics([group], 1, 3, 0)
    assert rubric == Rubric.model_validate({"criteria": [{"criterion": "says 4", "points": 3}]})
    (met,) = judge.grades([group], [rubric], 0)
    assert sorted(met) == [(False,), (True,)]
    first, second = model.asked
    # What a question holds is never a place, and the braces of the JSON form stay.
    assert first.startswith('Frage: 2 + 2 = {answers}?\nReferenzen: <reference number="1">\n4\n</reference>')
    assert first.endswith(FORM) and "Kriterien: 1. (3) says 4" in second


def test_the_names_of_the_embedded_forms_are_read_as_before():
    sheet = Sheet.model_validate_json('{"answers": [{"index": 1, "met": [true]}]}')
    assert sheet.answers[0].index == 1 and sheet.answers[0].met == (True,)


@pytest.mark.parametrize("prompts", [rubric_judge.PROMPTS, stage_judge.PROMPTS])
def test_the_embedded_prompts_as_files_are_what_is_sent_without_them(tmp_path, prompts):
    names = {"question", "references", "answers", "rubric", "answer", "criteria", "attempt", "reflection"}
    values = {name: f"<{name}>" for name in names | {"least", "most", "count", "names", "few", "many"}}
    for name, text in prompts.items():
        (tmp_path / f"{name}.txt").write_text(text.replace("{{", "{").replace("}}", "}"))
    for name, text in read_prompts(str(tmp_path), prompts).items():
        assert filled(text, values) == prompts[name].format(**values)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "holds none of rubric.txt, grade.txt"),
        ({"rubrik.txt": RUBRIC}, r"is no prompt of this method \(did you mean rubric\?\)"),
        ({"rubric.txt": "{question} {answer}"}, r"rubric.txt: has no \{references\}"),
        ({"grade.txt": b"\xff"}, "grade.txt: cannot be read.*UTF-8"),
    ],
)
def test_prompts_that_cannot_be_used_are_refused(tmp_path, files, reason):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(Refusal, match=reason):
        read_prompts(str(tmp_path), rubric_judge.PROMPTS)


def test_a_missing_folder_and_a_judge_without_prompts_are_refused_by_the_command(tmp_path, capsys):
    run = [
        "train",
        "--student",
        "embedded:student",
        "--teacher",
        "embedded:teacher",
        "--prompts",
        "embedded:ledger-short",
    ]
    for judge, reason in (("embedded:teacher", "no such folder"), ("verifier", "--judge verifier reads no prompts")):
        flags = [
            "--batch",
            "8",
            "--out",
            str(tmp_path / "run"),
            "--judge",
            judge,
            "--judge-prompts",
            str(tmp_path / "x"),
        ]
        assert main([*run, *flags, "ropd"]) == 2
        assert reason in capsys.readouterr().err
