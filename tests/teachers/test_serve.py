"""`opd serve` among strangers: who may ask, how slowly and how often; its probes, its metrics and its end."""

import asyncio
import json
import re
import signal
import threading
from collections.abc import Callable
from functools import partial

import httpx
import pytest
import uvicorn
from safetensors.torch import load_file, save_file

import opd
from opd.config.commands import Serve
from opd.teachers.serve.app import build
from opd.teachers.serve.connections import Connections, LimitedConnection
from opd.teachers.serve.gate import Gate
from opd.teachers.serve.metrics import Metrics
from opd.teachers.serve.model import Served
from opd.teachers.serve.pause import Pause
from opd.teachers.serve.server import _open
from tests.campaigns import serve
from tests.tiny_models import tiny_bytes


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_bytes(tmp_path_factory.mktemp("model"), context=128)


def served(model, **flags) -> Served:
    return _open(Serve(model=str(model), device="cpu", precision="fp32", **flags))


def ask(gate: Gate, method: str, path: str, **request) -> httpx.Response:
    """The answer to one request, without a socket."""

    async def exchange() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(gate), base_url="http://localhost:8001") as client:
            return await client.request(method, path, **request)

    return asyncio.run(exchange())


# Who may ask


@pytest.mark.parametrize(
    ("host", "headers", "status"),
    [
        ("127.0.0.1", {"Host": "127.0.0.1"}, 200),
        ("127.0.0.1", {"Host": "LocalHost:9000"}, 200),  # a port may be forwarded
        ("127.0.0.1", {"Host": "[::1]:8001"}, 200),
        ("127.0.0.2", {"Host": "127.0.0.2:8001"}, 200),
        ("127.0.0.1", {"Host": "127.0.0.2:8001"}, 403),
        ("127.0.0.1", {"Host": "evil.example"}, 403),
        ("127.0.0.1", {"Host": "localhost.evil.example:8001"}, 403),
        ("127.0.0.1", {"Host": "localhost@evil.example"}, 403),
        ("127.0.0.1", {"Host": "[::1"}, 403),
        ("127.0.0.1", {"Host": ""}, 403),
        ("127.0.0.1", {"Origin": "http://localhost:3000"}, 200),
        ("127.0.0.1", {"Origin": "http://evil.example"}, 403),
        ("127.0.0.1", {"Origin": "null"}, 403),
        ("0.0.0.0", {"Host": "teacher.cluster.local"}, 200),
        ("0.0.0.0", {"Host": "teacher.cluster.local", "Origin": "http://page.example"}, 200),
        ("0.0.0.0", {"Authorization": "Bearer other"}, 401),
    ],
)
def test_who_may_ask(host, headers, status):
    """A page whose name leads to the loopback (DNS rebinding) sends its own name; others are let in by the token."""
    gate = build(Served.__new__(Served), Serve(model="x", host=host), token="secret")
    gate.app.get("/probe")(lambda: "here")
    answer = ask(gate, "GET", "/probe", headers={"Authorization": "Bearer secret"} | headers)
    assert answer.status_code == status and (status == 200 or answer.json()["error"]["message"])


def test_weights_are_taken_only_with_a_token_and_from_no_page():
    with pytest.raises(opd.Refusal, match=r"--takes-weights: .* --token-env"):
        Serve(model="x", takes_weights=True).check()
    for host in ("127.0.0.1", "0.0.0.0"):
        gate = build(Served.__new__(Served), Serve(model="x", host=host, takes_weights=True), token="secret")
        token = {"Authorization": "Bearer secret"}
        guarded = {"/update_weights", "/update_weight_version", "/pause", "/start_weight_update", "/get_world_size"}
        for path in guarded:
            method = "GET" if path == "/get_world_size" else "POST"
            assert ask(gate, method, path).status_code == 401
            assert ask(gate, method, path, headers=token | {"Origin": "http://localhost"}).status_code == 403
        assert ask(gate, "POST", "/pause", headers=token).status_code == 200


def test_no_rollout_runs_during_a_pause():
    """Rollouts that run are finished first, and others wait, also those that were just let go as a pause begins."""

    async def run() -> None:
        pause, log = Pause(), []

        async def rollout(name: str) -> None:
            async with pause.rollout():
                log.append(f"{name} begins")
                await asyncio.sleep(0)
                log.append(f"{name} ends")

        first = asyncio.create_task(rollout("first"))
        await asyncio.sleep(0)
        await pause.begin()
        log.append("pause")
        second = asyncio.create_task(rollout("second"))
        await asyncio.sleep(0.01)
        pause.end()
        await pause.begin()
        await asyncio.sleep(0.01)
        log.append("second pause")
        pause.end()
        await asyncio.gather(first, second)
        assert log == ["first begins", "first ends", "pause", "second pause", "second begins", "second ends"]

    asyncio.run(run())


def test_files_that_are_no_weights_of_the_model_change_nothing(model, tmp_path):
    there = served(model)
    before, weights = there.fingerprint, load_file(model / "model.safetensors")
    name = next(iter(weights))
    for file, content in {"nan": float("nan"), "inf": float("inf")}.items():
        broken = {key: x.clone() for key, x in weights.items()}
        broken[name].view(-1)[-1] = content
        save_file(broken, tmp_path / file)
    save_file({name: weights[name]}, tmp_path / "part")
    (tmp_path / "torn").write_bytes((model / "model.safetensors").read_bytes()[:-9])
    for file, told in {"nan": name, "inf": name, "part": "another model", "torn": "files: ", "none": "no file"}.items():
        with pytest.raises(opd.Refusal, match=re.escape(told)):
            there.take([str(tmp_path / file)])
        assert there.fingerprint == before and not there.is_taking
    save_file({key: x + 1 for key, x in weights.items()}, tmp_path / "whole")
    there.take([str(tmp_path / "whole")])
    assert there.fingerprint != before


# What the client did wrong


@pytest.mark.parametrize(
    "body",
    [
        rb'{"prompt": "\ud800"}',
        rb'{"prompt": [5], "model": "\ud800"}',
        rb'{"prompt": [5], "stop": ["\udc00\ud800"]}',
        b'{"prompt": "\xed\xa0\x80"}',
        b'{"prompt": [5], "temperature": NaN}',
        b'{"prompt": [5], "temperature": 1e400}',
        b"[" * 5000,
    ],
)
def test_what_is_no_text_or_number_is_the_clients_mistake(model, body):
    gate = build(served(model), Serve(model="x"), token="")
    answer = ask(gate, "POST", "/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_a_schema_for_an_unknown_kind_of_tokenizer_is_refused():
    gate = build(served("embedded:teacher"), Serve(model="x"), token="")
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "response_format": schema}
    answer = ask(gate, "POST", "/v1/chat/completions", json=body)
    assert answer.status_code == 400 and "llguidance does not know" in answer.json()["error"]["message"]


def test_an_error_quotes_little_and_no_terminal_codes(model):
    gate = build(served(model), Serve(model="x"), token="")
    answer = ask(gate, "POST", "/v1/completions", json={"prompt": [5], "model": "\x1b]0;x\x07" + "y" * 10000})
    message = answer.json()["error"]["message"]
    assert answer.status_code == 404 and message.isprintable() and len(message) < 1100


# What the server says of itself


def test_a_server_is_ready_unless_it_stops_or_reads_weights(model):
    there = served(model)
    gate = build(there, Serve(model="x"), token="secret")  # probes send no token
    state = lambda: (ask(gate, "GET", "/health").status_code, ask(gate, "GET", "/ready").status_code)
    assert state() == (200, 200)
    there.is_taking = True
    assert state() == (200, 503)
    there.is_taking, gate.is_draining = False, True
    assert state() == (200, 503) and "stopping" in ask(gate, "GET", "/ready").json()["error"]["message"]


def test_weights_that_are_being_read_make_a_server_unready(model, monkeypatch):
    there, seen = served(model), []
    monkeypatch.setattr(
        "opd.teachers.serve.model.load_file", lambda file: seen.append(there.is_taking) or load_file(file)
    )
    there.take([str(model / "model.safetensors")])
    assert seen == [True] and not there.is_taking


def test_metrics_are_counted_as_prometheus_reads_them(model):
    parser = pytest.importorskip("prometheus_client.parser")
    gate = build(served(model), Serve(model="x"), token="s3cret")
    token = {"Authorization": "Bearer s3cret"}
    body = {"prompt": [[5, 6, 7]] * 2, "max_tokens": 4, "seed": 0}
    used = ask(gate, "POST", "/v1/completions", json=body, headers=token).json()["usage"]
    ask(gate, "POST", "/v1/completions", json={"prompt": []}, headers=token)
    for path in ("/s3cret", "/a/b"):
        ask(gate, "GET", path, headers=token)
    assert ask(gate, "GET", "/metrics").status_code == 401
    answer = ask(gate, "GET", "/metrics", headers=token)
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4") and "s3cret" not in answer.text
    families = {family.name: family for family in parser.text_string_to_metric_families(answer.text)}
    value = {(x.name, *sorted(x.labels.items())): x.value for family in families.values() for x in family.samples}
    count = lambda route, status: value["opd_requests_total", ("route", route), ("status", status)]
    assert (count("/v1/completions", "200"), count("/v1/completions", "400"), count("other", "404")) == (1, 1, 2)
    assert value["opd_tokens_total", ("kind", "prompt")] == used["prompt_tokens"] == 6
    assert value["opd_tokens_total", ("kind", "generated")] == used["completion_tokens"]
    assert families["opd_request_seconds"].type == "histogram"
    buckets = [x for x in families["opd_request_seconds"].samples if x.labels.get("route") == "/v1/completions"]
    assert {x.value for x in buckets if x.labels.get("le") == "+Inf"} == {2}
    assert [x.value for x in buckets if x.name.endswith("_count")] == [2] and value["process_open_fds",] > 0
    assert value["opd_requests_in_flight",] == 0 and value["process_resident_memory_bytes",] > 1 << 20


# Slow and many


def talk(limits: dict, client: Callable) -> tuple[object, Metrics]:
    """Let `client(connect)` talk with a server of these limits.  Its answer has 1 MB for each byte of the body."""
    metrics = Metrics()

    async def app(scope, receive, send) -> None:
        size, is_open = 0, True
        while is_open:
            message = await receive()
            size += len(message.get("body", b""))
            is_open = message.get("more_body", False)
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % (size << 20))]}
        )
        await send({"type": "http.response.body", "body": bytes(size << 20)})

    async def exchange() -> object:
        connections = Connections(**{"total": 8, "per_client": 4, "metrics": metrics} | limits)
        options = uvicorn.Config(app, http=partial(LimitedConnection, connections), ws="none", lifespan="off", port=0)
        server = uvicorn.Server(options)
        task = asyncio.create_task(server._serve())
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        try:
            return await asyncio.wait_for(client(lambda: asyncio.open_connection("127.0.0.1", port)), 20)
        finally:
            server.should_exit = True
            await task

    return asyncio.run(exchange()), metrics


POST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 20\r\n\r\n"


@pytest.mark.parametrize(("begun", "told"), [(b"POST / HT", b"headers"), (POST + b"a", b"body"), (b"", b"")])
def test_a_request_that_does_not_come_is_cut(begun, told):
    async def client(connect):
        reader, writer = await connect()
        writer.write(begun)
        answer = await reader.read()
        writer.close()
        return answer

    answer, _ = talk({"head_seconds": 0.2, "body_seconds": 0.2}, client)
    assert told in answer and answer.startswith(b"HTTP/1.1 408" if told else b"")


def test_a_body_may_take_as_long_as_its_bytes_come_fast_enough():
    async def client(connect):
        reader, writer = await connect()
        answer = asyncio.create_task(reader.readline())
        for piece in (POST, *[b"a"] * 20):
            if answer.done():
                break
            writer.write(piece)
            await asyncio.sleep(0.03)
        line = await answer
        writer.close()
        return line

    limits = {"head_seconds": 5.0, "body_seconds": 0.2}
    assert talk(limits | {"body_rate": 5}, client)[0].startswith(b"HTTP/1.1 200")
    assert talk(limits | {"body_rate": 200}, client)[0].startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("reads", [True, False])
def test_a_client_that_does_not_read_its_answer_is_cut(reads):
    async def client(connect):
        reader, writer = await connect()
        writer.write(POST + b"a" * 20)
        size = 0
        for _ in range(16):
            if reads:
                size += len(await reader.readexactly(1 << 20))
            await asyncio.sleep(0.1)
        try:
            while part := await reader.read(1 << 20):
                size += len(part)
        except ConnectionError:
            pass
        writer.close()
        return size >= 20 << 20

    assert talk({"stall_seconds": 0.5}, client)[0] is reads


def test_an_address_has_a_share_of_the_connections():
    async def client(connect):
        held = [await connect() for _ in range(4)]
        reader, _ = await connect()
        refused = await reader.read()
        held[0][1].close()
        await asyncio.sleep(0.1)
        reader, writer = await connect()
        writer.write(POST + b"a" * 20)
        line = await reader.readline()
        for _, other in (*held, (reader, writer)):
            other.close()
        return refused, line

    (refused, line), metrics = talk({}, client)
    assert refused.startswith(b"HTTP/1.1 503") and b"--client-connections" in refused and b"200" in line
    assert metrics.connections == 0 and metrics.requests["connection", 503] == 1


def test_open_requests_have_a_share_of_the_memory():
    gate = build(Served.__new__(Served), Serve(model="x", max_request_mb=1, open_requests_mb=1), token="")
    gate.app.post("/probe")(lambda: "here")
    body = bytes(600 << 10)

    async def exchange() -> list[int]:
        arrived, go_on = asyncio.Event(), asyncio.Event()

        async def slowly():
            yield body
            arrived.set()
            await go_on.wait()

        async with httpx.AsyncClient(transport=httpx.ASGITransport(gate), base_url="http://localhost") as client:
            first = asyncio.create_task(client.post("/probe", content=slowly()))
            await arrived.wait()
            refused = await client.post("/probe", content=body)
            assert "--open-requests-mb" in refused.json()["error"]["message"]
            go_on.set()
            answers = [await first, refused, await client.post("/probe", content=body)]
            answers.append(await client.post("/probe", content=body * 2))
        return [answer.status_code for answer in answers]

    assert asyncio.run(exchange()) == [200, 503, 200, 413]
    assert gate.held == 0
    with pytest.raises(opd.Refusal, match="--open-requests-mb 1: must be at least 64"):
        Serve(model="x", open_requests_mb=1).check()


# The end


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_cannot_answer_in_time_says_so_by_its_status(model, tmp_path, name):
    body = json.dumps({"prompt": [[5, 6, 7]] * 64, "max_tokens": 120, "n": 8}).encode()
    with serve.served(model, "--drain-seconds", "0") as server:
        thread = threading.Thread(target=lambda: server.exchange(serve.post("/v1/completions", body)))
        thread.start()
        while "opd_requests_in_flight 1\n" not in server.exchange(serve.head("GET", "/metrics"))[1].decode():
            pass
        server.process.send_signal(name)
        assert server.process.wait(20) == 128 + name
        thread.join(20)
    assert "--drain-seconds) with 1 requests unanswered" in (model.parent / "log.txt").read_text()
