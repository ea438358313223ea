"""What a user can mend is one line and exit code 2: disk, optional packages, trackers, and numbers out of range."""

import ast
import math
import re
import shlex
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import opd
from opd.cli import main
from opd.cli.parse import flags_of
from opd.cli.train import TrainFlags
from opd.config.presets import spelled
from opd.core.errors import Refusal
from opd.core.types import Batch
from opd.methods import METHODS
from opd.models.source import EMBEDDED
from opd.training.guards import check_teacher

RUN = [
    "train", "--student", "embedded:student", "--teacher", "embedded:teacher", "--prompts", "embedded:ledger-short",
    "--steps", "1", "--batch", "2", "--max-new-tokens", "4", "--no-doctor", "--quiet",
]  # fmt: skip
PACKAGE = Path(opd.__file__).parent
BORDER = {
    "open", "mkdir", "write_text", "write_bytes", "read_text", "read_bytes", "mkdtemp", "import_module",
    "from_pretrained", "save_pretrained", "load_file", "save_file", "safe_open", "load_dataset", "load_from_disk",
}  # fmt: skip
GUARDS = {"disk", "foreign_errors", "reading", "fill", "suppress"}  # contexts in which an error becomes a line
# Sites outside a guard, by file and function, with the reason why no error of a user can reach them unseen.
CALLER, OWN = "every caller has the guard", "a file or module of the package"
ALLOWED = {
    "__init__.py:__dir__": OWN,
    "__init__.py:__getattr__": OWN,
    "analysis/evaluate.py:_is_saved": "`OutputFile.ours`: what cannot be read is no output of ours",
    "analysis/report/page.py:write": OWN,
    "analysis/report/static.py:draw": "`OutputFile.open`, which is a guard",
    "cli/demo.py:draw": "reads what the same command has just written",
    "cli/method_sources.py:listing": OWN,
    "cli/tools.py:_run": OWN,
    "config/rock.py:_is_rock_list": "`OutputFile.ours`: what cannot be read is no output of ours",
    "core/disk.py:check": "`OutputFile.ours`, called under a guard",
    "core/disk.py:flush_to_disk": "under `Run.checkpoint`",
    "core/disk.py:write": "`OutputFile.open`, which is a guard",
    "core/tensors.py:load_tensors": CALLER,
    "data/tasks/row_files.py:read_file": CALLER,
    "data/tasks/tables.py:_folder": CALLER,
    "data/verifiers/sandbox.py:_serve": "/dev/null",
    "head/onednn.py:is_faster": "/proc/cpuinfo, if it is a file",
    "methods/constructors.py:constructors": OWN,
    "models/adapters.py:apply": CALLER,
    "models/adapters.py:save": "under `Run.checkpoint`",
    "models/adapters.py:save_base": CALLER,
    "models/checkpoints.py:_digest": "under `Run.checkpoint`, or in `damage_of`, for which an error is damage",
    "models/checkpoints.py:seal_of": "in `damage_of`, for which an error is damage, or in `checkpoint.load`, a guard",
    "models/checkpoints.py:seal": "under `Run.checkpoint`",
    "models/load.py:_load_model": CALLER,
    "models/weight_files.py:require": CALLER,
    "models/remote/opd_protocol.py:pack_tokenizer": "a temporary folder",
    "models/remote/opd_protocol.py:unpack_tokenizer": CALLER,
    "rollouts/weight_sync/vllm_plugin.py:__iter__": "runs in vLLM's process, which reports its errors itself",
    "rollouts/worker/process.py:_load": "runs in the worker, whose errors the trainer reports",
    "training/checkpoint.py:_load": CALLER,
    "training/checkpoint.py:_teacher": CALLER,
    "training/checkpoint.py:_tensors": CALLER,
    "training/checkpoint.py:save": "under `Run.checkpoint`",
    "training/doctor/memory.py:free_bytes": "/sys/fs/cgroup, if it is a file",
    "training/rollout_source.py:take": "`RolloutSource.open` is no file",
    "training/run_folder.py:_write": CALLER,
    "training/run_lock.py:_acquire": CALLER,
    "training/run_lock.py:_me": "/proc, if it is a file",
    "training/train.py:_train": "`RolloutSource.open` is no file",
    "training/trainer.py:save": "under `Run.checkpoint`",
    "core/tensors.py:save_tensors": CALLER,
}


def sites(tree: ast.AST, guarded: bool = False, function: str = "") -> list[tuple[str, str]]:
    """Return (function, call) of each border call that stands in no guard."""
    out: list[tuple[str, str]] = []
    for node in ast.iter_child_nodes(tree):
        inside, name = guarded, function
        if isinstance(node, ast.FunctionDef):
            inside, name = False, node.name
        elif isinstance(node, ast.With):
            calls = [item.context_expr for item in node.items if isinstance(item.context_expr, ast.Call)]
            inside = guarded or any(called(call) in GUARDS for call in calls)
        elif isinstance(node, ast.Try) and node.handlers:
            inside = True
        elif isinstance(node, ast.Call) and called(node) in BORDER and not guarded:
            out.append((name, called(node)))
        out += sites(node, inside, name)
    return out


def called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def border() -> set[str]:
    return {
        f"{path.relative_to(PACKAGE)}:{function}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for function, _ in sites(ast.parse(path.read_text()))
    }


def test_every_site_at_the_border_is_guarded_or_listed_with_a_reason():
    """A new `open` without a guard, and an entry of the list without its site, both fail."""
    assert border() == set(ALLOWED)


@pytest.fixture
def no_models(monkeypatch):
    """End a run where its models would be opened."""

    def stop(*args: object) -> None:
        raise Refusal("the models are opened")

    monkeypatch.setattr("opd.training.train.open_session", stop)


def one_line(capsys, args: list[str]) -> str:
    assert main(args) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("opd: ")
    return line


NUMBERS = [flag for flag in flags_of(TrainFlags) if flag.kind in (int, float)]


@pytest.mark.parametrize("flag", NUMBERS, ids=[flag.name for flag in NUMBERS])
@pytest.mark.parametrize("value", ["-1", "0", "nan", "inf", "1e400"])
def test_every_number_is_used_or_refused_by_its_name(no_models, tmp_path, capsys, flag, value):
    line = one_line(capsys, [*RUN, "--out", str(tmp_path / "run"), flag.name, *[value] * (flag.count or 1), "opd-full"])
    refused = f"opd: {flag.name} " in line
    assert refused or line == "opd: the models are opened" or flag.name == "--limit"
    if value in ("-1", "nan") and flag.name != "--limit":
        assert refused, line


@pytest.mark.parametrize(
    "flag",
    [
        "--lr",
        "--temperature",
        "--loss-temperature",
        "--teacher-loss-temperature",
        "--weight-decay",
        "--lora-alpha",
        "--eval-temperature",
    ],
)
def test_infinite_settings_are_refused(no_models, tmp_path, capsys, flag):
    line = one_line(capsys, [*RUN, "--out", str(tmp_path / "run"), flag, "inf", "opd-full"])
    assert line == f"opd: {flag} inf: must be a finite number"


@pytest.mark.parametrize(
    "args, told",
    [
        (["--trackers", "nope"], "--trackers nope: unknown"),
        (["--out", "/proc/x"], "--out /proc/x"),
        (["--out", __file__], "is a file; name a folder"),
        (["--out", f"{__file__}/x"], "Not a directory"),
        (["--per-prompt", "-1"], "--per-prompt -1: must be at least 0"),
        (["--updates", "-1"], "--updates -1: must be at least 0"),
        (["--updates", "2"], "add --importance-cap 2"),
    ],
)
def test_mistakes_before_the_first_model_are_one_line(tmp_path, monkeypatch, capsys, args, told):
    monkeypatch.chdir(tmp_path)
    assert told in one_line(capsys, [*RUN, *args, "vopd"])


@pytest.mark.parametrize("surrogate", ["importance", "off-policy", "clipped"])
def test_pg_takes_the_surrogates_that_several_updates_need(no_models, tmp_path, capsys, surrogate):
    words = ["--updates", "2", "--out", str(tmp_path / "run"), "pg", "--surrogate", surrogate]
    assert one_line(capsys, [*RUN, *words]) == "opd: the models are opened"


def test_presets_are_spelled_as_a_shell_reads_them():
    words = shlex.split(spelled("embedded", "opsd"))
    assert words[words.index("--context-template") + 1] == "{context} {prompt}"


def test_a_tracker_that_is_not_installed_is_one_line(tmp_path, monkeypatch, capsys):
    """Accelerate has no state yet in a fresh process, and none is needed to tell."""
    monkeypatch.setattr("opd.training.build.get_available_trackers", list)
    line = one_line(capsys, [*RUN, "--out", str(tmp_path / "run"), "--trackers", "wandb", "vopd"])
    assert line == "opd: --trackers wandb: not installed; pip install wandb"


@pytest.mark.parametrize(
    "args",
    [
        ["eval", "--model", "embedded:student", "--prompts", "embedded:ledger-short", "--out", "/proc/x.jsonl"],
        ["prune", "--model", "embedded:student", "--keep", "0", "--out", "/proc/x"],
        ["demo", "--out", "/proc/x"],
        ["demo", "--seeds", "0"],
        ["eval", "--model", "embedded:student", "--prompts", "embedded:ledger-short", "--seed", "-1"],
        ["variance", *RUN[1:7], "--seed", "-1"],
        ["rock", *RUN[1:7], "--out", "rock.json", "--seed", "-1"],
    ],
    ids=lambda args: " ".join(args[:1] + args[-2:]),
)
def test_mistakes_of_other_commands_are_one_line(tmp_path, monkeypatch, capsys, args):
    monkeypatch.chdir(tmp_path)
    assert args[-2] in one_line(capsys, args)


def test_a_damaged_run_folder_is_one_line(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    line = one_line(capsys, ["report", str(tmp_path), "--out", str(tmp_path / "r.html")])
    assert "config.json: cannot be read" in line


TOKENIZER = AutoTokenizer.from_pretrained(EMBEDDED / "teacher")


def checked(name: str, teacher_logp: float) -> None:
    method, column = METHODS[name](), torch.full((1, 2), teacher_logp)
    batch = Batch(
        ids=torch.tensor([[5, 6]]),
        mask=torch.tensor([[True, False]]),
        group=torch.zeros(1, dtype=torch.long),
        source=torch.zeros(1, dtype=torch.long),
        stopped=torch.ones(1, dtype=torch.bool),
        outcome=torch.zeros(1),
        sampler_logp=torch.zeros(1, 2),
        teacher_logp=column,
    )
    check_teacher(batch, method, TOKENIZER)


@pytest.mark.parametrize("name", ["opd", "vopd", "vopd-topk", "opd-signlog", "iw-opd", "opd-full", "g-opd"])
def test_a_token_that_the_teacher_excludes_is_refused_where_the_loss_is_unbounded(name):
    with pytest.raises(Refusal, match=re.escape(f"probability 0 to token 5 ({TOKENIZER.decode([5])!r})")):
        checked(name, -math.inf)


@pytest.mark.parametrize("name", ["poweropd", "opd-clip", "opd-tanh", "reopold", "topd", "opd-tv", "opd-plus", "gkd"])
def test_a_token_that_the_teacher_excludes_is_trained_on_where_the_loss_is_bounded(name):
    checked(name, -math.inf)
    with pytest.raises(Refusal, match="no number as log-prob to token 5"):
        checked(name, math.nan)
