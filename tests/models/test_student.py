"""The student module: one forward for backbone and head pass, whatever wraps or trims it."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from opd.core.errors import Refusal
from opd.head.inputs import FrozenOutputs
from opd.head.vocabulary import Vocabulary
from opd.losses.terms import Target
from opd.methods import METHODS
from opd.models.batching import rows
from opd.models.load import head
from opd.models.student import Student
from opd.models.verify import verify_head
from opd.teachers.local import LocalTeacher
from tests.tiny_models import MASKS, ROLLOUTS, started, tiny


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("m")
    return tiny(root / "student", seed=1, tied=True), tiny(root / "teacher", seed=2, width=48)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def run(student: Student, folders, method=METHODS["vopd"](), rollouts=ROLLOUTS, masks=MASKS):
    cpu = torch.device("cpu")
    teacher = LocalTeacher(load(folders[1]), to=cpu)
    n = sum(map(sum, masks))
    target = (Target(torch.full((n,), 1 / max(n, 1)), None, None),)
    at = rows(rollouts, masks, teacher=False, device=cpu)
    return student(at, FrozenOutputs(teacher.hidden(rollouts, masks)), method, target, Vocabulary(100))


def gradients(model) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_columns_are_what_each_model_says_by_itself(folders):
    """Every trained token's log-prob, from one unpadded forward of the plain model on its own prompt."""
    _, columns = run(Student(load(folders[0])), folders)
    for model, name, own in ((load(folders[0]), "student_logp", False), (load(folders[1]), "teacher_logp", True)):
        wanted = []
        for r, mask in zip(ROLLOUTS, MASKS, strict=True):
            prompt = r.teacher_prompt_ids if own else r.prompt_ids
            logp = model(torch.tensor([[*prompt, *r.ids]])).logits[0, len(prompt) - 1 : -1, :100].log_softmax(-1)
            wanted += [float(logp[t, token]) for t, token in enumerate(r.ids) if mask[t]]
        torch.testing.assert_close(getattr(columns, name), torch.tensor(wanted), rtol=1e-4, atol=1e-5)


def test_checkpointing_saves_activations_and_changes_nothing(folders):
    out = []
    for checkpointing in (False, True):
        student, kept = Student(load(folders[0]), checkpointing=checkpointing), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x):
            run(student, folders)[0].backward()
        out.append((gradients(student), sum(kept)))
        assert not any(m.training for m in student.model.modules())
    torch.testing.assert_close(out[0][0], out[1][0])
    assert out[1][1] < 0.7 * out[0][1]


def test_no_rows_is_a_zero_with_zero_gradients(folders):
    """What a process whose share of a step is empty runs, so that the others need not wait."""
    student = Student(load(folders[0]))
    loss, columns = run(student, folders, rollouts=[], masks=[])
    loss.backward()
    assert loss == 0 and len(columns.reverse_kl) == 0
    assert all(p.grad is None or not p.grad.any() for p in student.parameters())


def test_lora_trains_the_adapter_alone_through_a_frozen_head(folders):
    adapted = get_peft_model(load(folders[0]), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    student = Student(adapted)
    run(student, folders)[0].backward()
    assert {n.split(".")[-3][:5] for n, p in student.named_parameters() if p.grad is not None} == {"lora_"}
    assert any(g.any() for g in gradients(student))


def test_an_adapter_on_the_head_is_refused(folders):
    with pytest.raises(Refusal, match="plain Linear"):
        head(get_peft_model(load(folders[1]), LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM")))


def test_a_head_we_do_not_reproduce_is_refused(folders):
    model = load(folders[0])
    verify_head(model, field="student")
    model.lm_head.register_forward_hook(lambda m, i, o: o * 1.1)
    with pytest.raises(Refusal, match="--student: LlamaForCausalLM computes its logits in a way"):
        verify_head(model, field="student")


@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere", "qwen2", "phi"])
def test_heads_of_other_families(family):
    """Soft-cap, scale, bias: read from the configuration and checked against the model's own logits."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        family, vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    if family == "granite":
        config.logits_scaling = 8.0
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    verify_head(model, field="student")
    expected = {"gemma2": (1.0, 30.0, False), "granite": (1 / 8, 0.0, False), "cohere": (0.0625, 0.0, False)}
    expected |= {"qwen2": (1.0, 0.0, False), "phi": (1.0, 0.0, True)}
    found = head(model)
    assert (found.scale, found.softcap, found.bias is not None) == expected[family]


KAT = "kat --window 3 --floor 2 --ready 8 --after 1 --patience 2"


@pytest.mark.parametrize("method", ["opd-zscore", KAT])  # statistics of the batch, and a memory of the run
def test_two_processes_make_the_run_of_one(tmp_path, method):
    """DDP on the CPU: same rollouts, same losses, same evaluations, up to the order of sums."""
    flags = "--student embedded:student --teacher embedded:teacher --prompts embedded:ledger-short --eval-limit 5"
    flags += " --eval-prompts embedded:ledger-short --steps 3 --batch 10 --max-new-tokens 48 --micro-batch-tokens 300"
    found = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        started(["train", *flags.split(), "--out", str(out), *method.split()], processes)
        found.append([eval(line) for line in (out / "metrics.jsonl").read_text().splitlines()])
    for one, two in zip(*found, strict=True):
        assert one == pytest.approx(two, rel=1e-3, abs=1e-4)


def test_the_head_of_a_sharded_model_is_a_head(folders, tmp_path):
    """`fully_shard` gives a module a class made of FSDPModule and the module's; Accelerate shards the head, too."""
    model = load(folders[0])
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        fully_shard(model.lm_head)
        assert type(model.lm_head).__name__ == "FSDPLinear"
        assert head(model).weight is model.lm_head.weight
    finally:
        torch.distributed.destroy_process_group()
    model.lm_head = torch.nn.Bilinear(1, 1, 1)
    with pytest.raises(Refusal, match="its output head is a Bilinear; opd needs a plain Linear"):
        head(model)
