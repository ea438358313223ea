"""Gradients of a sharded student: those of one process in float64, and not those of a head read outside its forward."""

import multiprocessing
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from opd.core.errors import Refusal
from opd.core.tensors import full
from opd.core.types import Rollout
from opd.head.head_pass import head_pass
from opd.head.inputs import FrozenOutputs, Hidden
from opd.head.vocabulary import Head, Vocabulary
from opd.losses.terms import PolicyGradient, Target
from opd.methods import METHODS
from opd.models.batching import rows
from opd.models.forward import final_states
from opd.models.load import head
from opd.models.sharding import is_sharded, shard_student, whole, whole_weights
from opd.models.student import Student
from opd.teachers.local import LocalTeacher
from tests.tiny_models import tiny

CPU = torch.device("cpu")
ROLLOUTS = 7  # of two processes: one has an empty micro-batch
LIMIT = 120


class Apart(Student):
    """A student whose head pass reads its head outside the forward pass that FSDP sees."""

    def forward(self, batch, frozen, method, targets, vocabulary):
        return final_states(self.model, batch)


def student_of(folder: Path, *, lora: bool = False, checkpointing: bool = False, apart: bool = False) -> Student:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    if lora:
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.02)
    return (Apart if apart else Student)(model, checkpointing=checkpointing)


def gradients(
    folder: Path, teacher_folder: Path, method_name: str, rank: int, world: int, options
) -> dict[str, Tensor]:
    """The whole gradients of some rollouts, which the processes share."""
    options = dict(options)
    shard_teacher = options.pop("shard_teacher", False)
    student = student_of(folder, **options)
    frozen = AutoModelForCausalLM.from_pretrained(teacher_folder, dtype=torch.float64).requires_grad_(False)
    teacher, method = LocalTeacher(frozen, to=CPU), METHODS[method_name]()
    if world > 1:
        shard_student(student, student.model, torch.float32)
        if shard_teacher:
            teacher.shard(student)
    generator = torch.Generator().manual_seed(1)
    size = len(head(frozen).weight)
    ids = lambda n: tuple(torch.randint(5, size, (n,), generator=generator).tolist())
    rolls = []
    for i in range(ROLLOUTS):
        prompt, response = ids(5 + i), ids(7 + 3 * i)
        roll = dict(prompt_ids=prompt, teacher_prompt_ids=prompt, ids=response, sampler_logp=(0.0,) * len(response))
        rolls.append(Rollout(**roll, index=i, group=i, stopped=True))
    advantages = [torch.randn(len(r.ids), generator=generator, dtype=torch.float64) for r in rolls]
    count, vocabulary = sum(len(r.ids) for r in rolls), Vocabulary(size, 1.0, (), 1 << 16, False)
    mine = [[i] for i in range(rank, ROLLOUTS, world)]
    for at in [*mine, *[[]] * (-(-ROLLOUTS // world) - len(mine))]:
        part = [rolls[i] for i in at]
        masks = [[True] * len(r.ids) for r in part]
        batch, n = rows(part, masks, teacher=False, device=CPU), sum(map(len, masks))
        advantage = torch.cat([torch.zeros(0, dtype=torch.float64), *(advantages[i] for i in at)])
        weight = torch.full((n,), 1 / count, dtype=torch.float64)
        targets = tuple(
            Target(weight, advantage if isinstance(t, PolicyGradient) else None, None) for t in method.terms
        )
        outputs = FrozenOutputs(teacher.hidden(part, masks))
        if options.get("apart"):
            final = student(batch, outputs, method, targets, vocabulary)
            if isinstance(student, FSDPModule):
                student.reshard()
            outside = Hidden(final, Head(full(head(student.model).weight)))
            loss, _ = head_pass(method, outside, outputs, batch.ids[batch.trained], targets, vocabulary)
        else:
            loss, _ = student(batch, outputs, method, targets, vocabulary)
        (loss * world).backward()
    return {name: full(p.grad) for name, p in student.named_parameters() if p.grad is not None}


def _run(rank: int, folder: Path, work, *arguments) -> None:
    """Work in a connected process, and save what it returns."""
    try:
        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
        assert torch.distributed.get_world_size() == 2
        torch.save(work(*arguments, rank, 2), folder / f"{rank}.pt")
        torch.distributed.barrier()
    except BaseException:
        (folder / f"{rank}.txt").write_text(traceback.format_exc())
        raise


def in_two(folder: Path, work, *arguments) -> list:
    """What work(..., rank, world) returns in two connected processes."""
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_run, args=(rank, folder, work, *arguments)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(LIMIT)
        assert not rank.is_alive(), rank.kill()
    errors = [path.read_text() for path in folder.glob("?.txt")]
    assert not errors, errors[0]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        "student": tiny(root / "student", seed=0),
        "tied": tiny(root / "tied", seed=1, tied=True),
        "teacher": tiny(root / "teacher", seed=2, layers=3),
    }


def worst(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest relative error of a gradient."""
    assert found.keys() == wanted.keys()
    return max(float((found[n] - x).norm() / x.norm().clamp(min=1e-300)) for n, x in wanted.items())


@pytest.mark.parametrize("method", ["vopd", "opd-full", "vopd-topk", "gkd"])
@pytest.mark.parametrize(
    ("student", "options"),
    [
        ("student", {}),
        ("tied", {}),
        ("student", {"lora": True}),
        ("student", {"checkpointing": True}),
        ("student", {"shard_teacher": True}),
    ],
    ids=["full", "tied", "LoRA", "checkpointing", "sharded teacher"],
)
def test_gradients_are_those_of_one_process(models, tmp_path, method, student, options):
    work = lambda rank, world: gradients(models[student], models["teacher"], method, rank, world, options)
    one, two = work(0, 1), in_two(tmp_path, work)
    assert worst(two[0], one) < 1e-14 and worst(two[1], one) < 1e-14


def test_a_head_that_is_read_outside_the_forward_pass_has_other_gradients(models, tmp_path):
    """The control: FSDP does not see it, and its gradient is that of one process's rollouts."""
    work = lambda rank, world: gradients(models["student"], models["teacher"], "vopd", rank, world, {"apart": True})
    one, two = work(0, 1), in_two(tmp_path, work)
    assert worst(two[0], one) > 1e-2


def _kept_whole(folder: Path, teacher_folder: Path, rank: int, world: int) -> list[Tensor]:
    """Logits inside `whole`, after different numbers of forward passes, and the weights that are left afterwards."""
    student = student_of(folder)
    frozen = AutoModelForCausalLM.from_pretrained(teacher_folder, dtype=torch.float64).requires_grad_(False)
    teacher = LocalTeacher(frozen, to=CPU)
    shard_student(student, student.model, torch.float32)
    teacher.shard(student)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad(), whole(student, frozen.base_model):
        for _ in range(1 + 3 * rank):  # the processes take different numbers of steps
            found = [student.model(ids).logits, frozen(ids).logits]
    for module in (student, frozen.base_model):
        assert is_sharded(module) and isinstance(module, FSDPModule)
    layers = [p for p in frozen.base_model.layers.parameters()]
    assert all(isinstance(p, DTensor) for p in [*student.parameters(), *layers])
    weights = whole_weights(student.model, main=rank == 0)
    assert bool(weights) == (rank == 0)
    return [*found, *weights.values()]


def test_whole_models_generate_and_are_sharded_again(models, tmp_path):
    work = lambda rank, world: _kept_whole(models["student"], models["teacher"], rank, world)
    two = in_two(tmp_path, work)
    ids = torch.arange(5, 25)[None]
    plain = [AutoModelForCausalLM.from_pretrained(models[n], dtype=torch.float64) for n in ("student", "teacher")]
    for found in two:
        for model, logits in zip(plain, found[:2], strict=True):
            torch.testing.assert_close(logits, model(ids).logits, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(two[0][2:], plain[0].state_dict().values(), strict=True))


def test_models_that_cannot_be_sharded_are_refused(models):
    model = AutoModelForCausalLM.from_pretrained(models["student"])
    model.model.layers[0].mlp.experts = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    with pytest.raises(Refusal, match="--shard: the experts of LlamaForCausalLM are modules of their own"):
        shard_student(Student(model), model, torch.float32)
    model.model.layers = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    with pytest.raises(Refusal, match="--shard: LlamaForCausalLM has no layers that transformers marks"):
        shard_student(Student(model), model, torch.float32)
