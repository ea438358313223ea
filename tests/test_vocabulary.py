"""The head pass against its naive twin: the whole [N, V], plain autograd, every kind of head, every method."""

import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch

from opd.method import Method, Positions, Target
from opd.methods import METHODS
from opd.vocabulary import Head, Hidden, Vocabulary, head_pass, measure, predictors

N, V, HS, HT = 37, 53, 12, 20
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 3.0},
    "scale": {"scale": 0.25},
    "all": {"bias": True, "softcap": 3.0, "scale": 2.0},
}
VOCABULARIES = {
    "plain": Vocabulary(V),
    "tempered": Vocabulary(V, temperature=1.7),
    "cut": Vocabulary(V - 9),
    "stop": Vocabulary(V, stop=(7, 3, 30)),
    "everything": Vocabulary(V - 5, temperature=0.8, stop=(0, 9)),
}


@dataclass
class Case:
    student: Hidden
    teacher: Hidden
    ids: torch.Tensor
    leaves: list[torch.Tensor]


def case(kind: dict, dtype: torch.dtype, size: int = V) -> Case:
    g = torch.Generator().manual_seed(0)

    def side(width: int, rows: int, live: bool) -> tuple[Hidden, list[torch.Tensor]]:
        make = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
        states, weight = make(N, width), make(rows, width) * 0.6
        bias = make(rows) if kind.get("bias") else None
        leaves = [x.requires_grad_(live) for x in (states, weight, bias) if x is not None]
        return Hidden(states, Head(weight, bias, kind.get("scale", 1.0), kind.get("softcap", 0.0))), leaves

    student, leaves = side(HS, V, True)
    teacher, _ = side(HT, V + 11, False)  # a teacher whose head is padded further
    return Case(student, teacher, torch.randint(0, size, (N,), generator=g), leaves)


def naive(c: Case, method: Method, targets: tuple[Target, ...], v: Vocabulary) -> torch.Tensor:
    """log-softmax of the whole [N, V] of both models, written from the definition."""

    def logp(side: Hidden) -> torch.Tensor:
        z = side.states.double() @ side.head.weight[: v.size].double().T
        if side.head.bias is not None:
            z = z + side.head.bias[: v.size].double()
        z = z * side.head.scale
        if side.head.softcap:
            z = side.head.softcap * torch.tanh(z / side.head.softcap)
        p = torch.softmax(z / v.temperature, -1)
        if len(v.stop) > 1:
            rest = [i for i in range(v.size) if i not in v.stop]
            p = torch.cat((p[:, list(v.stop)].sum(-1, keepdim=True), p[:, rest]), -1)
        return p.log()

    ids = c.ids
    if len(v.stop) > 1:
        rest = [i for i in range(v.size) if i not in v.stop]
        ids = torch.tensor([0 if int(i) in v.stop else 1 + rest.index(int(i)) for i in ids])
    with torch.no_grad():
        q = logp(c.teacher)
    return method.loss(Positions(ids, logp(c.student), q), targets).sum()


def targets(method: Method, dtype: torch.dtype = torch.float64) -> tuple[Target, ...]:
    weight = torch.linspace(0.1, 1.0, N, dtype=dtype)
    return tuple(Target(weight, None, None) for _ in method.terms)


LOCAL = {name: make() for name, make in METHODS.items() if make().local()}


@pytest.mark.parametrize("method", LOCAL.values(), ids=LOCAL)
@pytest.mark.parametrize("chunk", [1, 8, 64])
def test_every_method_equals_its_naive_twin(method, chunk):
    c, v = case({}, torch.float64), Vocabulary(V, chunk_bytes=chunk * 2 * V * 8)
    loss, _ = head_pass(method, c.student, c.teacher, c.ids, targets(method), v)
    wanted = naive(c, method, targets(method), v)
    torch.testing.assert_close(loss, wanted)
    for got, want in zip(
        torch.autograd.grad(3 * loss, c.leaves), torch.autograd.grad(3 * wanted, c.leaves), strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kind", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("v", VOCABULARIES.values(), ids=VOCABULARIES)
@pytest.mark.parametrize("name", ["vopd", "opd-full", "opd-stratified"])
def test_every_head_equals_its_naive_twin(kind, v, name):
    c, method = case(kind, torch.float64, v.size), METHODS[name]()
    v = replace(v, chunk_bytes=10 * 2 * V * 8)
    loss, columns = head_pass(method, c.student, c.teacher, c.ids, targets(method), v)
    wanted = naive(c, method, targets(method), v)
    torch.testing.assert_close(loss, wanted)
    for got, want in zip(torch.autograd.grad(loss, c.leaves), torch.autograd.grad(wanted, c.leaves), strict=True):
        torch.testing.assert_close(got, want)
    measured = measure(method, c.student, c.teacher, c.ids, v)
    for (a, x), (b, y) in zip(columns.named(), measured.named(), strict=True):
        assert a == b
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["vopd", "opd-full", "opd-optimal", "poweropd"])
def test_error_is_no_more_than_the_naive_one(name, dtype):
    """Both against float64 on the same rounded inputs: the tolerance is earned, not chosen."""
    c, method, v = case({}, dtype), METHODS[name](), Vocabulary(V, chunk_bytes=10 * 2 * V * 4)
    exact = torch.autograd.grad(naive(c, method, targets(method), v), c.leaves)
    ours = torch.autograd.grad(
        head_pass(method, c.student, c.teacher, c.ids, targets(method, torch.float32), v)[0], c.leaves
    )
    p = (c.student.states @ c.student.head.weight.T).float().log_softmax(-1)
    with torch.no_grad():
        q = (c.teacher.states @ c.teacher.head.weight[:V].T).float().log_softmax(-1)
    plain = torch.autograd.grad(method.loss(Positions(c.ids, p, q), targets(method, torch.float32)).sum(), c.leaves)
    for x, y, z in zip(exact, ours, plain, strict=True):
        error, allowed = (y.double() - x.double()).norm(), (z.double() - x.double()).norm()
        assert error <= allowed * 1.2 + torch.finfo(dtype).eps * x.double().norm()


def test_a_tied_head_adds_both_gradients():
    """One weight is embedding and head: autograd sums what comes through the states and through the head."""
    c, method = case({}, torch.float64), METHODS["vopd"]()
    weight = c.leaves[1]
    inputs = torch.randint(0, V, (N,))
    tied = Hidden(torch.tanh(weight[inputs]), Head(weight))
    v = Vocabulary(V, chunk_bytes=10 * 2 * V * 8)
    got = torch.autograd.grad(head_pass(method, tied, c.teacher, c.ids, targets(method), v)[0], weight)
    again = Case(Hidden(torch.tanh(weight[inputs]), Head(weight)), c.teacher, c.ids, [weight])
    torch.testing.assert_close(got, torch.autograd.grad(naive(again, method, targets(method), v), weight))


def test_a_frozen_head_gets_no_gradient():
    c, method = case({}, torch.float64), METHODS["vopd"]()
    frozen = Hidden(c.student.states, Head(c.student.head.weight.detach()))
    loss, _ = head_pass(method, frozen, c.teacher, c.ids, targets(method), Vocabulary(V))
    torch.testing.assert_close(
        torch.autograd.grad(loss, c.leaves[0]),
        torch.autograd.grad(naive(c, method, targets(method), Vocabulary(V)), c.leaves[0]),
    )


def test_no_tokens_is_a_zero_loss_with_zero_gradients():
    """A rank whose share of a micro-batch is empty still takes part in forward and backward."""
    c, method = case({}, torch.float64), METHODS["vopd"]()
    empty = Hidden(c.student.states[:0], c.student.head)
    none = tuple(t[:0] for t in targets(method))
    loss, columns = head_pass(
        method, empty, Hidden(c.teacher.states[:0], c.teacher.head), c.ids[:0], none, Vocabulary(V)
    )
    assert loss == 0 and all(len(x) == 0 for _, x in columns.named())
    assert torch.autograd.grad(loss, c.leaves[1])[0].abs().max() == 0


def test_the_shift():
    hidden = torch.arange(6.0)[None, :, None]  # position l holds l
    response = torch.tensor([[False, False, False, True, True, False]])
    torch.testing.assert_close(predictors(hidden, response)[:, 0], torch.tensor([2.0, 3.0]))


MEMORY = """
import resource, torch
from opd.method import Target
from opd.methods import METHODS
from opd.vocabulary import Head, Hidden, Vocabulary, head_pass
n, v = 4096, 65536
student = Hidden(torch.randn(n, 8, requires_grad=True), Head(torch.randn(v, 8, requires_grad=True)))
teacher, ids = Hidden(torch.randn(n, 8), Head(torch.randn(v, 8))), torch.randint(0, v, (n,))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
target = (Target(torch.ones(n), None, None),)
head_pass(METHODS["vopd"](), student, teacher, ids, target, Vocabulary(v, chunk_bytes=64 << 20))[0].backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_no_tensor_of_tokens_by_vocabulary():
    """One [N, V] here is 1024 MB, for each model; the pass may not come near one of them."""
    out = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert float(out.stdout) < 300
