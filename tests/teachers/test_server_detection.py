"""Who answers at an address, and what is made of servers that say too little, too much, or something else.

The server here is scripted: it says what the protocol of vLLM may hold, and keeps what it was asked.
"""

import base64
import contextlib
import http.server
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import httpx
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import opd
from opd.cli import main
from opd.config import checks
from opd.config.model_names import parse
from opd.config.plan import resolved
from opd.config.servers import Remote
from opd.core.types import Rollout
from opd.models.remote.client import Client
from opd.models.remote.vllm_protocol import Server, connect
from opd.models.source import EMBEDDED
from opd.teachers.remote import open_teacher

CPU = torch.device("cpu")
QUICK = Remote(teacher_retries=2, teacher_timeout=10.0)
CARDS = {"data": [{"id": "big", "max_model_len": 96}]}
Answer = Callable[[dict], tuple[int, object]]


class Scripted:
    """Answers of each path by a function of the request's json; `asked` has the requests and `headers` theirs."""

    def __init__(self, **paths: Answer) -> None:
        self.paths = {"/v1/models": lambda asked: (200, CARDS), **{k: v for k, v in paths.items()}}
        self.asked: list[tuple[str, dict]] = []
        self.headers: list[dict[str, str]] = []
        self.url = ""

    def of(self, path: str) -> list[dict]:
        """What was asked there."""
        return [body for at, body in self.asked if at == path]


@contextlib.contextmanager
def scripted(paths: dict[str, Answer]) -> Iterator[Scripted]:
    """The server, on a free port."""
    script = Scripted(**paths)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            asked = json.loads(body) if body else {}
            script.asked.append((self.path, asked))
            script.headers.append(dict(self.headers.items()))
            status, said = script.paths.get(self.path, lambda asked: (404, {"error": "Not Found"}))(asked)
            whole = said if isinstance(said, bytes) else json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(whole)))
            self.end_headers()
            self.wfile.write(whole)

        do_GET = do_POST = answer

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        script.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield script
        server.shutdown()


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    """Tries follow each other at once."""
    monkeypatch.setattr(
        threading.Event, "wait", lambda self, timeout=None, plain=threading.Event.wait: plain(self, timeout and 0)
    )


def says(of: Callable[[list[int], int], dict]) -> Answer:
    """Prompt log-probs, each entry by `of(prompt, t)`."""

    def answer(asked: dict) -> tuple[int, object]:
        told = [[None, *({str(row[t]): of(row, t)} for t in range(1, len(row)))] for row in asked["prompt"]]
        return 200, {"choices": [{"index": i, "prompt_logprobs": x} for i, x in enumerate(told)]}

    return answer


def spoken(tokenizer) -> Answer:
    """As a vLLM server with this tokenizer, whose other ids are rows without a text."""
    return says(lambda row, t: {"logprob": -1.0, "decoded_token": tokenizer.decode([row[t]])})


def table(numbers: np.ndarray) -> dict[str, str]:
    """The answer of a server that scores chosen ids."""
    file = io.BytesIO()
    np.save(file, numbers)
    return {"prompt_token_id_logprobs": base64.b64encode(file.getvalue()).decode()}


def chosen(asked: dict) -> tuple[int, object]:
    """-1 for each of them."""
    ids = asked["sampling_params"]["prompt_logprob_token_ids"]
    return 200, table(np.full((len(ids), len(ids[0])), -1.0, dtype=np.float32))


def text():
    return AutoTokenizer.from_pretrained(EMBEDDED / "teacher")


# Whose tokens


def sibling():
    """The same tokenizer, with two more tokens."""
    more = text()
    assert more.add_tokens(["<think>", "</think>"], special_tokens=True) == 2
    return more


def test_an_added_token_that_the_server_has_not_is_no_matter_of_luck():
    """Two of 147 ids that are padding rows there; of the ids that are probed by stride one in eight may differ."""
    plain, more = text(), sibling()
    with scripted({"/v1/completions": spoken(plain)}) as server:
        there = connect(server.url, QUICK)
        assert there.tokenizer(plain, len(plain)) is plain
        with pytest.raises(
            opd.Refusal, match=r"2 of \d+ added tokens.*'' there and '<think>' here.*--teacher-tokenizer"
        ):
            there.tokenizer(more, len(more))
        assert there.tokenizer(more, len(plain)) is more  # rows that the student has not either are not asked about
        assert (
            max(map(len, (row for asked in server.of("/v1/completions") for row in asked["prompt"]))) <= there.context
        )
    with scripted({"/v1/completions": spoken(more)}) as server:
        assert connect(server.url, QUICK).tokenizer(more, len(more)) is more


def test_an_added_token_beyond_the_servers_rows():
    """vLLM answers 400 to ids that its model has no row for."""
    plain, more = text(), sibling()

    def answer(asked: dict) -> tuple[int, object]:
        beyond = max(map(max, asked["prompt"]))
        if beyond >= len(plain):
            return 400, {"error": {"message": f"Token id {beyond} is out of vocabulary"}}
        return spoken(plain)(asked)

    told = r"added tokens.*Token id 146 is out of vocabulary.*--teacher-tokenizer"
    with scripted({"/v1/completions": answer}) as server, pytest.raises(opd.Refusal, match=told):
        connect(server.url, QUICK).tokenizer(more, len(more))


def test_a_server_without_log_probs_of_prompts():
    silent = {"/v1/completions": lambda asked: (200, {"choices": [{"index": 0}]})}
    with scripted(silent) as server, pytest.raises(opd.Refusal, match="no log-probs of prompts"):
        connect(server.url, QUICK).tokenizer(text(), 145)


# Numbers that are no log-probs


def rollout() -> tuple[list[Rollout], list[list[bool]]]:
    r = Rollout(
        prompt_ids=(5, 6),
        teacher_prompt_ids=(5, 6),
        ids=(7, 8),
        sampler_logp=(0.0, 0.0),
        index=0,
        group=0,
        stopped=False,
    )
    return [r], [[True, True]]


def test_logits_are_no_log_probs():
    """As --logprobs-mode raw_logits gives them."""
    plain = text()
    logits = says(lambda row, t: {"logprob": float(t % 7 - 3), "decoded_token": plain.decode([row[t]])})
    with scripted({"/v1/completions": logits}) as server:
        with pytest.raises(opd.Refusal, match="no log-prob: start vLLM with --logprobs-mode raw_logprobs") as caught:
            connect(server.url, QUICK).tokenizer(plain, 145)
        assert (
            "\n" not in str(caught.value) and len(server.of("/v1/completions")) == 1
        )  # another try changes no setting


@pytest.mark.parametrize("value", [float("nan"), 0.5])
@pytest.mark.parametrize("way", ["prompted", "chosen"])
def test_what_is_no_number_or_above_0_is_malformed(value, way):
    numbers = np.array([[-1.0], [value]], dtype=np.float32)
    ids = lambda asked: asked["sampling_params"]["prompt_logprob_token_ids"]
    paths: dict[str, Answer] = {
        "/v1/completions": says(lambda row, t: {"logprob": value}),
        "/inference/v1/generate": lambda asked: chosen(asked) if len(ids(asked)) == 1 else (200, table(numbers)),
    }
    if way == "prompted":
        del paths["/inference/v1/generate"]
    with scripted(paths) as server:
        there = connect(server.url, QUICK)
        assert there.chosen == (way == "chosen")
        with pytest.raises(opd.Refusal, match=r"a malformed answer \(ValueError: .* is no log-prob\)") as caught:
            open_teacher(there, to=CPU, stop=()).hidden(*rollout())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("body", [b"", b"PK\x03\x04", b"\x93NUMPY\x01\x00", table(np.array([[None]]))])
def test_a_table_that_is_none_is_malformed(body):
    said = body if isinstance(body, dict) else {"prompt_token_id_logprobs": base64.b64encode(body).decode()}
    paths = {"/inference/v1/generate": lambda asked: (200, said)}
    with scripted(paths) as server, pytest.raises(opd.Refusal, match="malformed answer"):
        connect(server.url, QUICK)


def test_probability_0_and_rounding_are_log_probs():
    """vLLM writes -9999 for -inf; a sure token rounds to a little above 0."""
    with scripted({"/v1/completions": says(lambda row, t: {"logprob": -9999.0 if t == 2 else 1e-7})}) as server:
        found = open_teacher(connect(server.url, QUICK), to=CPU, stop=()).hidden(*rollout()).logp
    assert found.tolist() == [-float("inf"), pytest.approx(1e-7)]


# Who is there


def test_a_name_that_opd_serve_has_not():
    identity = IDENTITY | {"model": "big", "context": 512}
    with scripted({"/opd/identity": lambda asked: (200, identity)}) as server:
        assert connect(server.url, QUICK).model == connect(server.url + "#big", QUICK).model == "big"
        with pytest.raises(opd.Refusal, match=r"--route x http.*it serves big; name one as .*#NAME"):
            connect(server.url + "#small", QUICK, field="route x")


@pytest.mark.parametrize(
    ("answers", "scores"),
    [
        ([404], False),
        ([500], False),  # a runner that cannot
        ([503, 503, 200], True),  # a server that is starting, or a gateway before it
        ([524, 200], True),
        ([200], True),
    ],
)
def test_whether_chosen_tokens_are_scored(answers, scores):
    left = list(answers)

    def answer(asked: dict) -> tuple[int, object]:
        status = left.pop(0)
        return chosen(asked) if status == 200 else (status, {"error": "no"})

    with scripted({"/inference/v1/generate": answer}) as server:
        assert connect(server.url, QUICK).chosen == scores
        assert not left and all(
            x["sampling_params"]["detokenize"] is False for x in server.of("/inference/v1/generate")
        )


def test_an_older_vllm_ignores_the_question():
    with scripted({"/inference/v1/generate": lambda asked: (200, {"choices": []})}) as server:
        assert not connect(server.url, QUICK).chosen


def test_a_server_that_stays_away_is_no_answer():
    paths = {"/inference/v1/generate": lambda asked: (503, {"error": "loading"})}
    with scripted(paths) as server, pytest.raises(opd.Refusal, match="failed 3 times, last with HTTP 503"):
        connect(server.url, QUICK)


@pytest.mark.parametrize(("status", "tries"), [(500, 3), (502, 3), (520, 3), (524, 3), (429, 3), (501, 1), (400, 1)])
def test_which_statuses_are_asked_again(status, tries):
    with scripted({"/x": lambda asked: (status, {"error": "no"})}) as server:
        with pytest.raises(opd.Refusal, match=f"HTTP {status}"):
            Client(server.url, QUICK).get("/x", lambda r: None)
        assert len(server.asked) == tries


def test_a_run_that_ends_waits_for_no_more_tries():
    with scripted({"/x": lambda asked: (client.close(), (503, {}))[1]}) as server:
        client = Client(server.url, replace(QUICK, teacher_retries=8))
        with pytest.raises(opd.Refusal, match="given up"):
            client.get("/x", lambda r: None)
        assert len(server.asked) == 1


def test_a_run_that_ends_waits_for_no_answer():
    """Nor does a thread that waits for a server which says nothing."""
    failures: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = Client(f"http://127.0.0.1:{silent.getsockname()[1]}", QUICK)

        def ask() -> None:
            try:
                client.post("/x", {}, lambda r: None)
            except opd.Refusal as error:
                failures.append(str(error))

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        connection, _ = silent.accept()
        with connection:
            while b"{}" not in connection.recv(1 << 16):
                pass
            time.sleep(0.2)  # now the thread waits for the answer
            client.close()
            thread.join(QUICK.teacher_timeout / 2)
            assert len(failures) == 1 and "given up, for the run ends" in failures[0]


# Keys


def bearer(server: Scripted) -> str | None:
    return server.headers[-1].get("Authorization")


def test_blanks_around_a_token_are_none_of_it(monkeypatch):
    """As a .env with the line ends of Windows leaves them."""
    monkeypatch.setenv("OPD_TOKEN", " s3cret\r\n")
    with scripted({}) as server:
        Client(server.url, QUICK).has_path("/opd/identity")
        assert bearer(server) == "Bearer s3cret"


@pytest.mark.parametrize("token", ["s3\rcret", "s3cr\u00e9t"])
def test_a_token_that_no_header_holds_is_not_shown(token, monkeypatch, capsys):
    monkeypatch.setenv("OPD_TOKEN", token)
    with pytest.raises(opd.Refusal, match=r"^OPD_TOKEN: its token holds") as caught:
        Client("http://127.0.0.1:1", QUICK)
    assert "s3" not in str(caught.value)
    assert main(["serve", "embedded:student", "--token-env", "OPD_TOKEN", "--port", "0"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "OPD_TOKEN: its token holds" in line and "s3" not in line


def test_a_key_goes_to_the_host_that_it_is_named_for(monkeypatch):
    monkeypatch.setenv("OPD_TOKEN", "of-the-teacher")
    monkeypatch.setenv("OTHER", "of-the-route")
    with scripted({}) as teacher, scripted({}) as other:
        said = lambda how, url, field: (
            Client(url, how.towards(field, parse(url), parse(teacher.url)), field=field).has_path("/"),
            url,
        )
        said(QUICK, teacher.url, "teacher")
        assert bearer(teacher) == "Bearer of-the-teacher"
        said(QUICK, teacher.url + "/v1#small", "route x")  # another model of the same server
        assert bearer(teacher) == "Bearer of-the-teacher"
        for field in ("route x", "judge"):
            said(QUICK, other.url, field)
            assert bearer(other) is None
        said(replace(QUICK, route_token_env=("x=OTHER",)), other.url, "route x")
        assert bearer(other) == "Bearer of-the-route"
        said(replace(QUICK, judge_token_env="OTHER"), teacher.url, "judge")
        assert bearer(teacher) == "Bearer of-the-route"


def test_what_is_one_host():
    host = lambda name: parse(name).host()
    assert host("http://A:80/v1") == host("http://a#x") != host("https://a") == host("openai:m@https://a:443/v1")
    assert host("openai:gpt") == "https://api.openai.com" and host("self") == host("some/model") == ""
    assert host("http://[::1") == "://"


def test_a_route_that_wants_a_key_says_which_flag():
    with scripted({"/v1/models": lambda asked: (401, {})}) as server:
        how = QUICK.towards("route x", parse(server.url), parse("my-teacher"))
        with pytest.raises(opd.Refusal, match="name it by --route-token-env x=VARIABLE"):
            connect(server.url, how, field="route x")


@pytest.mark.parametrize(
    ("remote", "told"),
    [
        ({"route_token_env": ("x",)}, "--route-token-env x: write NAME=VARIABLE"),
        ({"route_token_env": ("a",), "route": ("a=m",)}, "--route-token-env a: write NAME=VARIABLE"),
        ({"route_token_env": ("b=K",), "route": ("a=m",)}, "--route-token-env b=K: write NAME=VARIABLE"),
        ({"route_token_env": ("a=K",), "route": ("a=m",)}, "--route-token-env a=K: write NAME=VARIABLE"),
        ({"judge_token_env": "K"}, "--judge-token-env K: no --judge is behind a server"),
        ({"teacher_local": "m"}, "--teacher-local m: is compared with --teacher, and that is no server"),
    ],
)
def test_keys_and_copies_for_nobody(remote, told, tmp_path):
    route = remote.pop("route", ())
    run = opd.Train(
        student="embedded:student",
        teacher="embedded:teacher",
        route=route,
        prompts="embedded:ledger",
        out=tmp_path / "run",
        remote=Remote(**remote),
    )
    with pytest.raises(opd.Refusal) as caught:
        checks.check(resolved(run))
    assert str(caught.value).startswith(told)


def test_half_an_address():
    with pytest.raises(opd.Refusal, match="not the address of a server"):
        Client("http://[::1", QUICK)


def test_no_proxy_is_asked(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    with scripted({}) as server:
        there = Server(Client(server.url, QUICK), "big", 95, {})
        assert there.client.get("/v1/models", httpx.Response.json) == CARDS


IDENTITY = {
    "protocol": 1, "model": "m", "vocabulary": "v", "fingerprint": "f", "dtype": "float32", "rows": 9, "width": 4,
    "context": 64, "scale": 1.0, "softcap": 0.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("/v1/models", b"[" * 100_000),
        ("/v1/models", b'{"data": ' + b"[" * 500 + b"]" * 500 + b"}"),
        ("/v1/models", b"\xff\xfe"),
        ("/v1/models", b"null"),
        ("/v1/models", {"data": None}),
        ("/v1/models", {"data": {"id": 1}}),
        ("/v1/models", {"data": [{"id": "m", "max_model_len": "long"}]}),
        ("/v1/models", {"data": [{"id": ["m"]}]}),
        ("/v1/models", b'{"data": [{"id": "m", "max_model_len": ' + b"9" * 5000 + b"}]}"),
        ("/opd/identity", {"protocol": 1}),
        ("/opd/identity", IDENTITY | {"dtype": "object"}),
        ("/opd/identity", IDENTITY | {"rows": -1}),
        ("/opd/identity", IDENTITY | {"width": "4"}),
        ("/opd/identity", IDENTITY | {"context": None}),
        ("/opd/identity", [IDENTITY]),
    ],
)
def test_whatever_a_server_says_of_itself_is_a_line(path, answer):
    with (
        scripted({path: lambda asked: (200, answer)}) as server,
        pytest.raises(opd.Refusal, match="malformed") as caught,
    ):
        connect(server.url, replace(QUICK, teacher_retries=0))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


def test_an_answer_without_end_is_given_up():
    with scripted({"/big": lambda asked: (200, b"x" * (2 << 20)), "/fine": lambda asked: (200, b"[1]")}) as server:
        client = Client(server.url, replace(QUICK, teacher_retries=0))
        with pytest.raises(opd.Refusal, match="more than 1 MB"):
            client.get("/big", lambda response: response.text, limit=1 << 20)
        assert client.get("/fine", lambda response: response.text) == "[1]"
        assert client.traffic.received == 3 and client.traffic.requests == 1


def test_an_error_of_a_server_does_not_reach_the_terminal(capsys):
    said = {"error": {"message": "\x1b]0;title\x07 no\n" + "x" * 9000}}
    with scripted({"/v1/models": lambda asked: (400, said)}) as server:
        prompts = ["--student", "embedded:student", "--prompts", "embedded:ledger-short"]
        assert main(["train", *prompts, "--teacher", server.url, "vopd"]) == 2
    shown = capsys.readouterr().err
    assert "HTTP 400" in shown and shown.count("\n") == 1 and "\x1b" not in shown and len(shown) < 700
