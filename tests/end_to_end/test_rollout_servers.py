"""Servers that write rollouts for one trainer and for two: the same numbers, through the death of a server, no hang.

Servers and trainers are forks of this process, which has imported opd; no trainer may take longer than LIMIT.
"""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import torch
from accelerate import PartialState
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

import opd
from opd.models.load import base
from opd.rollouts.weight_sync.stream import WeightStream
from opd.rollouts.weight_sync.vllm_plugin import weights
from scripts.soak import Proxy, free_port
from tests.campaigns.commands import Outcome, start, start_ranks
from tests.end_to_end.test_asynchronous_rollouts import prompts as prompt_stream
from tests.end_to_end.test_equal_processes import LIMIT, assert_equal
from tests.tiny_models import interrupted_at, logged

SIZES = "--batch 8 --per-prompt 2 --max-new-tokens 12 --lr 1e-3 --rollouts-every 1 --save-every 2 --no-doctor --quiet"
GENERATE = "/inference/v1/generate"


class Server:
    """A process of `opd serve --takes-weights`, which can be killed and started again."""

    def __init__(self, model: Path) -> None:
        self.model, self.port = model, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        """Start the server with the weights of its model, and wait until it answers."""
        flags = ("--port", str(self.port), "--takes-weights", "--token-env", "OPD_ENGINE_TOKEN")
        self.process, end = start(["serve", str(self.model), *flags]), time.monotonic() + LIMIT
        while not self.answers():
            assert time.monotonic() < end and not self.process.ended()
            time.sleep(0.05)

    def answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", trust_env=False).is_success
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        self.process.kill()
        self.process.outcome(LIMIT)


@pytest.fixture(scope="module", autouse=True)
def engine_token():
    """The token of the servers and of the trainers, which inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPD_ENGINE_TOKEN", "of-the-engine")
        yield


@pytest.fixture(scope="module")
def servers(pair, engine_token):
    running = [Server(pair[0]), Server(pair[0])]
    yield running
    for server in running:
        server.kill()


@pytest.fixture(scope="module")
def url(servers):
    return servers[0].url


def ends(
    processes: int, pair, url: str, out: Path, flags: str, meanwhile: Callable[[], object] = lambda: None
) -> list[Outcome]:
    """Train beside servers; return the end of each process.  `meanwhile` is called once they have begun."""
    models = ["--student", str(pair[0]), "--teacher", str(pair[1]), "--prompts", "embedded:ledger-short"]
    engine = ["--engine", url, "--engine-transfer", "opd"]
    steps = "" if "--steps" in flags else "--steps 3"
    running = start_ranks(
        ["train", *models, "--out", str(out), *engine, *SIZES.split(), *steps.split(), *flags.split()], processes
    )
    meanwhile()
    return [process.outcome(LIMIT) for process in running]


def trained(
    processes: int, pair, url: str, out: Path, flags: str, meanwhile: Callable[[], object] = lambda: None
) -> Path:
    """Train beside servers, and return the run folder."""
    done = ends(processes, pair, url, out, flags, meanwhile)
    assert [end.code for end in done] == [0] * processes, done[0].output + done[-1].output
    environment = json.loads((out / "environment.json").read_text())
    assert environment["processes"] == processes
    assert (environment["engine"] == "fsdp2") == (processes > 1 and "--shard" in flags)
    return out


EVALUATED = "--eval-prompts embedded:ledger-short --eval-limit 3 --eval-every 2"
AHEAD = "--staleness 1 --exact-staleness async-opd --samples 3"


@pytest.fixture(scope="module")
def calm(pair, url, tmp_path_factory):
    """A run in one process."""
    return trained(1, pair, url, tmp_path_factory.mktemp("calm") / "run", "vopd")


@pytest.fixture(scope="module")
def calm_ahead(pair, url, tmp_path_factory):
    """A run in one process whose rollouts are requested one step ahead."""
    return trained(1, pair, url, tmp_path_factory.mktemp("calm") / "run", AHEAD)


def test_two_processes_beside_a_server_are_one(pair, url, calm, tmp_path):
    assert_equal(calm, trained(2, pair, url, tmp_path / "run", "vopd"), 1e-4)
    assert all(row["sampler_gap"] < 1e-3 for row in logged(tmp_path / "run"))


@pytest.mark.parametrize(
    "flags",
    [
        "--shard --lora-rank 4 vopd",
        f"{EVALUATED} gkd --share 0.5",
        "--worker npd --pool 2 --epochs 2 --refresh 1 --drift 9 --no-filtered",
        "--shard npd --pool 2 --epochs 2 --refresh 1 --drift 9 --tau 5",
    ],
    ids=["shards of adapters", "evaluated, teacher writes too", "pool, ahead", "shards, filtered pool"],
)
def test_two_processes_are_one_with(flags, pair, url, tmp_path):
    one, two = (trained(n, pair, url, tmp_path / str(n), flags) for n in (1, 2))
    assert_equal(one, two, 1e-4)


@pytest.mark.parametrize("shard", ["", "--shard "])
def test_two_processes_ask_ahead_as_one_does(shard, pair, url, calm_ahead, tmp_path):
    run = trained(2, pair, url, tmp_path / "run", shard + AHEAD)
    assert_equal(calm_ahead, run, 1e-4)
    assert [row["staleness"] for row in logged(run)] == [0, 1, 1]


def test_servers_share_the_prompts(pair, servers, calm, tmp_path):
    """Two servers beside two processes are one server beside one: each has the weights, and half of the prompts."""
    pass_on = lambda path, n: None
    with Proxy(servers[0].url, pass_on) as first, Proxy(servers[1].url, pass_on) as second:
        run = trained(2, pair, f"{first.url},{second.url}", tmp_path / "run", "--shard vopd")
    assert_equal(calm, run, 1e-4)
    asked = [proxy.asked[GENERATE] + 1 for proxy in (first, second)]
    probes = 2  # a server is asked for a token before weights are sent to it again
    assert asked == [3 * 2 + probes] * 2


class Deaths:
    """A server behind a proxy that kills it at its n-th request to a path, before the server reads it."""

    def __init__(self, server: Server, path: str, number: int) -> None:
        self.server, self.path, self.number = server, path, number
        self.died = threading.Event()

    def fault(self, path: str, number: int) -> str | None:
        if (path, number) == (self.path, self.number) and not self.died.is_set():
            self.server.process.kill()
            self.died.set()
        return None

    def revive(self) -> None:
        """Wait until the server has died, and start it again, with the weights of its model."""
        assert self.died.wait(LIMIT)
        self.server.process.outcome(LIMIT)
        self.server.start()


def trained_through_death(processes: int, pair, server: Server, out: Path, flags: str, path: str, number: int) -> Path:
    deaths = Deaths(server, path, number)
    with Proxy(server.url, deaths.fault) as proxy:
        return trained(processes, pair, proxy.url, out, f"--teacher-retries 12 {flags}", deaths.revive)


def test_a_server_that_dies_beside_two_sharded_processes_gets_the_weights_again(pair, servers, calm, tmp_path):
    run = trained_through_death(2, pair, servers[1], tmp_path / "run", "--shard vopd", GENERATE, 9)
    assert_equal(calm, run, 1e-4)


@pytest.mark.parametrize(
    ("path", "number"),
    [(GENERATE, 7), ("/pause?mode=wait", 1), ("/update_weights", 1), ("/update_weight_version", 1)],
    ids=["generating", "before new weights", "reading them", "after them"],
)
def test_a_server_that_dies_while_it_is_asked_ahead(path, number, pair, servers, calm_ahead, tmp_path):
    """Also as weights are sent to it; the batches that wait get the weights that they were requested with."""
    processes = 2 if path == GENERATE else 1
    run = trained_through_death(processes, pair, servers[1], tmp_path / "run", AHEAD, path, number)
    assert_equal(calm_ahead, run, 1e-4)


# Requests ahead of the steps


def test_requests_ahead_without_staleness_are_the_synchronous_run(pair, url, tmp_path):
    calm, ahead = (
        trained(1, pair, url, tmp_path / name, f"{flag} {EVALUATED} vopd")
        for name, flag in (("calm", ""), ("ahead", "--worker"))
    )
    assert logged(ahead) == logged(calm)
    assert_equal(calm, ahead, 1e-7)
    assert all("queue_depth" in row and "wait_s" in row for row in logged(ahead, "perf") if "tokens" in row)


def test_evaluations_do_not_change_the_rollouts_that_are_asked_ahead(pair, url, calm_ahead, tmp_path):
    rows = logged(trained(1, pair, url, tmp_path / "run", f"{EVALUATED} {AHEAD}"))
    assert [row for row in rows if "loss" in row] == logged(calm_ahead)


def test_rollouts_name_the_weights_that_generated_them(pair, url, tmp_path):
    """Under exact staleness they are those of the checkpoint so many steps ago."""
    flags = "--steps 4 --lr 1e-2 --staleness 2 --exact-staleness --save-every 1 --keep 9 async-opd"
    run = trained(1, pair, url, tmp_path / "run", flags)
    assert [row["staleness"] for row in logged(run)] == [0, 1, 2, 2]
    columns = load_file(run / "rollouts" / "step-000004.safetensors")
    prompts = [p.ids for p in prompt_stream(pair).batch(4, 4) for _ in range(2)]
    gaps = []
    for step in (1, 3):
        model = AutoModelForCausalLM.from_pretrained(run / "checkpoints" / f"step-{step:06d}")
        gap = []
        rows = zip(prompts, *(columns[name] for name in ("ids", "mask", "sampler_logp")), strict=True)
        for prompt, ids, mask, logp in rows:
            with torch.no_grad():
                scores = model(torch.tensor([[*prompt, *ids[mask].tolist()]])).logits[0].log_softmax(-1)
            gap.append(scores[len(prompt) - 1 : -1].gather(-1, ids[mask][:, None])[:, 0] - logp[mask])
        gaps.append(float(torch.cat(gap).abs().max()))
    assert gaps[0] < 1e-3 and gaps[1] > 1e-2


def test_a_run_with_exact_staleness_resumes_bitwise(pair, url, tmp_path):
    """Whether the last checkpoint was written early or not: the others of `--samples` are drawn at the step itself."""
    flags = f"--steps 4 {AHEAD}"
    run = trained(1, pair, url, tmp_path / "run", flags)
    with interrupted_at(4):
        (end,) = ends(1, pair, url, tmp_path / "hurt", f"--save-every 3 {flags}")
    assert end.code == 130
    assert logged(trained(1, pair, url, tmp_path / "hurt", f"--save-every 3 --resume {flags}")) == logged(run)


def test_rollouts_are_at_most_so_many_steps_old_and_a_run_goes_on_with_what_was_ready(pair, url, tmp_path):
    flags = "--steps 4 --staleness 1 --save-every 1 async-opd --samples 3"
    with interrupted_at(3):
        (end,) = ends(1, pair, url, tmp_path / "run", flags)
    assert end.code == 130
    found = logged(trained(1, pair, url, tmp_path / "run", f"--resume {flags}"))
    assert len(found) == 4 and all(0 <= row["staleness"] <= row["staleness_max"] <= 1 for row in found)
    assert found[-1]["staleness"] == 1 and all(row["grad_norm"] > 0 for row in found)


def test_a_pool_is_written_by_a_server(pair, url, tmp_path):
    """Of one snapshot, ahead or at once; with the filter, which needs log-probs of the weights behind the rollouts."""
    pool = "npd --pool 2 --epochs 2 --refresh 1 --drift 9"
    run = lambda name, flags: trained(1, pair, url, tmp_path / name, flags)
    found = logged(run("calm", f"--steps 4 {pool} --no-filtered"))
    assert [row["staleness"] for row in found] == [0, 1, 0, 1]
    assert logged(run("ahead", f"--steps 4 --worker {pool} --no-filtered")) == found
    early = logged(run("early", f"--steps 4 --staleness 1 {pool} --no-filtered"))
    assert [row["staleness"] for row in early] == [0, 1, 1, 2]
    run("filtered", f"--steps 1 {pool} --tau 5")
    columns = load_file(tmp_path / "filtered" / "rollouts" / "step-000001.safetensors")
    model = AutoModelForCausalLM.from_pretrained(pair[0])
    for ids, mask, alone in zip(columns["ids"], columns["mask"], columns["student_alone"], strict=True):
        with torch.no_grad():
            loss = model(ids[mask][None], labels=ids[mask][None]).loss
        torch.testing.assert_close(alone, loss, rtol=1e-4, atol=1e-5)


# Failures


@pytest.mark.parametrize(
    ("path", "number", "flags"),
    [("/update_weights", 1, "--shard vopd"), (GENERATE, 6, "vopd"), (GENERATE, 6, AHEAD)],
    ids=["weights", "rollouts", "rollouts ahead"],
)
def test_a_failure_in_one_process_is_a_refusal_in_both(path, number, flags, pair, url, tmp_path):
    """One request fails, in the second step or ahead of it: a line in each process, and nobody waits for the other."""
    fault = lambda *asked: "500" if asked == (path, number) else None
    with Proxy(url, fault) as proxy:
        done = ends(2, pair, proxy.url, tmp_path / "run", f"--teacher-retries 0 {flags}")
    for end in done:
        assert end.code == 2 and not end.fault() and f"{path} failed 1 times, last with HTTP 500" in end.output
    assert not (tmp_path / "run" / "engine").exists()


def check_sharded_weights(folder: Path, adapted: bool) -> None:
    """In one of two processes: FSDP2's shards, also below adapters, arrive whole in the main process."""
    wanted, sharded = dict(weights(adaptable(folder, adapted))), adaptable(folder, adapted)
    for layer in base(sharded).model.layers:
        fully_shard(layer)
    fully_shard(sharded)
    assert any(len(p.to_local()) < len(p) for p in sharded.parameters())
    stream, found = WeightStream(sharded, torch.float32), {}

    def send() -> str:
        found.update(stream)
        return f"sent {len(found)}"

    def restart() -> int:
        next(iter(stream))
        return len(dict(stream))

    def fail() -> None:
        next(iter(stream))
        raise opd.Refusal("gone")

    assert stream.share(send) == f"sent {len(wanted)}"
    if PartialState().is_main_process:
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], x) for name, x in wanted.items())
    with pytest.raises(opd.Refusal, match="gone"):
        stream.share(fail)
    assert stream.share(restart) == len(wanted)


def adaptable(folder: Path, adapted: bool) -> torch.nn.Module:
    """The model, with random adapters or without."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    if not adapted:
        return model
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=16, target_modules="all-linear"))
    for name, p in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(p.data, std=0.1)
    return model


def test_sharded_weights_are_sent_whole_and_a_sender_that_stops_early_leaves_nobody_waiting(pair):
    def check() -> None:
        state = PartialState(cpu=True)
        assert state.num_processes == 2
        for adapted in (False, True):
            check_sharded_weights(pair[0], adapted)
        state.wait_for_everyone()
        torch.distributed.destroy_process_group()

    for process in start_ranks(["--version"], 2, before=check):
        end = process.outcome(LIMIT)
        assert end.code == 0, end.output
