"""Hidden states: the mathematics against torch's own, the models against transformers' own, the runs end to end."""

import re
import signal
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.nn.functional import cosine_similarity, mse_loss, normalize
from transformers import AutoModelForCausalLM

import opd
from opd.cli import main
from opd.cli.method_names import add_terms
from opd.head.inputs import FrozenOutputs
from opd.head.vocabulary import Vocabulary
from opd.losses.hidden_states import Bridge, Lens, Lenses, Projection, distance, fit, layer_map, pca
from opd.losses.reductions import LastTokens
from opd.losses.surrogates import Clipped
from opd.losses.terms import Match, MatchHidden, PolicyGradient, Target
from opd.methods import METHODS, oprd
from opd.methods.method import Method
from opd.models.batching import rows
from opd.models.student import Student
from opd.teachers.local import LocalTeacher
from opd.training.hidden_bridge import sampled_mask
from tests.end_to_end.test_train import command, config, launch, wait_for
from tests.tiny_models import MASKS, ROLLOUTS, logged, started, tiny

close = torch.testing.assert_close


@pytest.mark.parametrize("student, teacher", [(2, 3), (3, 2), (28, 36), (24, 24), (12, 61), (61, 12), (9, 5), (5, 3)])
def test_layers_are_spread_evenly_from_end_to_end(student, teacher):
    found = layer_map(student, teacher)
    official = torch.linspace(0, teacher - 1, student, dtype=torch.float64).round() + 1  # halves to even, as torch does
    assert found == tuple(official.int().tolist())
    assert found[0] == 1 and found[-1] == teacher and list(found) == sorted(found)


def test_a_student_of_one_layer_looks_at_the_last():
    assert layer_map(1, 7) == (7,) and layer_map(7, 1) == (1,) * 7


def test_distance_is_the_mean_square_and_the_teacher_stands_still(float64):
    student, teacher = torch.randn(2, 5, 7, requires_grad=True)
    found = distance(student, teacher)
    close(found.mean(), mse_loss(student, teacher))
    assert torch.autograd.grad(found.sum(), teacher, allow_unused=True, retain_graph=True)[0] is None
    close(torch.autograd.grad(found.sum(), student)[0], 2 / 7 * (student - teacher))


def test_bridge_distance_is_two_minus_two_cosines_over_the_rank(float64):
    rank, h, t = 4, torch.randn(50, 9), torch.randn(50, 6)
    own, other = Projection(torch.randn(rank, 9), torch.zeros(9)), Projection(torch.randn(rank, 6), torch.randn(6))
    cosine = cosine_similarity(h @ own.matrix.T, (t - other.mean) @ other.matrix.T)
    close(distance(own(h), other(t)), (2 - 2 * cosine) / rank)
    a, b = Lens((1,), (own,))([h]), Lens((1,), (other,))([t])
    close(distance(a[0], b[0]), (2 - 2 * cosine) / rank)


def test_a_projection_of_nothing_is_finite_with_a_finite_gradient():
    h = torch.zeros(2, 3, requires_grad=True)
    Projection(torch.randn(2, 3), torch.zeros(3))(h).sum().backward()
    assert h.grad.isfinite().all()


def test_a_lens_without_projections_only_widens():
    h = torch.randn(4, 3).bfloat16()
    (view,) = Lens((2,))([h])
    assert view.dtype == torch.float32 and torch.equal(view, h.float())


def test_pca_is_the_singular_vectors_of_the_centred_states(float64):
    states = torch.randn(400, 12) * torch.linspace(1, 3, 12) + torch.randn(12) * 5
    found = pca(states, 5)
    close(found.mean, states.mean(0))
    close(found.matrix @ found.matrix.T, torch.eye(5))
    _, _, v = torch.linalg.svd(states - states.mean(0), full_matrices=False)
    close((found.matrix @ v[:5].T).abs(), torch.eye(5), atol=1e-8, rtol=0)
    _, _, low = torch.pca_lowrank(states, q=12, niter=10)
    close((found.matrix @ low[:, :5]).abs(), torch.eye(5), atol=1e-6, rtol=0)


def states(rows: int = 3000, noise: float = 0.3):
    """Two models that hold the same few numbers, in their own bases, scales and widths; and a noise of their own."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g)
    shared = draw(rows, 4) * torch.tensor([4.0, 3.0, 2.0, 1.5])
    student = 100 * (shared @ draw(4, 10) + noise * draw(rows, 10))
    return student, 0.01 * (shared @ draw(4, 16) + noise * draw(rows, 16)) + draw(16)


def test_fit_finds_nearly_what_least_squares_finds_and_holds_out_the_last_rows():
    student, teacher = states()
    ours, theirs, cosine = fit(student, teacher, Bridge(rank=4), seed=0)
    target = (teacher[:2700] - theirs.mean) @ theirs.matrix.T
    best = torch.linalg.lstsq(student[:2700], target).solution
    held = normalize(student[2700:] @ best), theirs(teacher[2700:])
    optimum = (held[0] * held[1]).sum(-1).mean().item()
    measured = (ours(student[2700:]) * theirs(teacher[2700:])).sum(-1).mean().item()
    assert measured == pytest.approx(cosine, abs=1e-4)
    assert optimum - 0.02 < cosine < 1 and cosine > 0.8
    blind = Projection(torch.randn(4, 10), torch.zeros(10))
    assert abs((blind(student[2700:]) * theirs(teacher[2700:])).sum(-1).mean()) < cosine - 0.3
    close(theirs.matrix, pca(teacher[:2700], 4).matrix)  # the held-out rows shape neither side


def test_fit_is_reproducible_and_better_than_its_own_first_epoch():
    student, teacher = states()
    once, again = (fit(student, teacher, Bridge(rank=4), seed=3)[0].matrix for _ in range(2))
    assert torch.equal(once, again)
    first = fit(student, teacher, Bridge(rank=4, epochs=1), seed=3)[2]
    assert first < fit(student, teacher, Bridge(rank=4), seed=3)[2]


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"rollouts": 0}, {"epochs": 0}, {"lr": 0.0}, {"rank": 8, "rows": 79}])
def test_impossible_bridges_are_refused(wrong):
    with pytest.raises(ValueError, match="bridge " + list(wrong)[-1]):
        Bridge(**wrong)


def test_last_tokens_are_the_trained_ones_and_the_mean_is_theirs():
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()
    weight = LastTokens(2)(mask)
    kept = torch.tensor([[0, 0, 1, 1, 0], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()
    close(weight, kept * (6 / 4))
    x = torch.rand(3, 5)
    close((x * weight * mask / mask.sum()).sum(), x[kept].mean())
    assert torch.equal(LastTokens(9)(mask), mask.float())
    assert not LastTokens(2)(torch.zeros(2, 3).bool()).any()
    with pytest.raises(ValueError, match="last=0"):
        LastTokens(0)


def test_some_tokens_are_trained_ones_and_as_many_as_asked():
    mask = torch.rand(5, 40) < 0.5
    few, all_of_them = sampled_mask(mask, 20, 0), sampled_mask(mask, 1000, 0)
    assert few.sum() == 20 and (few <= mask).all() and torch.equal(all_of_them, mask)
    assert torch.equal(few, sampled_mask(mask, 20, 0)) and not torch.equal(few, sampled_mask(mask, 20, 1))


# models


CPU = torch.device("cpu")
WIDTHS = {"student": (32, 2), "twin": (32, 2), "wide": (48, 3)}  # name -> width, layers


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("m")
    return {n: tiny(root / n, seed=i, width=w, layers=k) for i, (n, (w, k)) in enumerate(WIDTHS.items())}


def model(folders, name):
    return AutoModelForCausalLM.from_pretrained(folders[name]).eval()


WEIGHT = torch.rand(14, generator=torch.Generator().manual_seed(5)) / 14
PLAIN = Lenses(Lens((1, 2)), Lens((1, 2)))


def bridged(layers=(1, 2), met=(1, 3)) -> Lenses:
    g = torch.Generator().manual_seed(7)
    draw = lambda *shape: torch.randn(*shape, generator=g)
    side = lambda width: tuple(Projection(draw(8, width), draw(width)) for _ in layers)
    return Lenses(Lens(layers, side(32)), Lens(met, side(48)))


def run(student, teacher, method, lenses, at=slice(None), weight=WEIGHT, grad=True):
    """Loss and columns of one forward of the student module on some rollouts; every term weighs the tokens alike."""
    rolls, trained = ROLLOUTS[at], MASKS[at]
    heard = FrozenOutputs(LocalTeacher(teacher, to=CPU).hidden(rolls, trained, lenses.teacher), None, lenses.student)
    n = [sum(map(sum, MASKS[:i])) for i in range(4)]
    part = weight[n[at.start or 0] : n[3 if at.stop is None else at.stop]]
    targets = tuple(Target(term.coef * part, None, None) for term in method.terms) if grad else None
    return student(rows(rolls, trained, teacher=False, device=CPU), heard, method, targets, Vocabulary(100))


def alone(network, layers, own: bool) -> list[list[torch.Tensor]]:
    """By transformers alone, without padding: the states that predict each trained token, by layer and rollout."""
    out = [[] for _ in layers]
    for r, mask in zip(ROLLOUTS, MASKS, strict=True):
        prompt = r.teacher_prompt_ids if own else r.prompt_ids
        found = network.model(torch.tensor([[*prompt, *r.ids]]), output_hidden_states=True).hidden_states
        for kept, layer in zip(out, layers, strict=True):
            kept.append(found[layer][0, len(prompt) - 1 : -1][torch.tensor(mask)])
    return out


def expected(student, teacher, lenses, project):
    """The weighted loss, and its gradients in the student, by the formula."""
    mine, theirs = alone(student, lenses.student.layers, False), alone(teacher, lenses.teacher.layers, True)
    loss = sum(
        (WEIGHT * project(i, torch.cat(a), torch.cat(b).detach())).sum()
        for i, (a, b) in enumerate(zip(mine, theirs, strict=True))
    ) / len(mine)
    student.zero_grad()
    loss.backward()
    return loss.detach(), grads(student)


def grads(network) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}


def test_loss_and_gradient_are_those_of_the_formula(folders):
    student, teacher = model(folders, "student"), model(folders, "twin")
    want = expected(student, teacher, PLAIN, lambda i, a, b: (a - b).square().mean(-1))
    student.zero_grad()
    loss, columns = run(Student(student), teacher, oprd(), PLAIN)
    loss.backward()
    close((loss.detach(), grads(student)), want)
    assert "lm_head.weight" not in grads(student)
    close((WEIGHT * columns.hidden_distance).sum(), want[0])
    mine, theirs = ([torch.cat(x) for x in alone(m, (1, 2), own)] for m, own in ((student, False), (teacher, True)))
    close(columns.hidden_cosine, sum(map(cosine_similarity, mine, theirs)) / 2)


def test_bridge_loss_and_gradient_are_those_of_the_formula(folders):
    student, teacher, lenses = model(folders, "student"), model(folders, "wide"), bridged()

    def project(i, a, b):
        p, q = lenses.student.projections[i], lenses.teacher.projections[i]
        return (2 - 2 * cosine_similarity((a - p.mean) @ p.matrix.T, (b - q.mean) @ q.matrix.T)) / 8

    want = expected(student, teacher, lenses, project)
    student.zero_grad()
    loss, _ = run(Student(student), teacher, Method((MatchHidden(bridge=Bridge(8)),)), lenses)
    loss.backward()
    close((loss.detach(), grads(student)), want)


def test_some_layers_alone(folders):
    student, teacher, lenses = model(folders, "student"), model(folders, "twin"), Lenses(Lens((1,)), Lens((1,)))
    want = expected(student, teacher, lenses, lambda i, a, b: (a - b).square().mean(-1))
    student.zero_grad()
    loss, _ = run(Student(student), teacher, oprd(layers=(1,)), lenses)
    loss.backward()
    close((loss.detach(), grads(student)), want)
    assert all(".layers.1." not in name for name in grads(student))


def test_a_teacher_that_is_the_student_leaves_no_loss(folders):
    student = model(folders, "student")
    same = [replace(r, teacher_prompt_ids=r.prompt_ids) for r in ROLLOUTS]
    heard = FrozenOutputs(LocalTeacher(student, to=CPU).hidden(same, MASKS, PLAIN.teacher), None, PLAIN.student)
    at = rows(same, MASKS, teacher=False, device=CPU)
    loss, columns = Student(student)(at, heard, oprd(), (Target(WEIGHT, None, None),), Vocabulary(100))
    assert loss == 0 and not columns.hidden_distance.any()
    close(columns.hidden_cosine, torch.ones(14))


def test_parts_of_a_batch_add_up(folders):
    student, teacher = Student(model(folders, "student")), model(folders, "twin")
    for at in (slice(0, 1), slice(1, 1), slice(1, 3)):  # one of them empty
        run(student, teacher, oprd(), PLAIN, at)[0].backward()
    parts = grads(student)
    student.zero_grad()
    run(student, teacher, oprd(), PLAIN)[0].backward()
    close(parts, grads(student))


@pytest.mark.parametrize("name", ["opd", "opd-full", "vopd", "gkd"])
def test_terms_add(folders, name):
    """Beside any other term, closed form or not, on either side of it."""
    student, teacher, found = Student(model(folders, "student")), model(folders, "twin"), []
    other, hidden = METHODS[name](), oprd(coef=0.3)
    both = [Method((*a.terms, *b.terms)) for a, b in ((other, hidden), (hidden, other))]
    for method in (other, hidden, *both):
        student.zero_grad()
        loss, columns = run(student, teacher, method, PLAIN)
        loss.backward()
        found.append((loss.detach(), grads(student)))
        assert len(columns.scores) == len(method.terms)
    (a, x), (b, y), *sums = found
    zero = torch.zeros(())
    for total, z in sums:
        close((total, z), (a + b, {n: x.get(n, zero) + y.get(n, zero) for n in z}))


def test_training_without_heads_never_looks_at_the_vocabulary(folders, monkeypatch):
    def forbidden(*_):
        raise AssertionError("the head pass ran")

    monkeypatch.setattr("opd.models.student.head_pass", forbidden)
    monkeypatch.setattr("opd.models.student.measure", forbidden)
    student, teacher = Student(model(folders, "student")), model(folders, "twin")
    loss, columns = run(student, teacher, oprd(), PLAIN)
    loss.backward()
    assert loss > 0 and {name for name, _ in columns.named()} == {"hidden_distance", "hidden_cosine"}
    with pytest.raises(AssertionError, match="the head pass ran"):
        run(student, teacher, Method((*oprd().terms, Match())), PLAIN)


def test_measuring_tells_both(folders):
    _, columns = run(Student(model(folders, "student")), model(folders, "twin"), oprd(), PLAIN, grad=False)
    assert {"reverse_kl", "hidden_distance"} < {name for name, _ in columns.named()}


def test_checkpointing_changes_nothing(folders):
    found = []
    for checkpointing in (False, True):
        student = Student(model(folders, "student"), checkpointing=checkpointing)
        run(student, model(folders, "twin"), oprd(), PLAIN)[0].backward()
        found.append(grads(student))
    close(*found)


def test_lora_moves_the_states_of_the_adapted_model(folders):
    adapted = get_peft_model(
        model(folders, "student"), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    student, teacher = Student(adapted), model(folders, "twin")
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(3):
        loss, _ = run(student, teacher, oprd(), PLAIN)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert {n.split(".")[-3][:5] for n in grads(student)} == {"lora_"}
    assert losses[0] > losses[1] > losses[2]


def test_bf16_states_are_compared_in_fp32(folders):
    student, teacher = Student(model(folders, "student")), model(folders, "wide").bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss, columns = run(student, teacher, Method((MatchHidden(bridge=Bridge(8)),)), bridged())
    loss.backward()
    assert columns.hidden_distance.dtype == torch.float32
    assert all(g.isfinite().all() for g in grads(student).values())


# the method


def test_every_method_without_heads_is_tested_here():
    assert [name for name, make in METHODS.items() if make().headless()] == ["oprd"]


def test_bridge_coefficient_is_the_published_one():
    (term,) = oprd(bridge_rank=8, coef=0.5).terms
    assert term.coef == 5.0 and term.bridge == Bridge(8) and oprd().terms[0].coef == 1.0


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (lambda: oprd(layers=(0,)), "different numbers from 1"),
        (lambda: oprd(layers=(2, 2)), "different numbers from 1"),
        (lambda: oprd(bridge_rank=-1), "bridge_rank=-1"),
        (lambda: oprd(last=0), "last=0"),
        (lambda: Method((*oprd().terms, *oprd().terms)), "one term at most"),
    ],
)
def test_impossible_methods_are_refused(wrong, why):
    with pytest.raises(ValueError, match=why):
        wrong()


def test_also_takes_the_flags_of_the_other_method():
    both = add_terms(METHODS["vopd"](), "oprd --bridge-rank 4 --layers 1 2:0.1")
    assert both.terms[1] == replace(oprd(bridge_rank=4, layers=(1, 2)).terms[0], coef=1.0)
    with pytest.raises(opd.Refusal, match="--also oprd:1: a method matches hidden states in one term"):
        add_terms(both, "oprd:1")


def test_also_takes_the_rollouts_of_the_method_for_those_that_ask_for_none():
    mixed = METHODS["gkd"](share=0.5)
    assert add_terms(mixed, "oprd:1").rollouts == mixed.rollouts
    with pytest.raises(opd.Refusal, match="its rollouts are Mixture"):
        add_terms(METHODS["vopd"](), "gkd --share 0.5:1")
    with pytest.raises(opd.Refusal, match=r"--also vopd:1: Mixture.* lets others speak"):
        add_terms(mixed, "vopd:1")


# runs


@pytest.fixture(scope="module")
def kin(tmp_path_factory):
    """A student and a teacher of one ancestry: the teacher is the student, its weights moved a little."""
    root = tmp_path_factory.mktemp("kin")
    start, moved = (tiny(root / n, seed=1) for n in ("student", "teacher"))
    network = AutoModelForCausalLM.from_pretrained(moved)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.2 * p.std() * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    network.save_pretrained(moved)
    return start, moved


HELD = {"eval_prompts": "embedded:ledger-short", "eval_limit": 16, "eval_every": 100}


def test_matched_states_bring_the_distributions_together(kin, tmp_path):
    run = config(kin, tmp_path / "run", method=oprd(), steps=40, save_every=100, lr=3e-3, **HELD)
    first, *steps, last = logged(opd.train(run))
    assert all(row["grad_norm"] > 0 and row["refused"] == 0 for row in steps)
    assert all("reverse_kl" not in row and row["hidden_distance"] == pytest.approx(row["loss"]) for row in steps)
    assert last["eval_hidden_distance"] < 0.5 * first["eval_hidden_distance"]
    assert last["eval_hidden_cosine"] > first["eval_hidden_cosine"]
    assert last["eval_reverse_kl"] < 0.8 * first["eval_reverse_kl"]


def test_a_bridge_brings_models_of_other_shapes_together(folders, tmp_path):
    pair, method = (folders["student"], folders["wide"]), oprd(bridge_rank=4)
    run = config(pair, tmp_path / "run", method=method, steps=20, save_every=100, lr=3e-3, **HELD)
    fitted, first, *steps, last = logged(opd.train(run))
    assert fitted["bridge_cosine"] == pytest.approx(first["eval_hidden_cosine"], abs=0.15)
    assert fitted["bridge_cosine"] > 0.1  # of random models, whose tokens are all that they have in common
    assert all(row["grad_norm"] > 0 and row["loss"] == pytest.approx(10 * row["hidden_distance"]) for row in steps)
    assert last["eval_hidden_distance"] < 0.9 * first["eval_hidden_distance"]
    assert last["eval_hidden_distance"] == pytest.approx((2 - 2 * last["eval_hidden_cosine"]) / 4, rel=1e-4)


@pytest.mark.parametrize("base", ["vopd", "opd-zscore", "gkd"])  # one pass, two, and no closed form
def test_beside_another_method(folders, tmp_path, base):
    method = add_terms(METHODS[base](), "oprd --bridge-rank 4:0.5")
    run = config((folders["student"], folders["wide"]), tmp_path / "run", method=method)
    _, *steps = logged(opd.train(run))
    assert all(row["grad_norm"] > 0 and {"reverse_kl", "hidden_distance"} < row.keys() for row in steps)


def test_last_tokens_alone_are_weighed(kin, tmp_path):
    (row,) = logged(opd.train(config(kin, tmp_path / "run", method=oprd(last=3), steps=1)))
    assert row["weighted"] == pytest.approx(3 / row["length"], rel=0.2) and row["weighted"] < 0.5


def test_several_updates_on_one_batch(kin, tmp_path):
    method = replace(METHODS["opd"](), terms=(PolicyGradient(surrogate=Clipped()), *oprd().terms))
    rows = logged(opd.train(config(kin, tmp_path / "run", method=method, updates=2)))
    assert all(row["grad_norm"] > 0 for row in rows)


@pytest.mark.parametrize("method", [["oprd", "--bridge-rank", "4"], ["--also", "oprd --bridge-rank 4:0.5", "vopd"]])
def test_killed_and_resumed_is_bitwise_the_uninterrupted_run(folders, tmp_path, method):
    pair = folders["student"], folders["wide"]
    whole = launch(command(pair, tmp_path / "whole", *method))
    assert whole.wait(300) == 0, whole.stderr.read()
    cut = launch(command(pair, tmp_path / "cut", *method))
    wait_for(tmp_path / "cut" / "checkpoints" / "step-000004", cut)
    cut.send_signal(signal.SIGKILL)
    cut.wait(30)
    again = launch(command(pair, tmp_path / "cut", "--resume", *method))
    assert again.wait(300) == 0, again.stderr.read()
    assert (tmp_path / "cut/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    for file in ("model.safetensors", "training_state/optimizer.safetensors", "training_state/bridge.safetensors"):
        a, b = (load_file(tmp_path / n / "checkpoints" / "step-000008" / file) for n in ("whole", "cut"))
        assert a and all(torch.equal(a[k], b[k]) for k in a)


def test_two_processes_make_the_run_of_one(tmp_path):
    flags = "--student embedded:small --teacher embedded:teacher --prompts embedded:ledger-short --eval-limit 5"
    flags += " --eval-prompts embedded:ledger-short --steps 3 --batch 10 --max-new-tokens 48 --micro-batch-tokens 300"
    found = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        started(["train", *flags.split(), "--out", str(out), "oprd", "--bridge-rank", "4"], processes)
        found.append(logged(out))
    for one, two in zip(*found, strict=True):
        assert one == pytest.approx(two, rel=1e-3, abs=1e-4)


REFUSED = {
    "3 layers of width 48 beside the student's 2 of width 32; .* add --bridge-rank 8": "oprd",
    "--layers 3: the student has 2 layers; name some of 1 to 2": "oprd --bridge-rank 4 --layers 3",
    "--bridge-rank 33: the narrower model has width 32": "oprd --bridge-rank 33",
    "METHOD oprd: bridge_rank=-1": "oprd --bridge-rank -1",
    "too few to fit it on; raise --max-new-tokens": "oprd --bridge-rank 32",
}


@pytest.mark.parametrize(("why", "method"), [(why, method) for why, method in REFUSED.items()], ids=REFUSED.values())
def test_what_cannot_be_compared_is_refused_in_one_line(folders, tmp_path, capsys, why, method):
    flags = f"--student {folders['student']} --teacher {folders['wide']} --prompts embedded:ledger-short --batch 8"
    flags += f" --max-new-tokens 1 --no-doctor --quiet --out {tmp_path / 'run'} {method}"
    assert main(["train", *flags.split()]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and re.search(why, said), said
