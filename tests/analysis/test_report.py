"""Pages of run folders: numbers against independent ones, then both pages in a headless browser."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import opd
from opd.analysis.report.figures import (
    differing_settings,
    group_differences,
    payload,
    phases,
    positions,
    training_effects,
)
from opd.analysis.report.inspect import inspect, rock_shares
from opd.analysis.report.page import presentable, report
from opd.config.commands import Inspect, Report
from opd.core.errors import Refusal
from opd.core.intervals import paired
from opd.core.sampling import Sampling
from opd.data.tokenizers import token_texts
from opd.head.inputs import Hidden, TeacherLogps
from opd.head.token_scores import alternatives
from opd.head.vocabulary import Head, Vocabulary
from opd.methods import METHODS
from opd.models.source import EMBEDDED
from opd.training import alarms as rules
from opd.training.run_log import Log, RunGroup, group_runs, read, saved
from tests.tiny_models import tiny


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two seeds of one method, one of another; real runs of real (small) models."""
    root = tmp_path_factory.mktemp("runs")
    student, teacher = tiny(root / "student", seed=1), tiny(root / "teacher", seed=2, width=48)
    base = opd.Train(
        student=str(student),
        teacher=str(teacher),
        prompts="embedded:ledger-short",
        eval_prompts="embedded:ledger-short",
        steps=12,
        batch=8,
        eval_every=4,
        eval_limit=6,
        rollouts_every=5,
        sampling=Sampling(max_new_tokens=16),
        lr=1e-2,
        quiet=True,
    )
    plan = {"vopd-0": ("vopd", 0), "vopd-1": ("vopd", 1), "zscore": ("opd-zscore", 0)}
    return [
        opd.train(replace(base, method=METHODS[name](), seed=seed, out=root / folder))
        for folder, (name, seed) in plan.items()
    ]


def test_alternatives_are_the_likeliest_tokens_of_both():
    n, v, k = 37, 50, 4
    states, others = torch.randn(n, 8), torch.randn(n, 6)
    student = Hidden(states, Head(torch.randn(v, 8), bias=torch.randn(v)))
    teacher = Hidden(others, Head(torch.randn(v + 3, 6), softcap=5.0))
    found = alternatives(student, teacher, k, Vocabulary(v, chunk_bytes=8 * v * 4 * 5))  # five rows at a time
    p = (states @ student.head.weight.T + student.head.bias).log_softmax(-1)
    q = (5 * torch.tanh(others @ teacher.head.weight[:v].T / 5)).log_softmax(-1)
    for columns, logp in ((slice(0, k), p), (slice(k, None), q)):
        assert torch.equal(found.ids[:, columns].long(), logp.topk(k).indices)
    torch.testing.assert_close(found.student_logp, p.gather(-1, found.ids.long()))
    torch.testing.assert_close(found.teacher_logp, q.gather(-1, found.ids.long()))
    alone = alternatives(student, TeacherLogps(torch.zeros(n)), k, Vocabulary(v))
    assert torch.equal(alone.ids, found.ids[:, :k]) and alone.teacher_logp.isnan().all()


def test_texts_of_tokens_add_up_to_the_response():
    text = AutoTokenizer.from_pretrained(EMBEDDED / "teacher")
    ids = text("Sep: 27+48=75\n<answer>75", add_special_tokens=False)["input_ids"]
    said = token_texts(text, ids)
    assert "".join(said[i] for i in ids) == text.decode(ids)


@pytest.mark.parametrize("kind", ["ByteLevel", "Metaspace"])
def test_spaces_of_tokens_stay(kind):
    """GPT's kind of tokenizer, and that of sentencepiece, whose decoder drops the space that begins a text."""
    words = tokenizers.Tokenizer(tokenizers.models.BPE())
    words.pre_tokenizer = getattr(tokenizers.pre_tokenizers, kind)()
    words.decoder = getattr(tokenizers.decoders, kind)()
    sentence = "a sum of a sum and a half \u00e9 \U0001f99d"
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet() if kind == "ByteLevel" else []
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    words.train_from_iterator([sentence], trainer)
    text = PreTrainedTokenizerFast(tokenizer_object=words)
    ids = text("sum and half \U0001f99d", add_special_tokens=False)["input_ids"]
    said = [token_texts(text, ids)[i] for i in ids]
    assert "".join(said).strip().startswith("sum and half ") and all(said) and "\ufffd" not in "".join(said)


def test_a_run_folder_says_what_the_pages_need(runs):
    for folder in runs:
        log = read(folder)
        assert sorted(log.prompts) == [0, 4, 8, 12] and all(len(t) == 6 for t in log.prompts.values())
        for row in log.evaluations:  # what was logged is the mean of what was kept
            kept = log.prompts[row["step"]].values()
            assert row["eval_accuracy"] == pytest.approx(np.mean([r["outcome"] for r in kept]))
            total = sum(r["reverse_kl"] * r["length"] for r in kept) / sum(r["length"] for r in kept)
            assert row["eval_reverse_kl"] == pytest.approx(total, rel=1e-4)
        assert list(saved(log.folder)) == [1, 5, 10, 12]
        columns = load_file(folder / "rollouts/step-000012.safetensors")
        said = columns["alternatives_ids"] == columns["ids"][..., None]
        there = said.any(-1) & columns["mask"]
        assert there.any()
        for who in ("student_logp", "teacher_logp"):  # two computations of one number, before the same update
            found = columns[f"alternatives_{who}"].masked_fill(~said, -math.inf).amax(-1)
            torch.testing.assert_close(found[there], columns[who][there], rtol=1e-3, atol=1e-4)
        total = columns["weight.0"][columns["mask"]].sum()
        torch.testing.assert_close(total, torch.ones(()))  # the mean over tokens
        texts = json.loads((folder / "rollouts/step-000012.tokens.json").read_text())
        assert set(map(str, columns["alternatives_ids"].unique().tolist())) <= texts.keys()


def test_groups_are_configurations(runs):
    groups = group_runs([read(r) for r in runs])
    assert [(g.name, len(g.runs)) for g in groups] == [("vopd", 2), ("opd-zscore", 1)]
    s = groups[0].series("reverse_kl")
    own = [read(r).series("reverse_kl") for r in runs[:2]]
    assert s.mean[3] == pytest.approx((own[0][4] + own[1][4]) / 2)
    assert (s.low[3], s.high[3]) == (min(o[4] for o in own), max(o[4] for o in own))
    differ, same = differing_settings([g.runs[0].config for g in groups])
    assert differ == ["method"] and "lr" in same and "seed" not in same


def test_equal_names_are_told_apart(runs, tmp_path):
    other = shutil.copytree(runs[0], tmp_path / "faster")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "lr": 0.5}))
    names = [g.name for g in group_runs([read(runs[0]), read(other)])]
    assert len(set(names)) == 2 and "lr=0.5" in names[1]


def test_bootstrap_agrees_with_the_standard_error():
    noise = np.random.default_rng(1)
    hard = noise.normal(size=400)  # prompts differ more than models do: only the paired difference sees it
    a, b = (hard + noise.normal(scale=0.3, size=400) + shift for shift in (0.1, 0.0))
    found = paired(a[None], b[None])
    error = (a - b).std(ddof=1) / 20
    assert found.value == pytest.approx((a - b).mean())
    assert found.low == pytest.approx(found.value - 1.96 * error, abs=0.2 * error)
    assert found.high == pytest.approx(found.value + 1.96 * error, abs=0.2 * error)
    assert found.better == (a > b).sum() and found.worse == (a < b).sum()
    seeds = paired(np.stack([a + 1, a - 1]), b[None])  # seeds that differ by more than prompts do
    assert seeds.high - seeds.low > 5 * (found.high - found.low)


def test_comparisons_take_the_prompts_that_both_have(runs, tmp_path):
    groups = group_runs([read(r) for r in runs])
    (pair,) = group_differences(groups, "reverse_kl")
    values = [[read(r).prompts[12][p]["reverse_kl"] for p in read(runs[2]).prompts[12]] for r in runs]
    assert pair.prompts == 6
    assert pair.value == pytest.approx(np.mean(values[0]) / 2 + np.mean(values[1]) / 2 - np.mean(values[2]))
    cut = shutil.copytree(runs[2], tmp_path / "cut")
    path = cut / "evals/step-000012.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]))
    assert group_differences(group_runs([read(runs[0]), read(cut)]), "outcome")[0].prompts == 4
    assert [g.a for g in training_effects(groups, "reverse_kl")] == ["vopd", "opd-zscore"]
    assert all(g.high < 0 for g in training_effects(groups, "reverse_kl"))  # training lowered it


def test_kl_by_position(runs):
    (group,) = group_runs([read(runs[0])])
    first, last = positions(group)
    assert (first["step"], last["step"]) == (1, 12)
    columns = load_file(runs[0] / "rollouts/step-000012.safetensors")
    at = [int(x) for x in last["x"]].index(3)
    assert last["mean"][at] == pytest.approx(float(columns["reverse_kl"][:, 3][columns["mask"][:, 3]].mean()), rel=1e-4)


def made(**changes):
    """A healthy run of 20 steps, some of its numbers replaced by a function of the step."""
    healthy = {
        "loss": 0.0,
        "length": 50.0,
        "stopped": 1.0,
        "student_entropy": 0.5,
        "teacher_entropy": 0.4,
        "refused": 0.0,
    }
    healthy |= {"sampler_gap": 1e-4, "repetition": 0.1, "unstaged": 0.99}
    rows = [{"step": s, "reverse_kl": 1 / s, **healthy} for s in range(1, 21)]
    rows = [{**row, **{name: value(row["step"]) for name, value in changes.items()}} for row in rows]
    return tuple(rows)


def test_phases_are_what_a_step_waits_for():
    """The worker's processor seconds pass beside them."""
    perf = {"wait_s": 1.0, "update_s": 2.0, "worker_cpu_s": 4.0, "seconds": 3.0, "tokens_per_s": 9.0}
    log = Log(Path("run"), {}, {}, ({"step": 1}, {"step": 2}), (), (perf, perf | {"save_s": 1.0}), {})
    assert phases(RunGroup("one", (log,))) == {"wait": 1.0, "update": 2.0, "save": 0.5}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("refused steps", {"refused": lambda s: float(s == 7)}),
        ("length explosion", {"length": lambda s: 50.0 + 10 * s}),
        ("truncated generations", {"stopped": lambda s: 1 - s / 25}),
        ("no stages", {"unstaged": lambda s: float(s > 16)}),
        ("entropy collapse", {"student_entropy": lambda s: 0.5 / s}),
        ("repetition", {"repetition": lambda s: s / 25}),
        ("sampler gap", {"sampler_gap": lambda s: 0.6 * (s == 3)}),
        ("KL rises", {"reverse_kl": lambda s: 0.1 + s / 50}),
    ],
)
def test_alarms_ring_for_their_cause_alone(runs, name, changes):
    log = replace(read(runs[0]), evaluations=(), prompts={}, folder=Path("/nowhere"))
    quiet = replace(log, steps=made())
    assert rules.alarms(quiet) == []
    (alarm,) = rules.alarms(replace(log, steps=made(**changes)))
    assert alarm.name == name and alarm.remedy


def test_alarm_of_agreement_without_accuracy(runs):
    log = read(runs[0])
    names = [str(i) for i in range(60)]
    table = lambda right: {p: {"outcome": float(i < right), "reverse_kl": 0.1} for i, p in enumerate(names)}
    evals = tuple({"step": s, "eval_reverse_kl": kl} for s, kl in ((0, 0.5), (10, 0.3), (20, 0.1)))
    fallen = replace(log, steps=made(), evaluations=evals, prompts={0: table(10), 10: table(40), 20: table(15)})
    risen = replace(fallen, prompts={0: table(10), 10: table(15), 20: table(40)})
    assert [a.name for a in rules.agreement_trap(fallen)] == ["agreement trap"]
    assert "step 10" in next(rules.agreement_trap(fallen)).remedy
    assert list(rules.agreement_trap(risen)) == []


def test_what_json_has_no_word_for():
    assert presentable({"a": [math.nan, 1.23456789, "x"], 3: math.inf}) == {"a": [None, 1.23457, "x"], "3": None}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (lambda runs: Report(runs=()), "RUN is missing"),
        (lambda runs: Report(runs=(runs[0], runs[0])), "named twice"),
        (lambda runs: Report(runs=(runs[0].parent,)), "no config.json"),
    ],
)
def test_refusals_of_report(runs, config, says):
    with pytest.raises(Refusal, match=says) as caught:
        report(config(runs))
    assert "\n" not in str(caught.value)


def test_rock_scores_are_shares_of_the_kl_by_type():
    ids, mask = torch.tensor([[3, 1, 3], [1, 9, 9]]), torch.tensor([[True, True, True], [True, False, False]])
    kl = torch.tensor([[1.0, 0.5, 3.0], [0.5, 7.0, 7.0]])  # 4 nats on 3, 1 on 1, nothing trained on 9
    want = torch.tensor([[0.8, 0.2, 0.8], [0.2, 0.0, 0.0]])
    torch.testing.assert_close(rock_shares(ids, mask, kl), want)
    assert (rock_shares(ids, mask, torch.zeros(2, 3)) == 0).all()


def test_refusals_of_inspect(runs, tmp_path):
    with pytest.raises(Refusal, match="--step 3: rollouts were saved at 1, 5, 10, 12"):
        inspect(Inspect(run=runs[0], step=3))
    with pytest.raises(Refusal, match="no saved rollouts"):
        inspect(Inspect(run=tmp_path))


def test_pictures(runs, tmp_path):
    report(Report(runs=tuple(runs), out=tmp_path / "page.html", static=tmp_path / "static"))
    files = {p.name for p in (tmp_path / "static").iterdir()}
    assert files == {f"{name}.{kind}" for name in ("curves", "positions", "phases") for kind in ("png", "svg")}
    assert (tmp_path / "static/curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_at_work_and_an_old_one_are_shown(runs, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(runs[0] / name, bare)
    with (bare / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')  # half a line
    shown = payload(group_runs([read(bare)]))
    assert shown["groups"][0]["steps"] == 12 and shown["positions"] == [] and shown["between"] == []


# The pages in a browser.


@pytest.fixture(scope="module")
def browser():
    """Debian's Chromium under Playwright: `pip install playwright`, and a browser of the system."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("there is no Chromium on the path")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with api.sync_playwright() as play:
        running = play.chromium.launch(executable_path=path, args=flags)
        yield running
        running.close()


@pytest.fixture
def visit(browser):
    """Open a file; every message of the console and every request that is not that file is a failure."""
    contexts, wrong = [], []

    def visit(path, **options):
        context = browser.new_context(viewport={"width": 1280, "height": 800}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "request", lambda request: wrong.extend([request.url] * (not request.url.startswith(("file:", "data:"))))
        )
        page.goto(path.resolve().as_uri())
        return page

    yield visit
    for context in contexts:
        context.close()
    assert wrong == []


def test_the_report_in_a_browser(runs, visit, tmp_path):
    path = report(Report(runs=tuple(runs), out=tmp_path / "report.html"))
    page = visit(path)
    assert page.locator("#results tr").count() == 3
    assert page.locator("#curves figure").count() >= 9 and page.locator("#curves svg path").count() > 20
    assert page.locator("#positions figure").count() == 2 and page.locator(".phase").count() == 2
    assert "opd-zscore" in page.locator("#paired").inner_text()
    assert page.locator("#config h3").inner_text() == "What differs"
    curve = page.locator("#curves svg").nth(2)
    before = curve.inner_html()
    page.locator("#smooth").fill("0.8")
    assert curve.inner_html() != before
    page.click("#seeds")
    assert page.locator("#seeds").get_attribute("aria-pressed") == "true"
    lines = page.locator("#curves svg").nth(2).locator("path").count()
    page.click("#legend button >> nth=0")  # a group less: its mean, its band and its two seeds
    assert page.locator("#curves svg").nth(2).locator("path").count() == lines - 4
    page.click("#log")
    page.locator("#curves svg").nth(2).hover()
    assert "opd-zscore" in page.locator("#tip").inner_text()
    page.locator("#curves svg").nth(0).focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.locator("#tip").inner_text().startswith("step 4")
    page.click("#others summary")
    page.wait_for_selector("#others svg")
    page.locator("#curves details.data summary").first.click()
    page.wait_for_selector("#curves details.data table >> text=8")


def test_inspect_in_a_browser(runs, visit, tmp_path):
    evil = shutil.copytree(runs[0], tmp_path / "evil")
    path = evil / "rollouts/step-000012.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[2]["prompt"] = "</script><img src=x onerror=alert(1)> needle"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = visit(inspect(Inspect(run=evil, out=tmp_path / "inspect.html")))
    page.wait_for_selector("body[data-ready]")
    columns = load_file(path.with_suffix(".safetensors"))
    lengths = columns["mask"].sum(1).tolist()
    assert page.locator("#tokens .t").count() == lengths[0]
    texts = json.loads((evil / "rollouts/step-000012.tokens.json").read_text())
    said = "".join(texts[str(i)] for i in columns["ids"][0][: lengths[0]].tolist())
    assert page.locator("#tokens").text_content().replace("⏎", "") == said

    page.locator("#tokens .t").nth(3).hover()
    tip = page.locator("#tip").inner_text()
    assert "could have said" in tip and "teacher" in tip, tip
    shown = float(re.search(r"reverse KL\s+([\d.]+)", tip)[1])
    assert shown == pytest.approx(float(columns["reverse_kl"][0, 3]), rel=0.01, abs=0.001)

    page.keyboard.press("2")
    assert "reverse KL" in page.locator("#legend").inner_text()
    page.select_option("#color", "advantage")
    assert "advantage" in page.locator("#legend").inner_text()
    page.keyboard.press("Escape")
    page.keyboard.press("j")
    assert page.locator("#tokens .t").count() == lengths[1]
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowRight")
    assert "token 0" in page.locator("#tip").inner_text()

    page.keyboard.press("/")
    page.keyboard.type("needle")
    assert page.locator(".row").count() == 1 and "1 of 8" in page.locator("#about").inner_text()
    assert "<img src=x" in page.locator("#prompt").inner_text()
    page.keyboard.press("Escape")
    assert page.locator(".row").count() == 8

    page.select_option("#sort", "rock")
    rock = rock_shares(columns["ids"].long(), columns["mask"], columns["reverse_kl"]).where(columns["mask"], 0)
    assert page.locator("#facts b").first.inner_text() == str(int((rock.sum(1) / columns["mask"].sum(1)).argmax()))
    page.select_option("#sort", "kl")
    means = [float(r.locator("span").last.inner_text()) for r in page.locator(".row").all()]
    kls = (columns["reverse_kl"] * columns["mask"]).sum(1) / columns["mask"].sum(1)
    assert page.locator("#facts b").first.inner_text() == str(int(kls.argmax()))
    assert len(means) == 8
    page.fill("#low", "1000")  # then everything is a trap
    assert f"longest trap {lengths[int(kls.argmax())]} tokens" in page.locator("#facts").inner_text()
    page.select_option("#filter", "cut")
    assert page.locator(".row").count() == int((~columns["stopped"]).sum())
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    assert page.locator("#keys").is_visible()
    page.click("#keys button")
    assert not page.locator("#keys").is_visible()


HOSTILE = (
    "/*policy*//*style*//*data*//*program*/ <script>document.title='ran'</script></script></style><!--<script> "
    "<img src=x onerror=\"document.title='ran'\"><svg onload=\"document.title='ran'\"> \u2028\u2029]]> '\" "
    "<a href=\"javascript:document.title='ran'\">x</a> \0\x1b[31m \u202ereversed"
)
SHOWN = HOSTILE.translate({0: "\u2400", 0x1B: "\u241b", 0x202E: "[U+202E]"})


def hostile_run(run, folder):
    """Return a copy of a run with HOSTILE as every text, and as a name in every file."""
    evil = shutil.copytree(run, folder)
    change = lambda path, edit: path.write_text("".join(json.dumps(edit(json.loads(x))) + "\n" for x in path.open()))
    text = lambda value: (
        {k: text(v) for k, v in value.items()} | {HOSTILE: HOSTILE} if isinstance(value, dict) else HOSTILE
    )
    for name in ("config.json", "environment.json"):
        (evil / name).write_text(json.dumps(text(json.loads((evil / name).read_text()))))
    names = {HOSTILE: 1.0, f"outcome.{HOSTILE}": 0.5, f"teacher.{HOSTILE}.reverse_kl": 0.1}
    change(evil / "metrics.jsonl", lambda row: row | names)
    change(evil / "perf.jsonl", lambda row: row | {f"{HOSTILE}_s": 1.0})
    texts = dict.fromkeys(("answer", "response"), HOSTILE)
    prompts = (HOSTILE, [{"role": HOSTILE, "content": HOSTILE}])
    for path in (evil / "rollouts").glob("step-*.jsonl"):
        change(path, lambda row: row | texts | {"prompt": prompts[row["index"] % 2]})
    for path in (evil / "rollouts").glob("*.tokens.json"):
        path.write_text(json.dumps(dict.fromkeys(json.loads(path.read_text()), HOSTILE)))
    return evil


EVERYTHING = """() => {
    const events = ["pointerenter", "pointermove", "mouseover", "click", "focus", "change", "input"];
    for (const node of document.querySelectorAll("body *"))
        for (const name of events) node.dispatchEvent(new MouseEvent(name, { bubbles: true, clientX: 9, clientY: 9 }));
    const foreign = "img, iframe, a, base, object, embed, [onerror], [onload]";
    const count = (selector) => document.querySelectorAll(selector).length;
    return [document.title === "ran", count(foreign), count("script, style")];
}"""


def test_any_text_is_text(runs, visit, tmp_path):
    """Marks of the template, markup, and characters that hide or reorder others, in every field of a run."""
    evil = hostile_run(runs[0], tmp_path / "evil <b>&")
    page = visit(inspect(Inspect(run=evil, out=tmp_path / "inspect.html")))
    page.wait_for_selector("body[data-ready]")
    assert page.locator("#prompt").text_content().startswith(SHOWN)
    assert SHOWN in page.locator("#tokens .t").first.text_content()
    assert page.evaluate(EVERYTHING) == [False, 0, 3]
    page = visit(report(Report(runs=(evil,), out=tmp_path / "report.html")))
    assert page.locator("#curves figure").count() >= 9
    assert SHOWN in page.locator("#config").text_content() and SHOWN in page.locator("#environment").text_content()
    page.click("#others summary")
    page.wait_for_selector("#others svg")
    assert SHOWN.replace("_", " ") in page.locator("#others").text_content() + page.locator("#curves").text_content()
    assert page.evaluate(EVERYTHING) == [False, 0, 3]


def test_the_policy_is_a_second_wall(runs, browser, tmp_path):
    """Markup that reached the page after all runs no program, has no style, and fetches nothing."""
    path = report(Report(runs=(runs[0],), out=tmp_path / "report.html"))
    markup = "<script>document.title = 'ran'</script><i id=i style='color: red' onclick='document.title = 1'>x</i>"
    path.write_text(path.read_text().replace("</body>", f"{markup}<img src=http://127.0.0.1:9/x></body>"))
    page = browser.new_page()
    page.goto(path.as_uri())
    page.locator("#i").dispatch_event("click")
    assert page.title() not in ("ran", "1")
    assert page.evaluate("getComputedStyle(document.querySelector('#i')).color") != "rgb(255, 0, 0)"
    fetched = "fetch('http://127.0.0.1:9/').then(() => 'sent', (error) => error.message)"
    refused = []
    page.on("console", lambda message: refused.append(message.text))
    page.evaluate(fetched)
    assert any("Content Security Policy" in text for text in refused)
    page.close()


def test_a_thousand_rollouts_scroll(runs, visit, tmp_path):
    """1000 x 300 tokens: the page opens, and moving through it draws what is in sight and no more."""
    many = tmp_path / "many"
    (many / "rollouts").mkdir(parents=True)
    b, t, v, a = 1000, 300, 5000, 10
    ids = torch.randint(v, (b, t))
    floats = (
        "student_logp",
        "teacher_logp",
        "student_entropy",
        "teacher_entropy",
        "reverse_kl",
        "weight.0",
        "advantage.0",
    )
    columns = {name: torch.rand(b, t) for name in floats} | {"ids": ids, "mask": torch.ones(b, t, dtype=torch.bool)}
    columns |= {f"alternatives_{n}": -torch.rand(b, t, a) for n in ("student_logp", "teacher_logp")}
    columns |= {"alternatives_ids": torch.randint(v, (b, t, a), dtype=torch.int32)}
    save_file(columns, many / "rollouts/step-000001.safetensors")
    row = {"prompt": "why?", "answer": "", "response": "so", "outcome": 1.0, "stopped": True, "tokens": t}
    lines = "".join(json.dumps({"index": i, **row}) + "\n" for i in range(b))
    (many / "rollouts/step-000001.jsonl").write_text(lines)
    (many / "rollouts/step-000001.tokens.json").write_text(json.dumps({i: f"w{i} " for i in range(v)}))
    page = visit(inspect(Inspect(run=many, out=tmp_path / "inspect.html")))
    page.wait_for_selector("body[data-ready]", timeout=60_000)
    assert page.locator(".row").count() < 40 and page.locator(".t").count() == t
    page.evaluate("document.querySelector('#list').scrollTop = 30000")
    page.wait_for_selector("#row520")
    moves = "const s = performance.now(); for (let i = 0; i < 50; i++) select(i * 7); return performance.now() - s"
    spent = page.evaluate(f"() => {{ {moves} }}")
    assert spent / 50 < 150  # ms; about 5 where nothing else runs
    page.keyboard.press("G")
    page.wait_for_selector("#row999[aria-selected=true]")
