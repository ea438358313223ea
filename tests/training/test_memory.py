"""The estimate of memory before models load, beside the bytes of real models, and what it makes of them."""

import copy
import json
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import transformers
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM

from opd import cli
from opd.config.plan import resolved
from opd.config.precision import dtype_of
from opd.core.sampling import Sampling
from opd.core.tensors import local
from opd.models import load as models
from opd.models import lora
from opd.models.sharding import shard_frozen, shard_student
from opd.models.source import locate
from opd.training import build_teachers
from opd.training.build import open_session
from opd.training.doctor import fit
from opd.training.doctor.activations import LONG, SHORT, activations, saved_bytes
from opd.training.doctor.findings import Level
from opd.training.doctor.memory import estimate
from opd.training.run_folder import Run
from opd.training.setup import planned
from opd.training.trainer import Trainer
from tests.training.test_doctor import RIGHT, healthy, rows

CPU = torch.device("cpu")
SMALL = {
    "vocab_size": 301, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048,
}  # fmt: skip
CONFIGS = {
    "qwen3": transformers.Qwen3Config(**SMALL),
    "llama": transformers.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "gemma3": transformers.Gemma3TextConfig(**SMALL),
    "moe": transformers.Qwen3MoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
}
KINDS = {"full": {}, "lora": {"lora_rank": 4}, "bf16": {"precision": "bf16"}}
KINDS["lora, bf16"] = KINDS["lora"] | KINDS["bf16"]


@pytest.fixture
def folder(request, tmp_path):
    """A folder with a config.json and nothing else."""
    CONFIGS[request.param].save_pretrained(tmp_path / request.param)
    return tmp_path / request.param


def setup_of(folder, *, processes=1, device=CPU, **changes):
    config = healthy(student=str(folder), teacher=str(folder), **changes)
    return planned(resolved(config), processes=processes, device=device, row=64)


def real_student(setup):
    """The student with weights, as a run trains it."""
    torch.manual_seed(0)
    config = copy.deepcopy(models.base(setup.student).config)
    model = AutoModelForCausalLM.from_config(config, dtype=lora.weights_dtype(setup.config), attn_implementation="sdpa")
    return lora.with_adapter(model.eval(), setup.config) if setup.config.lora_rank else model.eval()


def stepped(parameters, loss):
    """Parameters, gradients and AdamW's moments after a step: the bytes that this process allocated."""
    optimizer = torch.optim.AdamW([p for p in parameters if p.requires_grad])
    loss.backward()
    optimizer.step()
    moments = [x for state in optimizer.state.values() for name, x in state.items() if name != "step"]
    trained = [p for p in parameters if p.requires_grad]
    return allocated(parameters), allocated([p.grad for p in trained]), allocated(moments)


def allocated(tensors):
    storages = {(s := local(x).untyped_storage()).data_ptr(): s.nbytes() for x in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("folder", CONFIGS, indirect=True)
def test_bytes_of_a_process(folder, kind):
    setup = setup_of(folder, **KINDS[kind])
    student, needs = real_student(setup), estimate(setup)
    loss = student(input_ids=torch.arange(24)[None] % 301).logits.float().logsumexp(-1).sum()
    weights, gradients, moments = stepped(list(student.parameters()), loss)
    assert needs.weights["student"] == weights
    assert needs.trains["gradients"] == gradients
    assert needs.stays["AdamW"] == moments


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("folder", CONFIGS, indirect=True)
def test_activations_of_an_outline(folder, kind):
    """What a real forward pass saves, within 0.1%: constants that a model keeps as buffers are left out."""
    setup = setup_of(folder, **KINDS[kind])
    student, dtype = real_student(setup), dtype_of(setup.config.precision)
    (short, inputs_short), (long, inputs_long) = (saved_bytes(student, n, dtype) for n in (SHORT, LONG))
    guess = activations(setup.student, dtype)
    assert guess.token * (LONG - SHORT) == pytest.approx(long - short, rel=1e-3)
    assert guess.inputs * (LONG - SHORT) == inputs_long - inputs_short > 0
    assert guess.copies + SHORT * guess.token == pytest.approx(short, rel=1e-3)
    assert guess.copies > 0 or "bf16" not in kind  # of fp32 weights in bf16


@pytest.fixture
def ranks(request):
    """The first of several processes; the others are not there, and collective operations do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    yield request.param
    dist.destroy_process_group()


class Whole(torch.nn.Module):
    """A student whose loss is that of its logits."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids).logits.float().logsumexp(-1).sum()


@pytest.mark.parametrize("ranks", [2, 3, 8], indirect=True)
@pytest.mark.parametrize("folder", CONFIGS, indirect=True)
def test_bytes_of_a_shard(folder, ranks):
    setup = setup_of(folder, processes=ranks, shard=True)
    student, needs = Whole(real_student(setup)), estimate(setup)
    shard_student(student, student.model, torch.float32)
    weights, gradients, moments = stepped(list(student.parameters()), student(torch.arange(24)[None] % 301))
    assert needs.weights["student"] == weights
    assert needs.trains["gradients"] == gradients
    assert needs.stays["AdamW"] == moments


@pytest.mark.parametrize("ranks", [2, 3], indirect=True)
@pytest.mark.parametrize("folder", CONFIGS, indirect=True)
def test_bytes_of_a_sharded_teacher(folder, ranks):
    setup = setup_of(folder, processes=ranks, shard=True)
    teacher = AutoModelForCausalLM.from_config(models.base(setup.student).config).requires_grad_(False)
    shard_frozen(teacher, CPU)
    assert estimate(setup).weights["teacher"] == allocated(list(teacher.parameters()))


def test_ddp_has_a_copy_of_the_gradients(tmp_path):
    """Its buckets, which torch allocates with the wrapper."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        setup = setup_of("embedded:student", processes=2)
        student = real_student(setup)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            wrapped = torch.nn.parallel.DistributedDataParallel(student, find_unused_parameters=True)
        seen.export_chrome_trace(str(tmp_path / "trace.json"))
        assert real_peak(tmp_path / "trace.json") >= estimate(setup).stays["DDP's buckets"] > 0
        del wrapped
    finally:
        dist.destroy_process_group()


def real_peak(trace):
    """The allocator's peak while a trace was recorded."""
    events = json.loads(trace.read_text())["traceEvents"]
    taken = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    return max(accumulate(size for _, size in taken))


def test_a_worker_needs_its_own_student_and_generates_while_this_one_trains():
    alone = estimate(setup_of("embedded:student"))
    beside, elsewhere = (
        estimate(setup_of("embedded:student", staleness=1, worker_device=name)) for name in ("same", "cuda:0")
    )
    weights, total = alone.weights["student"], lambda x: sum(x.values())
    assert beside.generates == alone.generates | {"worker's student": weights} and elsewhere == alone
    works = max(total(alone.trains), total(alone.updates))
    assert alone.beside_weights() == total(alone.stays) + max(works, total(alone.generates))
    assert beside.beside_weights() == total(alone.stays) + works + total(alone.generates) + weights


MEMORY = {"full": {}, "lora": {"lora_rank": 4}, "checkpointing": {"gradient_checkpointing": True}}


@pytest.mark.parametrize("changes", MEMORY.values(), ids=MEMORY)
def test_estimate_beside_the_allocator(changes, tmp_path, monkeypatch):
    """The allocator's own peak over two real steps, against the estimate of what it needs beside the models."""
    same = rows(tmp_path, *[RIGHT] * 16)  # rows of one length, all cut: the largest batch that the estimate is about
    config = healthy(prompts=same, batch=16, chunk_mb=4, sampling=Sampling(max_new_tokens=12), **changes)
    session = open_session(resolved(config))
    run = Run(tmp_path / "run")
    run.folder.mkdir()
    loop = Trainer(session, run)
    guess = estimate(session.setup).beside_weights()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        loop.step(1, {})
        loop.step(2, {})  # AdamW's states are there now
    seen.export_chrome_trace(str(tmp_path / "trace.json"))
    real = real_peak(tmp_path / "trace.json")
    assert 0.9 < guess / real < 1.5, (guess / 2**20, real / 2**20)
    for free, level in ((2 * guess, Level.OK), (guess, Level.WARNING), (guess / 2, Level.ERROR)):
        monkeypatch.setattr(fit, "free_bytes", lambda device, free=free: int(free))
        assert level in {f.level for f in fit.memory(session)}


def estimated(capsys, *words, target="2x0.1", student="embedded:student", teacher="embedded:teacher", code=2):
    """The answer of `opd doctor --estimate`."""
    flags = ["--estimate", target, "--student", str(student), "--teacher", str(teacher), "--json"]
    assert cli.main(["doctor", *flags, *words, "vopd"]) == code
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("folder", ["qwen3"], indirect=True)
def test_each_alternative_is_what_its_flags_would_give(folder, capsys):
    before = estimated(capsys, student=folder, teacher=folder)
    assert before["peak"] > before["usable"] and not before["fits"] and before["fitting"]
    assert sum(before["items"].values()) == before["peak"]
    for flags, peak in before["peaks"].items():
        after = estimated(
            capsys, *flags.split(), student=folder, teacher=folder, code=0 if flags in before["fitting"] else 2
        )
        assert after["peak"] == peak < before["peak"]
        assert after["fits"] == (flags in before["fitting"])
    larger = estimated(capsys, student=folder, teacher=folder, target=f"2x{before['peak'] / 0.8 / 2**30}", code=0)
    assert larger["fits"] and larger["peak"] == before["peak"]


@pytest.mark.parametrize("folder", ["qwen3"], indirect=True)
def test_flags_that_help_together(folder, capsys):
    """No flag by itself is enough, and two are."""
    room = 0.9 * min(estimated(capsys, student=folder, teacher=folder)["peaks"].values()) / 0.9 / 2**30
    found = estimated(capsys, student=folder, teacher=folder, target=f"2x{room * 0.99}")
    assert found["fitting"] and all(flags not in found["peaks"] for flags in found["fitting"])
    for flags in found["fitting"][:2]:
        estimated(capsys, *flags.split(), student=folder, teacher=folder, target=f"2x{room * 0.99}", code=0)


@pytest.mark.parametrize(
    "words", [("--estimate", x) for x in ("8", "0x80", "8x-1", "8xnan", "8xinf", "x", "")] + [
        ("--estimate", "3x80"), ("--estimate", "8x80", "--prompt-tokens", "0"),
    ],
)  # fmt: skip
def test_a_target_that_is_none(words, capsys):
    models_of = ("--student", "embedded:student", "--teacher", "embedded:teacher")
    assert cli.main(["doctor", *words, *models_of, "vopd"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"opd: {'--prompt-tokens' if len(words) > 2 else '--'}") and said.count("\n") == 1


def test_a_quantised_model_has_no_estimate(tmp_path, capsys):
    CONFIGS["qwen3"].save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    words = ("--student", "embedded:student", "--teacher", str(tmp_path), "vopd")
    assert cli.main(["doctor", "--estimate", "8x80", *words]) == 2
    assert "it is quantised" in capsys.readouterr().err


def test_weights_that_do_not_fit_are_refused_before_they_load(tmp_path, monkeypatch, capsys):
    """By all processes, with the flags that help, in one line; --no-doctor tries."""
    loaded = []
    real = models.load
    monkeypatch.setattr(models, "load", lambda *a, **k: loaded.append(k["field"]) or real(*a, **k))
    monkeypatch.setattr(fit, "free_bytes", lambda device: 1 << 20)
    flags = "--student embedded:student --teacher embedded:teacher --prompts embedded:ledger-short --steps 1 --batch 4"
    words = [*flags.split(), "--max-new-tokens", "8", "--quiet", "--out", str(tmp_path / "run"), "vopd"]
    assert cli.main(["train", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("opd: --student embedded:student: the models' weights do not fit") and said.count("\n") == 1
    assert "--no-doctor" in said and not loaded
    assert cli.main(["train", "--no-doctor", *words]) == 0 and loaded == ["student", "teacher"]


@pytest.mark.parametrize("sharded", [True, False])
def test_sharded_models_load_in_main_memory(sharded, monkeypatch):
    """A layer then comes to the device, and never the whole model."""
    devices = []
    load = lambda source, *, field, dtype, device: (
        devices.append(device) or real(source, field=field, dtype=dtype, device=CPU)
    )
    real = models.load
    monkeypatch.setattr(models, "load", load)
    plan, source = resolved(healthy(shard=sharded)), locate("embedded:teacher", field="teacher")
    gpu = torch.device("meta")  # stands for one
    builder = SimpleNamespace(plan=plan, accelerator=SimpleNamespace(num_processes=2, device=gpu), on=gpu)
    builder.tokenizer, builder.vocabulary = models.tokenizer(source, field="teacher"), SimpleNamespace(size=100)
    build_teachers.ModelBuilder._frozen(builder, source, "teacher")
    assert devices == [CPU if sharded else gpu]


@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_what_is_not_sharded_comes_to_the_device(ranks, monkeypatch):
    teacher = AutoModelForCausalLM.from_config(CONFIGS["qwen3"]).requires_grad_(False)
    moved = set()
    monkeypatch.setattr(torch.Tensor, "to", lambda x, device: moved.add(id(x)) or x)
    shard_frozen(teacher, CPU)
    monkeypatch.undo()
    names = {name for name, x in (*teacher.named_parameters(), *teacher.named_buffers()) if id(x) in moved}
    assert names == {
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        *(n for n, _ in teacher.named_buffers()),
    }
