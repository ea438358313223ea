"""Products through oneDNN: as near to float64 as torch's own, gradients too, and only where they are meant to run."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from transformers import LlamaConfig, LlamaForCausalLM

from opd.head import onednn as module
from opd.head.matmul import BLOCK, addmm, mm
from opd.head.onednn import MIN_MULTIPLICATIONS, Linear, is_worthwhile, product, use_onednn

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch is built without oneDNN")


@pytest.fixture(autouse=True)
def _everywhere(monkeypatch):
    """On any processor: what is computed does not depend on who is faster."""
    monkeypatch.setattr(module, "is_faster", lambda: True)


def error(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(2048,), (3, 700), (2048, 1)])
def test_outputs_and_gradients_are_no_less_exact_than_torchs(shape, bias):
    layer = nn.Linear(48, 80, bias=bias)
    x = torch.randn(*shape, 48)
    seen = torch.randn(*shape, 80)
    exact = copy.deepcopy(layer).double()
    fast = copy.deepcopy(layer)
    use_onednn(fast)
    assert type(fast) is Linear and is_worthwhile(x, fast.weight)
    found = []
    for one in (exact, layer, fast):
        a = x.to(one.weight.dtype).requires_grad_()
        y = one(a)
        (y * seen).sum().backward()
        found.append([y.detach(), a.grad, *(p.grad for p in one.parameters())])
    for wanted, plain, ours in zip(*found, strict=True):
        assert ours.shape == plain.shape
        assert error(ours, wanted) <= 1.5 * error(plain, wanted) + 2e-7


def test_frozen_weights_ask_for_no_gradient():
    fast = nn.Linear(48, 80)
    use_onednn(fast.requires_grad_(False))
    x = torch.randn(2048, 48, requires_grad=True)
    fast(x).sum().backward()
    assert x.grad is not None and fast.weight.grad is None and fast.bias.grad is None
    with torch.no_grad():
        assert fast(x).grad_fn is None


def test_small_low_and_autocast_products_are_torchs_own(monkeypatch):
    monkeypatch.setattr(module, "product", lambda *_: pytest.fail("not here"))
    fast = nn.Linear(48, 80)
    use_onednn(fast)
    small = torch.randn(MIN_MULTIPLICATIONS // (48 * 80) - 1, 48)
    assert torch.equal(fast(small), linear(small, fast.weight, fast.bias))
    large = torch.randn(2048, 48)
    with torch.autocast("cpu", torch.bfloat16):
        assert fast(large).dtype == torch.bfloat16
    assert fast.double()(large.double()).dtype == torch.float64


def test_strides_do_not_matter():
    a, b = torch.randn(300, 200), torch.randn(100, 300)
    assert error(product(a.T, b), a.double().T @ b.double().T) < 1e-6
    assert error(product(a[::2].T, b[:, ::2]), a[::2].double().T @ b[:, ::2].double().T) < 1e-6


def test_products_into_a_place_are_whole():
    """Several blocks, the last one short."""
    states, weight = torch.randn(40, 24), torch.randn(4 * BLOCK + 100, 24)
    assert is_worthwhile(states, weight)
    out = torch.full((40, len(weight)), torch.nan)
    torch.testing.assert_close(mm(states, weight.T, out), states @ weight.T)
    whole = torch.ones(len(weight), 24)
    torch.testing.assert_close(addmm(out.T, states, whole), 1 + out.T @ states, rtol=1e-4, atol=1e-4)


def test_a_copy_has_its_own_weights():
    """A moving average of the student is such a copy."""
    fast = nn.Sequential(nn.Linear(48, 80))
    use_onednn(fast)
    other = copy.deepcopy(fast)
    with torch.no_grad():
        other[0].weight.zero_()
        assert other(torch.randn(2048, 48)).std(0).max() == 0 and fast(torch.randn(2048, 48)).std(0).min() > 0


def test_a_quickened_model_trains_as_it_did():
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    fast, ids = copy.deepcopy(model), torch.randint(300, (8, 64))
    use_onednn(fast)
    fast.gradient_checkpointing_enable({"use_reentrant": False})
    fast.train()
    losses = [m(input_ids=ids, labels=ids).loss for m in (model, fast)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    assert sum(type(m) is Linear for m in fast.modules()) == 15
    for (name, a), b in zip(model.named_parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-5, msg=name)
