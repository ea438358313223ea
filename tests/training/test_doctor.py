"""The doctor on real models with planted faults: each is found, a healthy pair has none, no number moves."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import opd
from opd import cli
from opd.config.data import Data
from opd.config.servers import Remote
from opd.config.train import Train
from opd.core.errors import Refusal
from opd.core.sampling import Sampling
from opd.methods import METHODS
from opd.models import load as models
from opd.models.source import EMBEDDED
from opd.rollouts.engines.hf import HFEngine
from opd.training.doctor import fit
from opd.training.doctor.command import doctor
from opd.training.doctor.findings import alarming, errors
from opd.training.doctor.settings import head_pass_backend

ROOT = Path(__file__).resolve().parents[2]


def healthy(**changes) -> Train:
    whole = Train(
        student="embedded:student",
        teacher="embedded:teacher",
        prompts="embedded:ledger-short",
        method=METHODS["vopd"](),
        batch=8,
        steps=4,
        sampling=Sampling(max_new_tokens=64),
        lr=1e-3,
        quiet=True,
    )
    return replace(whole, **changes)


def copied(root: Path, who: str, *edits: Callable[[Path], object]) -> str:
    """An embedded model in a folder of its own, edited."""
    folder = root / who
    shutil.copytree(EMBEDDED / who, folder)
    for edit in edits:
        edit(folder)
    return str(folder)


def told(name: str, change: Callable[[dict], object]) -> Callable[[Path], object]:
    """Edit a json file of a model."""

    def edit(folder: Path) -> None:
        whole = json.loads((folder / name).read_text())
        change(whole)
        (folder / name).write_text(json.dumps(whole))

    return edit


def template(old: str, new: str) -> Callable[[Path], object]:
    """Edit the chat template."""

    def edit(folder: Path) -> None:
        file = folder / "chat_template.jinja"
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))

    return edit


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    """Edit the weights."""

    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def rows(root: Path, *lines: dict) -> str:
    """Prompts of one's own."""
    file = root / "prompts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


ASK = "Dan has 4 nuts. Jan: saves 4. Feb: buys 1. How many does Dan have?"
EOS = template("{{ m.content }}{{ eos_token }}", "{{ m.content }}")
SWAP = template("<assistant>{% endif %}", "<user>{% endif %}")
NO_BOS = template("{{ bos_token }}", "")


def stops_at(token: int) -> Callable[[Path], object]:
    return told("generation_config.json", lambda c: c.update(eos_token_id=token))


def shuffled(tokenizer: dict) -> None:
    ids = tokenizer["model"]["vocab"]
    ids["Sam "], ids["Roy "] = ids["Roy "], ids["Sam "]


def lower(tokenizer: dict) -> None:
    tokenizer["normalizer"] = {"type": "Lowercase"}


def uniform(w: dict[str, torch.Tensor]) -> None:
    w["lm_head.weight"] *= 1e-3


def overflow(w: dict[str, torch.Tensor]) -> None:
    """What saving in fp16 leaves of a large weight: 1e5 is inf there."""
    w["model.embed_tokens.weight"][30:] *= 1e7
    for name in w:
        w[name] = w[name].half()


def looping(w: dict[str, torch.Tensor]) -> None:
    """The next token depends on the last one alone, and is sure: it runs in circles."""
    for name in w:
        if "o_proj" in name or "down_proj" in name:
            w[name] *= 0
    w["model.norm.weight"] *= 50
    w["lm_head.weight"][2] *= 0


def loud(w: dict[str, torch.Tensor]) -> None:
    w["lm_head.weight"].copy_(w["lm_head.weight"].roll(7, 0) * 3)


def low(patch) -> None:
    """A loader that keeps the student's weights as a bf16 checkpoint has them."""
    load = models.load
    cut = lambda source, *, field, dtype, device: load(
        source, field=field, dtype=torch.bfloat16 if field == "student" else dtype, device=device
    )
    patch.setattr(models, "load", cut)


def stale(patch) -> None:
    """An engine whose weights were not brought up to date."""

    def engine(model, *rest):
        import copy

        other = copy.deepcopy(model)
        with torch.no_grad():
            for p in other.parameters():
                p.mul_(1.02)
        return HFEngine(other, *rest)

    patch.setattr("opd.training.build_teachers.HFEngine", engine)


def both(root: Path, *edits: Callable[[Path], object]) -> dict[str, str]:
    return {who: copied(root, who, *edits) for who in ("student", "teacher")}


WRONG = {"question": ASK, "answer": "12", "response": "<plan>Jan: +4\n<work>4+4=8\n<check>8-4=4\n<answer>8"}
RIGHT = {**WRONG, "answer": "8"}

# fault -> (level, check that finds it, what it changes in a healthy run; patches where no flag or file can plant it)
FAULTS: dict[str, tuple[str, str, Callable]] = {
    "shuffled vocabulary": (
        "error", "opening",
        lambda root, patch: {"teacher": copied(root, "teacher", told("tokenizer.json", shuffled))},
    ),
    "wrong stop token in both models": ("warning", "turn end", lambda root, patch: both(root, stops_at(70))),
    "student and teacher stop elsewhere": (
        "warning", "eos", lambda root, patch: {"student": copied(root, "student", stops_at(70))},
    ),
    "no stop token in the chat template": ("warning", "turn end", lambda root, patch: both(root, EOS)),
    "no BOS in the chat template": ("warning", "bos", lambda root, patch: both(root, NO_BOS)),
    "teacher's chat template swapped": (
        "warning", "teacher prompt", lambda root, patch: {"teacher": copied(root, "teacher", SWAP)},
    ),
    "other chat templates": (
        "warning", "chat template", lambda root, patch: {"teacher": copied(root, "teacher", SWAP)},
    ),
    "tokenizer that loses text": (
        "error", "round trip", lambda root, patch: both(root, told("tokenizer.json", lower)),
    ),
    "uniform teacher": (
        "error", "uniform", lambda root, patch: {"teacher": copied(root, "teacher", weights(uniform))},
    ),
    "untrained student": (
        "warning", "uniform", lambda root, patch: {"student": copied(root, "student", weights(uniform))},
    ),
    "teacher is the student": ("error", "distance", lambda root, patch: {"teacher": copied(root, "student")}),
    "teacher of another language": (
        "warning", "distance", lambda root, patch: {"teacher": copied(root, "teacher", weights(loud))},
    ),
    "teacher overflowed in fp16": (
        "error", "opening", lambda root, patch: {"teacher": copied(root, "teacher", weights(overflow))},
    ),
    "student overflowed in fp16": (
        "error", "opening", lambda root, patch: {"student": copied(root, "student", weights(overflow))},
    ),
    "student's weights in bf16": ("error", "precision", lambda root, patch: low(patch) or {}),
    "engine with stale weights": ("warning", "sampler", lambda root, patch: stale(patch) or {}),
    "memory over budget": (
        "error", "memory", lambda root, patch: patch.setattr(fit, "free_bytes", lambda device: 10 << 20) or {},
    ),
    "prompt beyond the context": (
        "error", "opening", lambda root, patch: {"prompts": rows(root, RIGHT, {**RIGHT, "question": ASK * 40})},
    ),
    "truncated responses": ("warning", "stops", lambda root, patch: {"sampling": Sampling(max_new_tokens=12)}),
    "student that repeats itself": (
        "warning", "repetition", lambda root, patch: {"student": copied(root, "student", weights(looping))},
    ),
    "student that never stops": (
        "warning", "stops", lambda root, patch: {"student": copied(root, "student", weights(looping))},
    ),
    "verifier that never fires": (
        "warning", "verifier",
        lambda root, patch: {"prompts": rows(root, *[WRONG] * 4), "data": Data(verifier="numeric")},
    ),
    "verifier that always fires": (
        "warning", "verifier",
        lambda root, patch: {
            "prompts": rows(root, *[RIGHT] * 4), "data": Data(verifier="tests.training.test_doctor:always_right"),
        },
    ),
    "outcomes without a verifier": (
        "error", "method",
        lambda root, patch: {
            "prompts": rows(root, RIGHT), "data": Data(verifier="none"), "method": METHODS["scope"](),
        },
    ),
    "peers without a verifier": (
        "error", "method",
        lambda root, patch: {
            "prompts": rows(root, RIGHT), "data": Data(verifier="none"), "method": METHODS["sdpo"](), "teacher": "",
        },
    ),
    "groups of one": ("warning", "method", lambda root, patch: {"method": METHODS["scope"](per_prompt=1)}),
    "data without responses": (
        "error", "method",
        lambda root, patch: {
            "prompts": rows(root, {"question": ASK, "answer": "9"}),
            "method": METHODS["gkd"](other="response", share=0.5),
        },
    ),
    "LoRA's learning rate for all weights": ("warning", "learning rate", lambda root, patch: {"lr": 1e-2}),
    "full learning rate for LoRA": ("warning", "learning rate", lambda root, patch: {"lr": 1e-5, "lora_rank": 4}),
    "biased sampling": (
        "warning", "settings", lambda root, patch: {"sampling": Sampling(temperature=0.7, max_new_tokens=64)},
    ),
}  # fmt: skip
WHOLE = {"settings", "opening", "eos", "chat template", "rows", "holes", "segmentation", "bos_token", "special tokens"}


def always_right(response: str, answer: str) -> float:
    return 1.0


def test_healthy_pair():
    found = doctor(healthy())
    assert not alarming(found), list(map(str, alarming(found)))
    assert {f.check for f in found} == {
        "tokens", "turn end", "prompt", "rendered", "round trip", "precision", "method", "learning rate", "length",
        "verifier", "head pass", "memory", "distance", "stops", "repetition", "sampler", "time",
    }  # fmt: skip


def test_a_gpu_without_triton(monkeypatch):
    accelerator = SimpleNamespace(device=torch.device("cuda"))
    session = SimpleNamespace(accelerator=accelerator, config=SimpleNamespace(chunk_mb=3072))
    said = []
    for there in (True, False):
        monkeypatch.setattr("opd.head.backend._triton", lambda there=there: there)
        said += head_pass_backend.__wrapped__(session)
    assert said[0].what == "triton sweeps the logits, 3072 MB of them at a time"
    assert said[1].level == "note" and said[1].do == "pip install 'opd[gpu]'"


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_found(fault, tmp_path, monkeypatch):
    level, check, plant = FAULTS[fault]
    found = doctor(healthy(**plant(tmp_path, monkeypatch)))
    hits = [f for f in found if f.check == check and f.level == level]
    assert hits, list(map(str, found))
    assert bool(errors(found)) == (level == "error"), list(map(str, errors(found)))
    for f in alarming(found):
        assert f.what and (f.check in WHOLE or (f.why and f.do)), f


def test_page_lists_the_faults_that_are_tested():
    text = (ROOT / "docs/doctor.md").read_text()
    listed = re.findall(r"^\| (.+?) \| `(.+?)` \| (\w+) \|", text, re.MULTILINE)
    assert [(fault, check, level) for fault, (level, check, _) in FAULTS.items()] == listed


def test_what_it_says_names_the_fault(tmp_path, monkeypatch):
    """Numbers and names, not only the kind of finding."""
    swapped = doctor(healthy(teacher=copied(tmp_path, "teacher", SWAP)))
    (prompt,) = [f for f in swapped if f.check == "prompt"]
    assert re.search(r"^-.*<assistant>$", prompt.detail, re.MULTILINE)
    assert re.search(r"^\+.*<user>$", prompt.detail, re.MULTILINE)
    student, teacher = [f.detail for f in swapped if f.check == "rendered"]
    assert student != teacher and student.startswith("<bos>") and student.endswith("<assistant>")
    (cut,) = [f for f in doctor(healthy(sampling=Sampling(max_new_tokens=12))) if f.check == "stops"]
    assert cut.do.startswith("raise --max-new-tokens (the context has room for 4") and "<plan>" in cut.detail
    found = doctor(healthy())
    (ends,) = [f for f in found if f.check == "stops"]
    budget = int(re.search(r"95 % within (\d+)", ends.what)[1])
    assert 20 <= budget <= 45  # the task's answers have 20 to 41 tokens


def test_run_prints_alarms_and_moves_no_number(tmp_path, capsys):
    runs = {on: opd.train(healthy(out=tmp_path / str(on), doctor=on, lr=1e-2, quiet=False)) for on in (True, False)}
    a, b = ((folder / "metrics.jsonl").read_bytes() for folder in runs.values())
    assert a == b
    said = capsys.readouterr().err
    assert said.count("warning: learning rate") == 1 and "✓" not in said and "ok:" not in said


def test_error_stops_the_run_before_anything_is_written(tmp_path, capsys):
    teacher = copied(tmp_path, "teacher", weights(uniform))
    flags = "--student embedded:student --prompts embedded:ledger-short --steps 1 --batch 4 --max-new-tokens 48 --quiet"
    words = [*flags.split(), "--teacher", teacher, "--out", str(tmp_path / "run"), "vopd"]
    assert cli.main(["train", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("opd: uniform: ") and said.count("\n") == 1 and "--no-doctor" in said
    assert not (tmp_path / "run").exists()
    assert cli.main(["train", "--no-doctor", *words]) == 0


def test_resumed_run_is_not_examined_again(tmp_path, monkeypatch):
    out = opd.train(healthy(out=tmp_path / "run", steps=2, save_every=1, doctor=False))
    shutil.rmtree(sorted((out / "checkpoints").iterdir())[-1])
    monkeypatch.setattr(fit, "free_bytes", lambda device: 10 << 20)  # the models fit, and the run does not
    opd.train(healthy(out=out, steps=2, save_every=1, resume=True))  # with another --doctor, too
    with pytest.raises(Refusal, match="memory"):
        opd.train(healthy(out=tmp_path / "new"))


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = "--student embedded:student --prompts embedded:ledger-short --max-new-tokens 48 --batch 4 --lr 1e-3 --quiet"
    assert cli.main(["doctor", *flags.split(), "--teacher", "embedded:teacher", "vopd-topk", "--k", "2"]) == 0
    out = capsys.readouterr().out
    assert "✓ tokens" in out and out.rstrip().endswith("training may start: nothing to mend")
    teacher = copied(tmp_path, "teacher", weights(uniform))
    assert cli.main(["doctor", "--json", *flags.split(), "--teacher", teacher, "vopd"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert {f["check"] for f in found if f["level"] == "error"} == {"uniform"} and len(found) > 12
    assert cli.main(["doctor", *flags.split(), "--teacher", teacher, "vopd"]) == 2
    out = capsys.readouterr().out
    assert "✗ uniform" in out and "do: " in out and "training cannot start: " in out
    assert not (tmp_path / "outputs").exists()


def test_each_of_several_teachers(tmp_path):
    """A column chooses the teacher; one of two is the student itself."""
    asked = rows(
        tmp_path, *({**RIGHT, "question": ASK.replace("4", str(i)), "teacher": "ab"[i % 2]} for i in range(10))
    )
    other = copied(tmp_path, "student")
    found = doctor(healthy(prompts=asked, route=("a=embedded:teacher", f"b={other}")))
    assert not errors(found)
    said = {f.what.partition(" is ")[0]: f.level for f in found if f.check == "distance"}
    assert said == {"KL(student || teacher a)": "ok", "KL(student || teacher b)": "warning"}


def test_teacher_behind_a_server(tmp_path):
    """Compared with its weights where they are named; its KL is known where it says log-probs of tokens alone."""
    from tests.teachers.test_remote_teachers import PLAIN, Proxy, serving

    with serving(EMBEDDED / "teacher") as (url, _):
        levels = {
            local: {f.check: f for f in doctor(healthy(teacher=url, remote=Remote(teacher_local=local)))}
            for local in ("", "embedded:teacher", "embedded:small")
        }
        with Proxy(url, lambda path, n: None, PLAIN) as proxy:
            tokens_alone = doctor(healthy(teacher=proxy.url, method=METHODS["opd"]()))
    with serving(EMBEDDED / "student") as (url, _), Proxy(url, lambda path, n: None, PLAIN) as proxy:
        itself = doctor(healthy(teacher=proxy.url, method=METHODS["opd"]()))
    assert levels[""]["server"].level == "note" and levels["embedded:teacher"]["server"].level == "ok"
    assert levels["embedded:small"]["opening"].level == "error" and "nats" in levels["embedded:small"]["opening"].what
    assert not alarming(tokens_alone) and {"distance", "finite"} & {f.check for f in tokens_alone} == {"distance"}
    assert {f.check for f in errors(itself)} == {"distance"}
