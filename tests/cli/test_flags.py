"""The reading of the command line: which words are flags, what is missing, what was meant; tyro has the same flags."""

import ast
import inspect
import re
import shlex
import subprocess
import sys

import pytest

from benchmarks.command import PARTS
from opd import cli
from opd.cli.method_sources import flag_names, listing
from opd.cli.parse import TRL_FLAGS, flags_of, run_tyro, scan_words
from opd.cli.train import DoctorFlags, TrainFlags
from opd.config.commands import Demo, Export, Inspect, Prune, Report, Rescore, Serve, Size, Variance
from opd.config.evaluate import Evaluate
from opd.config.rock import Rock
from opd.core.errors import Refusal
from opd.methods import METHODS
from tests.test_docs import parse

MODELS = "--student embedded:student --teacher embedded:teacher"
TRAIN = f"{MODELS} --prompts embedded:ledger-short"
SETTINGS = (
    TrainFlags,
    DoctorFlags,
    Evaluate,
    Size,
    Variance,
    Rock,
    Report,
    Inspect,
    Rescore,
    Export,
    Prune,
    Serve,
    Demo,
)


def refused(capsys, words: str | list[str]) -> str:
    """Run a command line that is refused, and return its one line."""
    assert cli.main(shlex.split(words) if isinstance(words, str) else words) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and err.startswith("opd: ") and not out
    assert not re.search("[─-╿]", err) and "--help: unknown" not in err and "None" not in err
    return err.removeprefix("opd: ").removesuffix("\n")


def of_tyro(what: object, capsys) -> set[str]:
    """Return the flags that tyro's help of a dataclass or function lists."""
    with pytest.raises(SystemExit) as stop:
        run_tyro(what, ["--help"], prog="opd", description="")
    assert stop.value.code == 0
    rows = re.findall(r"^[│ ] (--[a-z][a-z0-9-]*)", capsys.readouterr().out, re.MULTILINE)
    return {*rows} - {"--help"}


@pytest.mark.parametrize(
    "what",
    [*SETTINGS, *METHODS.values(), *(part.settings() for part in PARTS.values())],
    ids=lambda what: what.__name__,
)
def test_tyro_has_the_same_flags(what, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert {flag.name for flag in flags_of(what) if not flag.positional} == of_tyro(what, capsys)


COMPLETE = {  # command -> words that leave nothing out, and what stands beside them
    "train": ([*shlex.split(TRAIN), "vopd"], ["--lr=3e-4", "--quiet", "--no-doctor"]),
    "doctor": ([*shlex.split(TRAIN), "vopd"], ["--json"]),
    "eval": (["--model", "embedded:teacher", "--prompts", "embedded:ledger"], ["--limit=3", "--json"]),
    "variance": (shlex.split(TRAIN), ["--methods=opd,vopd"]),
    "rock": (shlex.split(TRAIN), ["--top", "3", "--context-filter"]),
    "prune": (["--model", "embedded:teacher", "--keep", "0,2", "--out", "pruned"], ["--trust-remote-code"]),
    "export": (["RUN", "--out", "model"], ["--merge"]),
    "report": (["RUN"], ["--out=page.html"]),
    "inspect": (["RUN"], ["--step", "3"]),
    "rescore": (["RUN"], ["--method", "opd"]),
    "serve": (["MODEL"], ["--port=0"]),
}
METHOD = "METHOD (`opd methods` lists them)"
LEFT_OUT = [
    (command, where, form, beside)
    for command, (words, _) in COMPLETE.items()
    for where, word in enumerate(words)
    if word.startswith("--") or word in ("RUN", "MODEL", "vopd")
    for form in ("separate", "equals")
    for beside in (False, True)
]


@pytest.mark.parametrize(("command", "where", "form", "beside"), LEFT_OUT)
def test_what_is_missing_is_named(command, where, form, beside, capsys, monkeypatch):
    words, more = COMPLETE[command]
    left_out = {"vopd": METHOD}.get(words[where], words[where])
    rest = words[:where] + words[where + (2 if words[where].startswith("--") else 1) :]
    if form == "equals":
        rest = shlex.split(re.sub(r"(--[a-z-]+) (?!--)", r"\1=", shlex.join(rest)))
    line = refused(capsys, [command, *(more if beside else []), *rest])
    missing, _, example = line.partition("; for example: ")
    assert missing == f"{left_out} must be given"
    assert example.startswith(f"opd {command} ")
    assert parse(shlex.split(example)[1:], monkeypatch) is not None  # the example is a command line that works


@pytest.mark.parametrize("method", ["vopd-topk --k 3", "--preset embedded vopd", "--preset=embedded vopd-topk --k=3"])
def test_what_is_missing_is_named_beside_method_flags(method, capsys):
    assert refused(capsys, f"train {method}").startswith(
        "--student, --prompts and --teacher must be given; for example"
    )
    assert refused(capsys, f"train --student s --teacher t {method}").startswith("--prompts must be given")
    assert refused(capsys, f"doctor --prompts=p --teacher=t {method}").startswith("--student must be given")


def test_all_that_is_missing_is_named_at_once(capsys):
    assert refused(capsys, "train").startswith(f"--student, --prompts and {METHOD} must be given; ")
    assert refused(capsys, "prune").startswith("--model, --keep and --out must be given; ")
    assert refused(capsys, ["train", "--student", "", "--prompts=", "--teacher", "t", "vopd"]).startswith(
        "--student and --prompts must be given; "
    )
    # A method that has a teacher of its own needs no --teacher.
    assert refused(capsys, "train opsd").startswith("--student and --prompts must be given; ")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (f"train {TRAIN} --precision fp16 vopd", "--precision fp16: must be one of fp32, bf16 (did you mean bf16?)"),
        (
            f"train {TRAIN} --preset embeded vopd",
            "--preset embeded: must be one of none, paper, embedded (did you mean embedded?)",
        ),
        (f"train {TRAIN} vopd-topk --k ten", "--k ten: must be a whole number"),
        (f"train {TRAIN} vopd-topk --k=1.5", "--k 1.5: must be a whole number"),
        (f"train {TRAIN} --lr big vopd", "--lr big: must be a number"),
        (f"train {TRAIN} --betas 0.9 vopd", "--betas vopd: must be a number"),
        (f"train {TRAIN} vopd --betas 0.9", "--betas: takes 2 values, not 1"),
        (f"train {TRAIN} vopd --steps", "--steps: its value is missing"),
        (
            f"train {TRAIN} --system -be-brief vopd",
            "--system: its value is missing; write --system=-be-brief",
        ),
        (f"train {TRAIN} --system --lr 3 vopd", "--system: its value is missing"),
        (
            f"train {TRAIN} --quiet True vopd",
            "--quiet True: the flag takes no value; write --quiet for yes, --no-quiet for no",
        ),
        (
            f"train {TRAIN} --doctor=false vopd",
            "--doctor false: the flag takes no value; write --doctor for",
        ),
        (
            f"train {TRAIN} tropd --prefix no",
            "--prefix no: the flag takes no value; write --prefix for",
        ),
        (f"train {TRAIN} vopd gkd", "gkd: a run has one METHOD; add its terms by --also gkd:WEIGHT; `opd train vopd"),
        (f"train {TRAIN} --k 5 vopd-topk", "--k: is a flag of the method; write it after METHOD, as in vopd-topk --k"),
        (f"train {TRAIN} --beta=1 gkd", "--beta: is a flag of the method; write it after METHOD, as in gkd --beta=1"),
        ("eval --model m --prompts a.jsonl b.jsonl", "b.jsonl: belongs to no flag (--prompts takes one value); `opd"),
        (
            f"train {TRAIN} embedded:ledger vopd",
            "embedded:ledger: belongs to no flag, and METHOD is vopd",
        ),
        (f"train {TRAIN} VOPD", "VOPD: unknown method (did you mean vopd?)"),
        (
            f"train {TRAIN} vopd --studnet x",
            "--studnet: unknown flag (did you mean --student?); `opd train vopd",
        ),
        ("train --studnet x vopd", "--studnet: unknown flag (did you mean --student?); `opd train --help`"),
        ("train --learning_rate=3 vopd", "--learning_rate: unknown flag (opd calls it --lr); `opd train --help`"),
        ("train --report_to wandb vopd", "--report_to: unknown flag (opd calls it --trackers); `opd train --help`"),
        ("train --use_vllm vopd", "--use_vllm: unknown flag (opd calls it --engine vllm); `opd train --help`"),
        ("train --push_to_hub vopd", "--push_to_hub: unknown flag; `opd train --help`"),
        ("train -lr 3 vopd", "-lr: unknown flag (did you mean --lr?); `opd train --help`"),
        ("eval --model_name_or_path x", "--model_name_or_path: unknown flag (opd calls it --model); `opd eval --help`"),
        ("exact --seqs 3", "--seqs: unknown flag"),
        ("report --ot page.html run", "--ot: unknown flag (did you mean --out?); `opd report --help`"),
        ("serve m --hlep", "--hlep: unknown flag (did you mean --help?); `opd serve --help` lists the flags"),
        ("serve a b", "b: belongs to no flag; `opd serve --help`"),
        ("serve a a", "a: belongs to no flag; `opd serve --help`"),
        ("prune --model m --keep 1- --out o", "--keep 1-: '1-' is not a layer"),
        ("Train", "Train: unknown command (did you mean train?)"),
    ],
)
def test_a_mistake_is_one_line(words, line, capsys):
    assert refused(capsys, words).startswith(line)


@pytest.mark.parametrize("what", [*SETTINGS, *METHODS.values()], ids=lambda what: what.__name__)
def test_a_value_that_is_no_number_is_refused_in_plain_words(what):
    for flag in flags_of(what):
        if flag.kind in (int, float) and not flag.positional:
            with pytest.raises(Refusal, match=f"^{flag.name} ten: must be a (whole )?number$"):
                scan_words(what, [flag.name, "ten", *["1"] * ((flag.count or 1) - 1)])
        elif flag.kind is bool:
            with pytest.raises(Refusal, match=f"^{flag.name} True: the flag takes no value"):
                scan_words(what, [flag.name, "True"])


def test_words_are_read_as_tyro_reads_them():
    words = shlex.split(
        "--lr=3e-4 --betas -1 -.5 vopd --max_new_tokens 7 --also a:1 --also=b:2 --no-doctor --k 3 --system=--x"
    )
    read = scan_words(TrainFlags, [*shlex.split(TRAIN), *words])
    assert read.remaining == ("vopd", "--k", "3")
    flags = run_tyro(TrainFlags, read.own_words, prog="opd", description="")
    assert (flags.run.lr, flags.run.betas, flags.run.sampling.max_new_tokens) == (3e-4, (-1, -0.5), 7)
    assert (flags.also, flags.run.doctor, flags.run.data.system) == (("a:1", "b:2"), False, "--x")
    several = scan_words(Report, ["one", "--out", "page.html", "two"])
    assert [str(run) for run in run_tyro(Report, several.own_words, prog="opd", description="").runs] == ["one", "two"]


def test_flags_of_trl_lead_to_flags_of_ours():
    names = {flag.name for what in (TrainFlags, Evaluate) for flag in flags_of(what)}
    assert not {ours.split()[0] for meant in TRL_FLAGS.values() for ours in meant} - names
    assert not {f"--{name}" for name in TRL_FLAGS} & names


def test_a_factory_with_types_that_only_tyro_knows(tmp_path, monkeypatch, capsys):
    (tmp_path / "own_factories.py").write_text(
        "from enum import Enum\nimport opd\nfrom opd import Method\n"
        "class Side(Enum):\n    LEFT = 1\n    RIGHT = 2\n"
        "def one(side: Side, k: int = 3) -> Method:\n    return opd.vopd()\n"
        "def plain(k: int) -> Method:\n    return opd.vopd()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert parse(shlex.split(f"train {TRAIN} own_factories:one --side LEFT"), monkeypatch) is not None
    assert "--side" in refused(capsys, f"train {TRAIN} own_factories:one")
    assert "UP" in refused(capsys, f"train {TRAIN} own_factories:one --side UP")
    assert refused(capsys, f"train {TRAIN} own_factories:plain").startswith("--k must be given")
    assert cli.main(["methods", "own_factories:plain"]) == 2  # it has no defaults to show
    assert "--k must be given" in capsys.readouterr().err


def test_help_by_its_own_word(capsys):
    assert cli.main(["help"]) == 0 and "usage: opd COMMAND" in capsys.readouterr().out
    for words in (["help", "eval"], ["help", "train", "vopd-topk"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(words)
        assert stop.value.code == 0
    assert "--k" in capsys.readouterr().out


def test_a_method_of_a_module_is_explained(capsys):
    assert cli.main(["methods", "opd.methods:vopd_topk"]) == 0
    assert "--k (20)" in capsys.readouterr().out


def test_the_list_of_methods_is_that_of_the_code():
    docstrings = {name: inspect.cleandoc(ast.get_docstring(factory) or "") for name, factory in listing().items()}
    assert list(docstrings.items()) == [(name, inspect.getdoc(factory)) for name, factory in METHODS.items()]
    for name, factory in METHODS.items():
        assert flag_names(name) == [flag.name for flag in flags_of(factory)]


HEAVY = {"torch", "transformers", "peft", "accelerate", "datasets"}
WITHOUT_TORCH = [
    *("", "--help", "--version", "help", "methods", "methods vopdd", "trian"),
    "train --studnet x vopd",
    "train --student s --teacher t --prompts p --steps ten vopd",
    "train --student s --teacher t --prompts p voppd",
    "train --student s --teacher t --prompts p vopd-topk --kk 3",
    "exact vopd --kk 3",
    *COMPLETE,  # required flags are missing
    *(f"{command} --unknown x" for command in (*COMPLETE, "exact", "demo")),
]
WITH_TORCH = [  # a help shows the precision, which is bf16 where torch finds a GPU; methods are functions on tensors
    "methods vopd",
    "train --student s --teacher t --prompts p vopd-topk --k ten",
    *(f"{command} --help" for command in (*COMPLETE, "exact", "demo")),
]


@pytest.mark.parametrize(("commands", "allowed"), [(WITHOUT_TORCH, set()), (WITH_TORCH, {"torch"})])
def test_help_and_mistakes_import_no_heavy_library(commands, allowed):
    """Import times: torch 1.4 s, transformers 0.7 s, peft 2.4 s beside these."""
    code = (
        "import sys\nfrom opd.cli import main\n"
        "for words in sys.argv[1:]:\n"
        "    try:\n        main(words.split())\n    except SystemExit:\n        pass\n"
        "    print('imported', words, *sys.modules, sep='\\t')"
    )
    done = subprocess.run([sys.executable, "-c", code, *commands], capture_output=True, text=True, check=True)
    rows = [line.split("\t") for line in done.stdout.splitlines() if line.startswith("imported\t")]
    assert [words for _, words, *_ in rows] == commands
    for _, words, *imported in rows:
        assert {*imported} & HEAVY <= allowed, f"opd {words}"


def test_values_are_refused_before_what_they_are_for_is_imported():
    with pytest.raises(Refusal, match="--port x: must be a whole number"):
        scan_words(Serve, ["model", "--port", "x"])
