"""The Triton kernels against float64, alone and in the whole head pass; test_triton.py runs this in the interpreter."""

import sys
from dataclasses import astuple, replace

import pytest
import torch

from opd.head import head_pass as head_pass_module
from opd.head import sweep
from opd.head.backend import backend_name, uses_triton
from opd.head.closed_forms import Form, Sums, ThroughKL, ThroughLogp
from opd.head.head_pass import head_pass, measure
from opd.head.inputs import FrozenOutputs, Hidden, TeacherLogps
from opd.head.kernels import c_sweep as native
from opd.head.kernels import triton_sweep as fused
from opd.head.vocabulary import Head, Vocabulary
from opd.losses.rewards import LogRatio, One
from opd.losses.terms import PolicyGradient
from opd.methods import METHODS
from opd.methods.method import Method
from tests.head import test_head_pass as plain
from tests.head.test_head_pass import (
    CLOSED,
    FORMS,
    V,
    case,
    column_errors,
    columns_by_definition,
    distances,
    naive,
    near_logits,
    passed,
    targets,
)

N, WIDE = 4, 200  # tokens; a vocabulary of two tiles, the last one ragged
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 3.0},
    "all": {"bias": True, "softcap": 3.0, "scale": 2.0},
}
VOCABULARIES = {
    "plain": Vocabulary(WIDE),
    "stop": Vocabulary(WIDE, temperature=1.7, stop=(170, 3, 30)),
}
SCORED = {n: m for n, m in FORMS[ThroughLogp].items() if n in ("vopd", "no baseline", "ratio")}
FUSED = SCORED | FORMS[ThroughKL]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few tokens, which the interpreter walks one by one, and tiles of 128 logits."""
    monkeypatch.setattr(plain, "N", N)
    monkeypatch.setattr(fused, "WARPS", 1)
    monkeypatch.setattr(fused, "DEPTH", 1)


@pytest.fixture
def swept(monkeypatch):
    """How often Triton swept; nobody else may."""
    calls, fused_sweep = [], fused.sweep_
    monkeypatch.setattr(fused, "sweep_", lambda *args, **more: calls.append(len(args[0])) or fused_sweep(*args, **more))
    monkeypatch.setattr(native, "runs", lambda *args: pytest.fail("C was asked"))
    monkeypatch.setattr(sweep, "sweep_", lambda *args: pytest.fail("torch swept"))
    return calls


def raw(kind: dict, dtype: torch.dtype, size: float = 3.0) -> tuple[torch.Tensor, torch.Tensor, Head, Head]:
    """W h of both models, far from 0, and their heads."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g)
    shift = 0.0 if kind.get("softcap") else 100.0
    z, t = draw(N, WIDE) * size + shift, draw(N, WIDE) * size - shift
    heads = [
        Head(
            draw(WIDE + 7, 1),
            draw(WIDE + 7) if kind.get("bias") else None,
            kind.get("scale", 1.0),
            kind.get("softcap", 0.0),
        )
        for _ in range(2)
    ]
    return z.to(dtype), t.to(dtype), *heads


def swept_alone(
    z: torch.Tensor,
    t: torch.Tensor | None,
    ids: torch.Tensor,
    heads,
    v: Vocabulary,
    form: Form | None,
    low: torch.dtype,
) -> tuple[Sums, torch.Tensor]:
    """The sums and the gradient, which a lower precision writes into the student's own rows."""
    buffer, sums = z.clone(), Sums.empty(N, torch.empty(0))
    gradient = buffer if low == z.dtype else buffer.view(low)[:, :WIDE]
    fused.sweep_(buffer, t, ids, sums, heads=tuple(heads), vocabulary=v, form=form, gradient=gradient)
    return sums, gradient


@pytest.mark.parametrize(
    ("kind", "v"), [("plain", "plain"), ("plain", "stop"), ("bias", "plain"), ("softcap", "plain"), ("all", "stop")]
)
@pytest.mark.parametrize("form", [ThroughLogp(), ThroughKL()], ids=lambda form: form.column)
@pytest.mark.parametrize(
    ("dtype", "low"),
    [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)],
    ids=["fp32", "bf16 in place of fp32", "bf16"],
)
def test_the_kernels_equal_float64(kind, v, form, dtype, low):
    """Columns and gradient by their definition, from the logits as the kernels read them."""
    v, (z, t, *heads) = VOCABULARIES[v], raw(HEADS[kind], dtype)
    ids = torch.tensor([170, 30, 199, 128])
    sums, gradient = swept_alone(z, t, v.canonical(ids), heads, v, form, low)
    exact = z.double().requires_grad_()
    wide = [replace(h, bias=None if h.bias is None else h.bias.double()) for h in heads]
    p, q = v.logp(exact, wide[0]), v.logp(t.double(), wide[1])
    at = lambda x: x.gather(-1, v.canonical(ids)[:, None])[:, 0]
    merged = p > -1e29  # ids that the stop class stands for have no mass
    mean = lambda a, b: (a.exp() * b.where(merged, 0)).sum(-1)
    wanted = {
        "student_logp": at(p),
        "teacher_logp": at(q),
        "student_entropy": -mean(p, p),
        "teacher_entropy": -mean(q, q),
        "reverse_kl": mean(p, p - q),
    }
    for name, found in sums.columns().items():
        torch.testing.assert_close(found.double(), wanted[name].detach(), rtol=1e-5, atol=2e-5)
    (slope,) = torch.autograd.grad((form.sign * wanted[form.column]).sum(), exact)
    slope = slope / (heads[0].scale / v.temperature)  # which the head pass multiplies in
    error = (gradient.double() - slope).norm() / slope.norm()
    assert error < (1e-5 if low == torch.float32 else 2**-7.5)  # the interpreter cuts where a GPU rounds


def test_a_teacher_that_is_not_here():
    """Its log q(y) is given: the student's sums and gradient are as before."""
    z, t, *heads = raw({}, torch.float32)
    ids, v = torch.arange(N), Vocabulary(WIDE, stop=(1, 2))
    (whole, same), (sums, gradient) = (
        swept_alone(z, x, ids, (heads[0], y), v, ThroughLogp(), torch.float32) for x, y in ((t, heads[1]), (None, None))
    )
    for name, found in sums.student().items():
        torch.testing.assert_close(found, whole.student()[name], rtol=0, atol=0)
    torch.testing.assert_close(gradient, same, rtol=0, atol=0)


@pytest.mark.parametrize("form", [ThroughLogp(), ThroughKL()], ids=lambda form: form.column)
def test_a_logit_of_minus_infinity(form):
    """A probability of 0: nothing where the student has it, an infinite KL where only the teacher does, no nan."""
    z, t, *heads = raw({}, torch.float32)
    z[:, ::3], t[:, ::3], t[1, 4], z[2, 128:] = -torch.inf, -torch.inf, -torch.inf, -torch.inf
    ids, kept = torch.tensor([1, 2, 1, 4]), z > -torch.inf
    sums, gradient = swept_alone(z, t, ids, heads, Vocabulary(WIDE), form, torch.float32)
    exact = z.double().requires_grad_()
    p, q = exact.log_softmax(-1), t.double().log_softmax(-1)
    own, other = p.where(kept, 0), q.where(kept, 0)
    kl = (own.exp() * (own - other)).where(kept, 0).sum(-1)
    columns = sums.columns()
    assert columns["reverse_kl"][1] == torch.inf and columns["reverse_kl"].isfinite().sum() == N - 1
    rows = torch.tensor([0, 2, 3])
    torch.testing.assert_close(columns["reverse_kl"][rows].double(), kl[rows].detach(), rtol=1e-5, atol=1e-5)
    entropy = -(own.exp() * own).where(kept, 0).sum(-1)
    torch.testing.assert_close(columns["student_entropy"].double(), entropy.detach(), rtol=1e-5, atol=1e-5)
    column = p.gather(-1, ids[:, None])[:, 0] if form.sign < 0 else kl
    (slope,) = torch.autograd.grad(form.sign * column[rows].sum(), exact)
    torch.testing.assert_close(gradient[rows].double(), slope[rows].where(kept[rows], 0), rtol=1e-5, atol=1e-6)


def test_a_nan_is_not_hidden():
    z, t, *heads = raw({}, torch.float32)
    z[1, 170], t[3, 199] = torch.nan, torch.nan
    sums, gradient = swept_alone(z, t, torch.arange(N), heads, Vocabulary(WIDE), ThroughKL(), torch.float32)
    assert sums.e.isnan().tolist() == [False, True, False, False]
    assert sums.f.isnan().tolist() == [False, False, False, True]
    assert gradient.isnan().any(-1).tolist() == [False, True, False, True]


@pytest.mark.parametrize("width", [1, 127, 128, 129])
def test_a_row_at_the_edge_of_a_tile(width):
    """Nothing beyond it is read or written."""
    whole = torch.randn(2, N, 160)
    z, t = whole[0, :, :width], whole[1, :, :width]
    before, ids, sums = whole.clone(), torch.zeros(N, dtype=torch.long), Sums.empty(N, z)
    heads = (Head(z.T), Head(z.T))
    fused.sweep_(z, t, ids, sums, heads=heads, vocabulary=Vocabulary(width), form=ThroughLogp(), gradient=z)
    p = before[0, :, :width].double().softmax(-1)
    torch.testing.assert_close(z.double(), p - torch.eye(width)[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(whole[0, :, width:], before[0, :, width:], rtol=0, atol=0)
    torch.testing.assert_close(whole[1], before[1], rtol=0, atol=0)


@pytest.mark.parametrize("kind", plain.HEADS.values(), ids=plain.HEADS)
@pytest.mark.parametrize("v", [Vocabulary(V - 5, temperature=0.8, stop=(0, 9))], ids=["everything"])
@pytest.mark.parametrize("name", ["vopd", "opd-full"])
def test_the_head_pass_equals_its_naive_twin(kind, v, name, swept):
    """Every kind of head, softcap included, through the code that a GPU runs, in chunks."""
    c, method = case(kind, torch.float32, v.size), METHODS[name]()
    v, ts = replace(v, chunk_bytes=2 * V * 6), targets(method, torch.float32)
    (loss, *got), columns = passed(c, method, ts, v)
    assert sum(swept) == N and len(swept) > 2
    wanted = naive(c, method, targets(method), v)
    torch.testing.assert_close(loss.double(), wanted.detach(), rtol=1e-5, atol=1e-6)
    for x, y in zip(got, torch.autograd.grad(wanted, c.leaves), strict=True):
        torch.testing.assert_close(x.double(), y.double(), rtol=1e-4, atol=2e-6)
    for (a, x), (b, y) in zip(columns.named(), measure(method, c.student, c.heard, c.ids, v).named(), strict=True):
        assert a == b
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("method", FUSED.values(), ids=FUSED)
@pytest.mark.parametrize("measured", [False, True], ids=["one pass", "two phases"])
def test_every_method_of_sums(method, measured, swept):
    """Also with advantages that were measured before, and an old policy that differs."""
    c, v = case({"bias": True}, torch.float32), Vocabulary(V, 1.3)
    draw = lambda: torch.randn(N, generator=torch.Generator().manual_seed(3))
    old = measure(method, c.student, c.heard, c.ids, v).student_logp + 0.3 * draw()
    ts = tuple(plain.Target(draw().abs(), draw() if measured else None, old) for _ in method.terms)
    (loss, *got), _ = passed(c, method, ts, v)
    wanted = naive(c, method, ts, v)
    for x, y in zip([loss, *got], [wanted.detach(), *torch.autograd.grad(wanted, c.leaves)], strict=True):
        torch.testing.assert_close(x.double(), y.double(), rtol=1e-4, atol=2e-6)
    assert sum(swept) == 2 * N


@pytest.mark.parametrize("name", ["top-k", "optimal", "beyond"])
def test_who_looks_at_the_vocabulary_again_goes_through_torch(name, monkeypatch):
    monkeypatch.setattr(fused, "sweep_", lambda *args, **more: pytest.fail("Triton swept"))
    c, method = case({}, torch.float32), CLOSED[name]
    (loss, *_), _ = passed(c, method, targets(method, torch.float32), Vocabulary(V))
    torch.testing.assert_close(
        loss.double(), naive(c, method, targets(method), Vocabulary(V)).detach(), rtol=1e-4, atol=1e-5
    )


def test_without_a_closed_form_triton_measures_and_autograd_differentiates(swept):
    c, method = case({"softcap": 3.0}, torch.bfloat16), METHODS["gkd"]()
    (_, *got), columns = passed(c, method, targets(method, torch.float32), Vocabulary(V))
    assert not swept
    found = measure(method, c.student, c.heard, c.ids, Vocabulary(V))
    assert sum(swept) == N
    torch.testing.assert_close(found.reverse_kl, columns.reverse_kl, rtol=1e-4, atol=1e-5)
    exact = torch.autograd.grad(naive(c, method, targets(method), Vocabulary(V)), c.leaves)
    assert (distances(got, exact) < 2e-2).all()


@pytest.mark.parametrize("told", [True, False])
def test_a_teacher_behind_a_server(told, swept):
    c, method = case({}, torch.float32), Method((PolicyGradient(LogRatio() if told else One()),))
    given = TeacherLogps(torch.linspace(-3, -1, N)) if told else None
    ts = (plain.Target(torch.ones(N), None if told else torch.linspace(-1, 1, N), torch.zeros(N)),)
    loss, columns = head_pass(method, c.student, FrozenOutputs(given), c.ids, ts, Vocabulary(V))
    logp = (c.student.states.double() @ c.student.head.weight.double().T).log_softmax(-1)
    logp = logp.gather(-1, c.ids[:, None])[:, 0]
    advantage = ts[0].advantage if given is None else given.logp - logp.detach()
    wanted = -(advantage * logp).sum()
    torch.testing.assert_close(columns.student_logp.double(), logp.detach(), rtol=1e-5, atol=1e-5)
    for x, y in zip(torch.autograd.grad(loss, c.leaves), torch.autograd.grad(wanted, c.leaves), strict=True):
        torch.testing.assert_close(x.double(), y.double(), rtol=1e-4, atol=2e-6)
    assert sum(swept) == N


@pytest.mark.parametrize("rounded", [False, True], ids=["fp32 tiles", "bf16 tiles"])
@pytest.mark.parametrize("name", ["vopd", "opd-full"])
def test_bf16_products(rounded, name, swept, monkeypatch):
    """As a GPU makes them, unrounded: then fp32 tiles lose what the products' factors lost, and no more."""
    unrounded = lambda a, b, out: out.copy_(a.float() @ b.float())
    for module in (sweep, head_pass_module):
        monkeypatch.setattr(module, "mm", unrounded)
    monkeypatch.setattr(head_pass_module, "addmm", lambda a, b, out: out.add_(a.float() @ b.float()))
    c, method, v = case({}, torch.bfloat16), METHODS[name](), Vocabulary(V, rounded=rounded)
    (_, *got), columns = passed(c, method, targets(method, torch.float32), v)
    exact = [
        x.detach().double() for x in (c.student.states, c.student.head.weight, c.teacher.states, c.teacher.head.weight)
    ]
    p, q = (exact[0] @ exact[1].T).log_softmax(-1), (exact[2] @ exact[3][:V].T).log_softmax(-1)
    error = (columns.reverse_kl.double() - (p.exp() * (p - q)).sum(-1)).abs().max()
    assert (1e-3 < error < 0.1) if rounded else error < 1e-5
    wanted = torch.autograd.grad(naive(c, method, targets(method), v), c.leaves)
    assert (distances(got, wanted) < (2e-2 if rounded else 1e-2)).all() and sum(swept) == N


def test_error_is_no_more_than_the_naive_one(monkeypatch):
    """Columns and gradients of a teacher close to the student, against float64; the kernels alone make them."""
    rows, forms = 160, (ThroughLogp(), ThroughKL())  # the interpreter needs 30 ms for each row
    monkeypatch.setattr(sys.modules[__name__], "N", rows)
    v, head = Vocabulary(WIDE), Head(torch.empty(WIDE, 1))
    logits = near_logits(len(forms) * rows, WIDE)
    sums = []
    for form, student, teacher, ids in zip(forms, *(x.split(rows) for x in logits), strict=True):
        part, ours = swept_alone(student, teacher, ids, (head, head), v, form, torch.float32)
        sums.append(astuple(part))
        exact, plain = (
            gradient_by_definition(form, student.to(x), teacher.to(x), ids) for x in (torch.float64, torch.float32)
        )
        assert (ours - exact).norm() <= 1.2 * (plain - exact).norm()
    for name, error in column_errors(Sums(*map(torch.cat, zip(*sums, strict=True))), *logits).items():
        assert error <= 1.2, (name, error)


def gradient_by_definition(form: Form, student: torch.Tensor, teacher: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The gradient that the form leaves, by autograd in the dtype of the logits."""
    z = student.clone().requires_grad_()
    column = columns_by_definition(z, teacher, ids)[form.column]
    return torch.autograd.grad((form.sign * column).sum(), z)[0]


def test_a_sure_student_keeps_its_small_gradient(swept):
    """p(y) near 1: p(y) - 1 is rounded after the subtraction, not before."""
    weight = torch.eye(V, dtype=torch.bfloat16).requires_grad_()
    states = (9 * torch.eye(V, dtype=torch.bfloat16)[:N]).requires_grad_()
    student, teacher = Hidden(states, Head(weight)), case({}, torch.bfloat16).teacher
    c, method, v = plain.Case(student, teacher, torch.arange(N), [states, weight]), METHODS["vopd"](), Vocabulary(V)
    (_, *got), columns = passed(c, method, targets(method, torch.float32), v)
    assert (columns.student_logp > -1e-2).all() and sum(swept) == N
    assert (distances(got, torch.autograd.grad(naive(c, method, targets(method), v), c.leaves)) < 2e-2).all()


def test_a_teacher_that_is_the_student_has_nothing_to_say():
    """To the bit, whatever their lanes meet first."""
    z, _, head, _ = raw({"bias": True}, torch.float32)
    sums, gradient = swept_alone(z, z, torch.arange(N), (head, head), Vocabulary(WIDE), ThroughKL(), torch.float32)
    columns = sums.columns()
    assert (columns["reverse_kl"] == 0).all() and (gradient == 0).all()
    assert (columns["student_logp"] == columns["teacher_logp"]).all()


def test_float64_stays_with_torch(monkeypatch):
    monkeypatch.setattr(fused, "sweep_", lambda *args, **more: pytest.fail("Triton swept"))
    c, method = case({}, torch.float64), METHODS["vopd"]()
    loss, _ = head_pass(method, c.student, c.heard, c.ids, targets(method), Vocabulary(V))
    torch.testing.assert_close(loss, naive(c, method, targets(method), Vocabulary(V)))


def test_who_sweeps(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert uses_triton(cpu) and uses_triton(gpu) and backend_name(cpu) == "triton"
    monkeypatch.delenv("TRITON_INTERPRET")
    assert (
        not uses_triton(cpu)
        and uses_triton(gpu)
        and backend_name(cpu) in ("C", "torch")
        and backend_name(gpu) == "triton"
    )
    monkeypatch.setattr("opd.head.backend._triton", lambda: False)
    assert not uses_triton(gpu) and backend_name(gpu) == "torch"
