"""Test servers with an OpenAI-compatible API: one with scripted answers, and judges that grade with the verifier."""

import http.server
import json
import re
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from opd.config.data import Data
from opd.core.sampling import Prompt
from opd.data.tasks.load import load
from opd.teachers.judges.rubric_judge import AnswerGroup, Rubric
from opd.teachers.judges.verifier_judge import VerifierJudge

Request = Mapping[str, Any]


class Scripted:
    """An OpenAI-compatible server that answers with `says(request)` and records the requests in `asked`.

    If `says` returns None, the answer has no text and the finish reason `length`.
    """

    def __init__(self, says: Callable[[Request], str | None]) -> None:
        self.asked: list[Request] = []
        scripted = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *args: object) -> None:
                pass

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                scripted.asked.append(request)
                text = says(request)
                message = {"role": "assistant", "content": text}
                ends = "length" if text is None else "stop"
                whole = {
                    "id": "x", "object": "chat.completion", "created": 0, "model": "x",
                    "choices": [{"index": 0, "finish_reason": ends, "message": message}],
                    "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
                }  # fmt: skip
                body = json.dumps(whole).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self) -> "Scripted":
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


class Grader(Scripted):
    """A judge of the embedded tasks that uses their verifier.

    `spoils(kind, n, text)` returns the text to send as the n-th answer of a kind ("rubric" or "grade"); it may damage
    the text.
    """

    def __init__(self, spoils: Callable[[str, int, str], str | None] = lambda kind, n, text: text) -> None:
        tasks = [load(Data(source=f"embedded:{name}", limit=40)) for name in ("ledger", "ledger-short")]
        self.judge, self.turns, self.spoils = VerifierJudge(tasks[0].verify), {"rubric": 0, "grade": 0}, spoils
        self.known = {p.messages[0]["content"]: p for task in tasks for p in task.prompts}
        super().__init__(self.says)

    @property
    def texts(self) -> list[list[str]]:
        """Return the texts of the turns of each request."""
        return [[turn["content"] for turn in request["messages"]] for request in self.asked]

    def says(self, request: Request) -> str | None:
        """Answer a request; the question is in its first turn."""
        return self.answer(request["messages"][0]["content"], self.known)

    def answer(self, text: str, prompts: Mapping[str, Prompt]) -> str | None:
        """Return the answer to a question to the judge; `prompts` maps question texts to prompts."""
        (question,) = re.findall(r"<question>\n(.*?)\n</question>", text, re.S)
        tagged = lambda name: tuple(re.findall(rf'<{name} number="\d+">\n(.*?)\n</{name}>', text, re.S))
        group = AnswerGroup(prompts[question], tagged("reference"), tagged("answer"))
        kind = "grade" if "<rubric>" in text else "rubric"
        if kind == "rubric":
            (rubric,) = self.judge.rubrics([group], 4, 12, 0)
            reply = rubric.model_dump_json()
        else:
            (listed,) = re.findall(r"<rubric>\n(.*?)\n</rubric>", text, re.S)
            criteria = re.findall(r"^\d+\. \((\d)\) (.*)$", listed, re.M)
            rubric = Rubric.model_validate({"criteria": [{"criterion": c, "points": int(p)} for p, c in criteria]})
            (met,) = self.judge.grades([group], [rubric], 0)
            reply = json.dumps({"answers": [{"index": i, "met": x} for i, x in enumerate(met, 1)]})
        n, self.turns[kind] = self.turns[kind], self.turns[kind] + 1
        return self.spoils(kind, n, reply)


SPOILT: tuple[Callable[[str], str], ...] = (
    lambda text: text[: len(text) // 2],
    lambda text: "Sure!",
    lambda text: text.replace("true", "true, true").replace('"points"', '"point"'),
)


class Babbler(Grader):
    """A grader that answers 1 in 3 questions with malformed text at the first attempt, and 1 in 10 at every attempt.

    The choice is a function of the question.
    """

    def __init__(self) -> None:
        super().__init__()
        self.babbled: Counter[str] = Counter()

    def says(self, request: Request) -> str | None:
        """Return the grader's answer, or a damaged one."""
        reply, turns = super().says(request), request["messages"]
        draw = zlib.crc32(turns[0]["content"].encode())
        lost = draw % 10 == 0
        if not lost and (len(turns) > 1 or draw % 3):
            return reply
        self.babbled["never right" if lost else "malformed json"] += 1
        return None if lost and draw % 3 == 0 else SPOILT[draw % len(SPOILT)](reply or "")
