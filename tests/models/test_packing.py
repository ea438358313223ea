"""Packed rows have the states and gradients that padded rows have, and models that mix them are refused."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.tiny_models import tiny_config
from opd.core.errors import Refusal
from opd.head.inputs import FrozenOutputs
from opd.head.vocabulary import Vocabulary
from opd.losses.terms import Target
from opd.methods import METHODS
from opd.models import packing
from opd.models.batching import rows, shares
from opd.models.forward import states
from opd.models.student import Student
from opd.models.verify import enable_packing, verify_head
from opd.teachers.local import LocalTeacher
from tests.models.test_batching import rollouts
from tests.tiny_models import MASKS, ROLLOUTS, tiny

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SIZES = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
FAMILIES = {
    "llama": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 8},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8},
    "phi": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "qwen3_moe": {"num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2},
}


def random_model(family: str, **more):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES | FAMILIES.get(family, {}) | more))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    model.set_experts_implementation("eager")  # the default one has no products in float64
    return model.eval()


def outcome(model, device=CPU):
    """States of ragged rows, and the gradients of a random sum of them."""
    some = rollouts([30, 4, 17, 1])
    masks = [[i % 3 != 1 for i in range(len(r.ids))] for r in some]
    found, _ = states(model, rows(some, masks, teacher=False, device=device))
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(2), dtype=found.dtype).to(device)
    (found * weights).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found.detach(), gradients


def assert_close(one, two, tolerance):
    torch.testing.assert_close(one[0], two[0], rtol=tolerance, atol=tolerance)
    assert one[1].keys() == two[1].keys()
    for name, gradient in one[1].items():
        size = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(gradient, two[1][name], rtol=tolerance, atol=tolerance * size, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_have_the_states_and_gradients_of_padded_ones(family):
    model = random_model(family).double()
    padded = outcome(model)
    enable_packing(model, torch.float32, field="student")
    assert_close(outcome(model), padded, 1e-5 if family == "gemma3_text" else 1e-12)  # its norms compute in fp32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch's kernel for rows of different lengths")
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_on_a_gpu(family):
    model = random_model(family).to(CUDA, torch.bfloat16)
    padded = outcome(model, CUDA)
    enable_packing(model, torch.float32, field="student")
    assert_close(outcome(model, CUDA), padded, 5e-2)


def test_a_packed_row_has_no_padding_and_no_mask_over_the_whole_row(monkeypatch):
    real, asked = torch.nn.functional.scaled_dot_product_attention, []

    def attention(query, *args, attn_mask=None, **more):
        asked.append((query.shape[2], attn_mask))
        return real(query, *args, attn_mask=attn_mask, **more)

    model = random_model("llama")
    enable_packing(model, torch.float32, field="student")
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    widths = []
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: widths.append(args[0].shape[:2]))
    some = rollouts([30, 4])
    states(model, rows(some, [[True] * 30, [True] * 4], teacher=False, device=CPU))
    assert asked == [(33, None), (8, None)] * 2 and widths == [(1, 41)]


def losses(model, teacher, **how):
    """The loss, columns and gradients of a student."""
    student = Student(model, **how)
    frozen = FrozenOutputs(LocalTeacher(teacher, to=CPU).hidden(ROLLOUTS, MASKS))
    n = sum(map(sum, MASKS))
    target = (Target(torch.full((n,), 1 / n, dtype=torch.float64), None, None),)
    loss, columns = student(
        rows(ROLLOUTS, MASKS, teacher=False, device=CPU), frozen, METHODS["vopd"](), target, Vocabulary(100)
    )
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return columns.student_logp, columns.teacher_logp, gradients


@pytest.mark.parametrize("how", ["full", "checkpointing", "lora"])
def test_a_student_trains_on_packed_rows(tmp_path, how):
    """With checkpointing the attention runs again in the backward pass, outside the forward pass that packed."""
    load = lambda name: AutoModelForCausalLM.from_pretrained(tmp_path / name).double().eval()
    tiny(tmp_path / "student", seed=1)
    tiny(tmp_path / "teacher", seed=2, width=48)
    student, teacher = load("student"), load("teacher")
    if how == "lora":
        torch.manual_seed(0)
        adapter = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        student = get_peft_model(student, adapter).eval()
    padded = losses(student, teacher, checkpointing=how == "checkpointing")
    for model, field in ((student, "student"), (teacher, "teacher")):
        enable_packing(model, torch.float32, field=field)
    packed = losses(student, teacher, checkpointing=how == "checkpointing")
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-6)  # the log-probs are fp32
    torch.testing.assert_close(packed[2], padded[2], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("bloom", "has attention of the kind eager"),
        ("mamba", ""),
        ("jamba", ""),
        ("bamba", ""),
        ("lfm2", ""),
        ("qwen3_next", ""),
        ("gpt_oss", ""),
    ],
)
def test_models_with_other_paths_between_rows_are_refused(family, reason):
    """ALiBi, recurrent states, convolutions, attention that is not sdpa."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family)).eval()
    verify_head(model, field="student")
    with pytest.raises(Refusal, match=f"^--packing: --student: [A-Za-z0-9]+ {reason}"):
        enable_packing(model, torch.float32, field="student")


def test_attention_beyond_a_window_is_noticed(monkeypatch):
    """The first row of the check is longer than the window, so packed rows must respect it."""
    model = random_model("mistral")
    monkeypatch.setattr(packing, "_band", lambda length, window, device: None)
    with pytest.raises(Refusal, match="--packing: --teacher: MistralForCausalLM lets packed rows see each other"):
        enable_packing(model, torch.float32, field="teacher")


def test_generation_and_saved_configuration_stay(tmp_path):
    model = random_model("mistral")
    ids = torch.arange(1, 25).view(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    generate = lambda: model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=0)
    plain = generate()
    model.save_pretrained(tmp_path / "before")
    enable_packing(model, torch.float32, field="student")
    assert torch.equal(generate(), plain)
    model.save_pretrained(tmp_path / "after")
    assert (tmp_path / "after/config.json").read_text() == (tmp_path / "before/config.json").read_text()


@pytest.mark.parametrize("window", [None, 8])
def test_arguments_of_the_kernel_for_rows_of_different_lengths(monkeypatch, window):
    """It runs on GPUs alone: here a stand-in attends by its documented arguments, token by token."""

    def varlen_attn(q, k, v, ends, key_ends, longest, longest_key, *, scale, window_size, enable_gqa):
        assert ends.dtype == torch.int32 and torch.equal(ends, key_ends) and enable_gqa
        assert longest == longest_key == int(ends.diff().max())
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        left, right = window_size
        assert right == 0
        out = torch.empty_like(q)
        for start, end in zip(ends.tolist(), ends.tolist()[1:], strict=False):
            for t in range(start, end):
                first = start if left == -1 else max(start, t - left)
                weights = torch.einsum("hd,shd->hs", q[t], k[first : t + 1]).mul(scale).softmax(-1)
                out[t] = torch.einsum("hs,shd->hd", weights, v[first : t + 1])
        return out

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    lengths = [12, 3, 9]
    q, k, v = (torch.randn(1, heads, sum(lengths), 8, dtype=torch.float64) for heads in (4, 2, 2))
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    mask = torch.tensor(lengths, dtype=torch.int32)[None, None, None]
    expected, _ = packing.attention(module, q, k, v, mask, scaling=0.3, sliding_window=window)
    torch.testing.assert_close(packing.varlen(q, k, v, lengths, 0.3, window), expected)
    unpacked, _ = sdpa_attention_forward(module, q[:, :, 12:15], k[:, :, 12:15], v[:, :, 12:15], None, scaling=0.3)
    torch.testing.assert_close(expected[:, 12:15], unpacked)


def test_parts_of_packed_rows_are_few_and_full():
    widths = {0: 700, 1: 100, 2: 300, 3: 300, 4: 250, 5: 50, 6: 40, 7: 10}
    loads = [0, 0]
    parts = shares(widths, 500, loads, packed=True)
    assert sorted(i for part in parts for rank in part for i in rank) == list(widths)
    assert len(parts) == 2 and all(len(part) == 2 for part in parts)  # 1750 tokens in parts of 500, and one of 700
    for rank in range(2):
        own = [part[rank] for part in parts]
        assert loads[rank] == sum(widths[i] for part in own for i in part)
        assert all(len(part) == 1 or sum(widths[i] for i in part) <= 500 for part in own)
    assert max(loads) <= 2 * 700
    assert shares({}, 500, [0, 0], packed=True) == []
