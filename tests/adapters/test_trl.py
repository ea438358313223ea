"""Methods inside TRL's DistillationTrainer: its batches, masks, temperature and denominator, and our own numbers."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="the trainer is that of trl, extra `trl`", exc_type=ImportError)

from trl import DistillationConfig, DistillationTrainer
from trl.models.utils import _ForwardRedirection

from opd.adapters import trl as adapter
from opd.core.errors import Refusal
from opd.core.types import Rollout
from opd.head.inputs import FrozenOutputs, Hidden
from opd.head.vocabulary import Vocabulary
from opd.losses.terms import Match, Target
from opd.losses.token_weights import Frozen
from opd.methods import METHODS
from opd.methods.method import Method
from opd.models.batching import rows
from opd.models.forward import final_states
from opd.models.load import head
from opd.models.student import Student
from tests.adapters.trl_run import history, prompts, trainer

FITTING = [name for name, factory in METHODS.items() if not any(adapter.misfits(factory()))]
SCRIPT = Path(__file__).with_name("trl_run.py")
LIMIT = 240  # seconds until two processes count as hanging; most of the time they import


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trainer, and a batch that its own engine generated from prompts of different lengths."""
    run = trainer(str(tmp_path_factory.mktemp("trl")), name="vopd", batch=8)
    torch.manual_seed(0)
    inputs = run._generate_and_score_completions(prompts(8, "embedded:ledger-short"))
    del inputs["num_items_in_batch"]
    assert not inputs["prompt_mask"].all() and not inputs["completion_mask"].all(), "no padding: the tests see less"
    return run, inputs


def gradients(run, kind, inputs, count) -> tuple[list, list[torch.Tensor]]:
    """Return what `_compute_loss` of a class returns, and the gradients of all weights."""
    run.model.zero_grad()
    loss, *rest = kind._compute_loss(run, run.model, inputs, count)
    loss.backward()
    return [loss.detach(), *rest], [p.grad for p in run.model.parameters()]


def close(mine, wanted, tolerance, *, least=1.0):
    """Compare within a share of each tensor's largest value, or of `least` if that is larger."""
    for a, b in zip(mine, wanted, strict=True):
        assert float((a - b).abs().max()) <= tolerance * float(b.abs().max().clamp(min=least))


def test_the_overridden_methods_are_called_as_trl_writes_them():
    names = lambda f: list(inspect.signature(f).parameters)
    assert names(DistillationTrainer._compute_loss) == ["self", "unwrapped_student", "inputs", "num_items_in_batch"]
    assert names(adapter.MethodTrainer._compute_loss) == names(DistillationTrainer._compute_loss)
    assert names(adapter.MethodTrainer.compute_loss) == names(DistillationTrainer.compute_loss)
    assert names(DistillationTrainer.__init__)[:3] == ["self", "model", "teacher_model"]
    assert names(DistillationTrainer._get_last_hidden_state)[:5] == [
        "self", "unwrapped_model", "input_ids", "attention_mask", "logits_to_keep",
    ]  # fmt: skip
    assert names(_ForwardRedirection.__call__)[:4] == ["self", "wrapper_module", "original_module", "method"]
    assert {"beta", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"} <= {*names(DistillationConfig)}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("count", [None, torch.tensor(300.0)])
def test_opd_full_is_trls_reverse_kl(run, temperature, count, monkeypatch):
    run, inputs = run
    monkeypatch.setattr(run, "method", METHODS["opd-full"]())
    monkeypatch.setattr(run, "temperature", temperature)
    tools = torch.ones_like(inputs["completion_mask"])
    tools[:, 3:7] = 0  # the answer of a tool: in the context, not in the loss
    for batch in (inputs, {**inputs, "tool_mask": tools}):
        mine, my_gradients = gradients(run, adapter.MethodTrainer, batch, count)
        wanted, gradient = gradients(run, DistillationTrainer, batch, count)
        assert mine[2] == wanted[2] == (batch["completion_mask"] * batch.get("tool_mask", 1)).sum()
        close(mine[:1], wanted[:1], 1e-6)
        close(mine[1:2], wanted[1:2], 1e-3)  # TRL's entropy is a difference of large sums
        close(my_gradients, gradient, 1e-4, least=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_vopd_by_hand(run, temperature, monkeypatch):
    """-(log q - log p + KL) grad log p, from the logits of transformers, over TRL's denominator."""
    run, inputs = run
    monkeypatch.setattr(run, "temperature", temperature)
    tools = torch.ones_like(inputs["completion_mask"])
    tools[::2, 2:5] = 0
    count = torch.tensor(41.0)
    mine, my_gradients = gradients(run, adapter.MethodTrainer, {**inputs, "tool_mask": tools}, count)

    ids, mask = (torch.cat((inputs[f"prompt_{x}"], inputs[f"completion_{x}"]), 1) for x in ("ids", "mask"))
    response, trained = inputs["completion_ids"], (inputs["completion_mask"] * tools).bool()
    logp, teacher_logp = (
        (model(input_ids=ids, attention_mask=mask).logits[:, -response.shape[1] - 1 : -1] / temperature).log_softmax(-1)
        for model in (run.model, run.teacher_model)
    )
    with torch.no_grad():
        kl = (logp.exp() * (logp - teacher_logp)).sum(-1)
        advantage = (teacher_logp - logp).gather(-1, response[..., None])[..., 0] + kl
    loss = -(advantage * logp.gather(-1, response[..., None])[..., 0])[trained].sum() / count
    run.model.zero_grad()
    loss.backward()
    close(mine[:1], [loss.detach()], 1e-5)
    close(my_gradients, [p.grad for p in run.model.parameters()], 1e-4, least=1e-3)
    assert run._reverse_kl.tolist() == pytest.approx([float(kl[trained].sum()), int(trained.sum())], rel=1e-5)


@pytest.mark.parametrize("name", FITTING)
def test_a_methods_loss_is_that_of_opds_own_trainer(run, name, monkeypatch):
    """opd pads on the right and needs no attention mask; TRL pads prompts on the left."""
    run, inputs = run
    method = METHODS[name]()
    monkeypatch.setattr(run, "method", method)
    loss, _, count = run._compute_loss(run.model, inputs, None)
    rollouts = []
    for prompt, kept, response, trained in zip(
        *(inputs[f"{part}_{x}"] for part in ("prompt", "completion") for x in ("ids", "mask")), strict=True
    ):
        ids = tuple(prompt[kept.bool()].tolist())
        kinds = dict(index=0, group=0, stopped=True, sampler_logp=())
        rollouts.append(
            Rollout(prompt_ids=ids, teacher_prompt_ids=ids, ids=tuple(response[trained.bool()].tolist()), **kinds)
        )
    packed = rows(rollouts, [[True] * len(r.ids) for r in rollouts], teacher=False, device=torch.device("cpu"))
    with torch.no_grad():
        teacher = Hidden(final_states(run.teacher_model, packed), head(run.teacher_model))
        targets = tuple(Target(torch.full((int(count),), term.coef / count), None, None) for term in method.terms)
        vocabulary = Vocabulary(len(teacher.head.weight))
        wanted, _ = Student(run.model)(packed, FrozenOutputs(teacher), method, targets, vocabulary)
    assert float(loss) == pytest.approx(float(wanted), rel=2e-5, abs=1e-6)


def test_listed_tokens_weigh_as_the_method_says(run, monkeypatch):
    run, inputs = run
    frequent = int(inputs["completion_ids"][inputs["completion_mask"].bool()].mode().values)
    monkeypatch.setattr(run, "method", METHODS["opd-full"]())
    monkeypatch.setattr(run, "temperature", 1.0)
    rest = {**inputs, "tool_mask": (inputs["completion_ids"] != frequent).long()}
    wanted = run._compute_loss(run.model, rest, torch.tensor(10.0))[0]
    monkeypatch.setattr(run, "method", Method((Match(weights=(Frozen((frequent,)),)),)))
    assert float(run._compute_loss(run.model, inputs, torch.tensor(10.0))[0]) == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("name", ["vopd", "opd-full"])
def test_a_batch_without_a_trained_token_has_loss_0(run, name, monkeypatch):
    run, inputs = run
    monkeypatch.setattr(run, "method", METHODS[name]())
    empty = {**inputs, "completion_mask": torch.zeros_like(inputs["completion_mask"])}
    empty["completion_mask"][:, 0] = 1
    empty["tool_mask"] = torch.zeros_like(inputs["completion_mask"])
    for count in (None, torch.tensor(5.0)):
        (loss, entropy, tokens), gradient = gradients(run, adapter.MethodTrainer, empty, count)
        assert loss == entropy == tokens == 0
        assert all(g is not None and not g.any() for g in gradient)


def test_training_lowers_the_divergence_and_logs_it(tmp_path):
    warm_up = dict(lr_scheduler_type="constant_with_warmup", warmup_steps=4)
    rows = history(trainer(str(tmp_path), name="vopd", steps=12, learning_rate=3e-4, **warm_up))
    kl = [row["reverse_kl"] for row in rows]
    assert sum(kl[-4:]) < 0.8 * sum(kl[:4]) and all(row["grad_norm"] > 0 for row in rows)


def test_a_run_of_opd_full_is_trls_run(tmp_path):
    """The numbers of three steps of two micro-batches, whose tokens share a denominator."""
    options = dict(batch=8, steps=3, gradient_accumulation_steps=2)
    mine, wanted = (history(trainer(str(tmp_path / name), name=name, **options)) for name in ("opd-full", "trl"))
    assert len(mine) == 3
    for a, b in zip(mine, wanted, strict=True):
        kl = a.pop("reverse_kl")
        assert a == pytest.approx(b, rel=1e-4)
        assert kl == pytest.approx(b["loss"], rel=0.05)  # a mean of means, as TRL's entropy is


def test_an_evaluation_has_its_own_metrics(tmp_path):
    run = trainer(str(tmp_path), name="vopd", batch=4)
    run.eval_dataset = run.train_dataset.select(range(8))
    found = run.evaluate()
    assert found["eval_reverse_kl"] > 0 and found["eval_entropy"] > 0


def processes(out: Path, **options) -> dict:
    """Return what two processes print."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
    done = subprocess.run(
        [*command, str(out), json.dumps(options)], capture_output=True, text=True, env=environment, timeout=LIMIT
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith('{"wrapper"')]
    return json.loads(line)


def test_two_sharded_processes_train_as_two_whole_ones(tmp_path):
    """Per-process batches differ in their tokens, so a wrong denominator or half a head's gradient would show."""
    whole, sharded = (
        processes(tmp_path / str(fsdp2), name="vopd", batch=8, steps=2, fsdp2=fsdp2) for fsdp2 in (False, True)
    )
    assert (whole["wrapper"], whole["processes"]) == ("DistributedDataParallel", 2)
    assert (sharded["wrapper"], sharded["processes"]) == ("FSDPLlamaForCausalLM", 2)
    assert len(whole["rows"]) == 2
    for a, b in zip(sharded["rows"], whole["rows"], strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-5)


REFUSED = {
    "opd-zscore": "Whiten",
    "g-opd": "reference model",
    "fire": "LikelyRollouts",
    "iw-opd": "reads student_logp",
    "entropy": "reads mask, student_entropy",
    "eopd": "TopTeacherEntropy",
    "eopd-sampled": "reads student_logp",
    "scope": "8 rollouts of each prompt",
    "kat": "its rollouts are StopOnAgreement",
    "trb": "its rollouts are Blend",
    "tropd": "its rollouts are TeacherPrefix",
    "oprd": "hidden states",
    "opsd": "a context (response)",
    "sdft": "a context (response)",
    "sdpo": "a context (peer)",
    "omniopd": "texts (Continue)",
    "ropd": "texts (Grade)",
    "rubricem": "texts (Stages)",
    "async-opd": "reads sampler_logp",
    "npd": "its rollouts are Snapshot",
}


def test_every_method_is_trained_or_refused():
    assert {*REFUSED, *FITTING} == {*METHODS} and not {*REFUSED} & {*FITTING}


@pytest.mark.parametrize("name", REFUSED)
def test_a_method_that_does_not_fit_is_refused_in_one_line(name):
    with pytest.raises(Refusal, match="does not fit TRL's DistillationTrainer") as caught:
        adapter.MethodTrainer("student", "teacher", method=METHODS[name]())
    assert REFUSED[name] in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"beta": 0.5}, "beta=0.5: the method decides"),
        ({"top_p": 0.9, "top_k": 5}, "top_p=0.9, top_k=5: a policy gradient"),
    ],
)
def test_settings_that_the_loss_contradicts_are_refused(tmp_path, settings, reason):
    with pytest.raises(Refusal, match=reason):
        trainer(str(tmp_path), name="vopd", **settings)


def test_a_divergence_may_be_trained_on_truncated_samples(tmp_path):
    trainer(str(tmp_path), name="opd-full", top_p=0.9)
