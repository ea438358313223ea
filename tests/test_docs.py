"""The documents are true: generated parts are fresh, commands parse, files exist, the README's example is a method."""

import importlib.util
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

import opd
from benchmarks.command import PARTS
from opd import cli
from opd.adapters import verl
from opd.cli import refusals
from opd.cli.parse import parse_flags
from opd.config import checks
from opd.config.commands import Serve, Size, Variance
from opd.config.data import Data
from opd.config.engine import Speaker
from opd.config.evaluate import Evaluate
from opd.config.plan import resolved
from opd.config.precision import assumed_gpu
from opd.config.rock import Context, Rock
from opd.config.servers import Remote
from opd.config.train import Train
from opd.core.sampling import Sampling
from opd.methods import METHODS
from opd.training import stops
from opd.training.doctor import fit
from tests.laws import test_method_laws
from tests.laws.test_method_laws import given, ids, world  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(f"docs/{p.name}" for p in sorted(ROOT.glob("docs/*.md"))))
TEXT = {name: (ROOT / name).read_text() for name in PAGES}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#([^)]+))?\)")
WRITTEN = [page for page in TEXT if page not in ("docs/methods.md", "docs/flags.md")]  # the others come from docstrings


def load(path: Path, name: str):
    """A file as a module."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


docs = load(ROOT / "scripts/docs.py", "scripts_docs")


def blocks(language: str) -> list[tuple[str, str]]:
    return [(page, body) for page, text in TEXT.items() for kind, body in FENCE.findall(text) if kind == language]


def texts(value: object) -> Iterator[str]:
    """The shell scripts and commands of a YAML document: texts, and lists of words."""
    if isinstance(value, dict):
        for child in value.values():
            yield from texts(child)
    elif isinstance(value, list) and value and all(isinstance(word, str) for word in value):
        yield shlex.join(value)
    elif isinstance(value, list):
        for child in value:
            yield from texts(child)
    elif isinstance(value, str):
        yield value


YAML = [(page, document) for page, body in blocks("yaml") for document in yaml.safe_load_all(body)]
YAML_TEXTS = [(page, text) for page, document in YAML for text in texts(document)]
SCRIPTS = [*blocks("bash"), *((page, text) for page, text in YAML_TEXTS if "\n" in text)]


def run_by(script: str) -> Iterator[str]:
    """The commands of ours, and of launchers and servers, that a script runs."""
    for line in script.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
        lexer.whitespace_split = True
        command: list[str] = []
        for word in lexer:
            if command and word in ("&", "&&", "|", "||", ";"):
                break
            if command or word in ("opd", "torchrun", "accelerate", "vllm"):
                command.append(word)
        if command:
            yield shlex.join(command)


def commands() -> list[tuple[str, str]]:
    """Every command of a shell block, a script, a YAML block, and of a code span that names its prompts."""
    out = []
    for page, body in blocks("sh"):
        lines = body.replace("\\\n", " ").splitlines()
        out += [(page, " ".join(line.partition("  #")[0].split())) for line in lines if line.strip()]
    out += [(page, line) for page, script in blocks("bash") + YAML_TEXTS for line in run_by(script)]
    for page, text in TEXT.items():
        spans = re.findall(r"`(opd (?:train|eval|rock) --[^`]+)`", FENCE.sub("", text))
        out += [(page, " ".join(span.split())) for span in spans if "--prompts" in span]
    return [(page, line) for page, line in out if "METHOD" not in line]


COMMANDS = commands()


def test_generated_parts_are_fresh():
    for path, text in docs.pages().items():
        assert path.read_text() == text, f"{path.name} is out of date: run python scripts/docs.py"


def test_a_row_of_a_table_is_one_line():
    for page in TEXT.keys() - {*WRITTEN}:
        for line in FENCE.sub("", TEXT[page]).splitlines():
            if line.startswith("|"):
                assert line.endswith("|"), f"{page}: {line}"


def test_every_flag_is_documented():
    for owner in (Train, Speaker, Remote, Serve, Evaluate, Size, Variance, Rock, Context, Data, Sampling):
        hidden = {"method", "data", "sampling", "remote", "speaker", "consistency"}
        assert docs.attributes(owner).keys() >= {f.name for f in fields(owner)} - hidden
    for name, factory in METHODS.items():
        told = docs.arguments(inspect.getdoc(factory).partition("Args:\n")[2])
        assert told.keys() == inspect.signature(factory).parameters.keys(), f"{name}: its Args say {sorted(told)}"


@pytest.mark.parametrize("name", METHODS)
def test_flags_of_a_method_are_not_those_of_the_run(name):
    """On one command line they would be taken for the run's.  `per_prompt` means the same to both."""
    run = {f.name for owner in (Train, Speaker, Remote, Data, Sampling) for f in fields(owner)} | {
        "preset",
        "also",
        "json",
    }
    assert not (inspect.signature(METHODS[name]).parameters.keys() - {"per_prompt"}) & run


class Parsed(Exception):
    """A command line that was understood."""


def parse(words: list[str], monkeypatch) -> object:
    """What the command line of `opd` makes of some words, just before it acts."""

    def stop(value, *more, **named):
        raise Parsed(value)

    for module, function in (
        ("training.train", "train"),
        ("analysis.evaluate", "evaluate"),
        ("analysis.variance", "variance"),
        ("analysis.rock_tokens", "rock"),
        ("analysis.report.page", "report"),
        ("analysis.report.inspect", "inspect"),
        ("analysis.rescore", "rescore"),
        ("teachers.serve.server", "serve"),
        ("cli.demo", "demo"),
        ("models.prune", "prune"),
        ("training.export", "export"),
        ("training.doctor.command", "doctor"),
        ("training.doctor.command", "estimate_memory"),
    ):
        monkeypatch.setattr(f"opd.{module}.{function}", stop)
    try:
        code = cli.main(words)
    except Parsed as done:
        return done.args[0]
    assert code == 0
    return None


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The README's method and the lists of `opd rock`, as files in the folder one works in."""
    (body,) = [body for page, body in blocks("python") if page == "README.md" and "def softsign" in body]
    (tmp_path / "softsign.py").write_text(body)
    for name in ("rocks.json", "rocks-control.json"):  # what `opd rock` would have left there
        (tmp_path / name).write_text('{"ids": [1]}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "softsign", raising=False)
    monkeypatch.setitem(sys.modules, "opd.methods.softsign", None)  # taken back at the end
    return load(tmp_path / "softsign.py", "opd.methods.softsign")


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_command_is_understood(page, line, monkeypatch, example, capsys):
    program, *words = shlex.split(line)
    while "=" in program:  # a variable of its environment
        program, *words = words
    if program in ("accelerate", "torchrun"):
        assert words[words.index("-m") + 1] == "opd", line
        program, words = "opd", words[words.index("-m") + 2 :]
    match Path(program).name:
        case "opd":
            parse(words, monkeypatch)
        case "make":
            assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
        case "python":
            if words[:2] == ["-m", "benchmarks"]:
                parse_flags(PARTS[words[2]].settings(), words[3:], prog="python -m benchmarks", description="")
            elif words[:2] == ["-m", "opd.adapters.verl"]:
                assert verl.main(words[2:]) == 0
            else:
                assert (ROOT / words[0]).is_file(), line
        case "bash":
            assert words[0] == "scripts/gpu_check.sh" and os.access(ROOT / words[0], os.X_OK), line
            parse_flags(PARTS["gpu"].settings(), words[1:], prog="gpu_check.sh", description="")
        case "vllm":
            flags = {word[2:].replace("-", "_") for word in words if word.startswith("--")}
            for known in json.loads((ROOT / "tests/vllm_contract.json").read_text()).values():
                takes = {*known["classes"]["EngineArgs"], *known["classes"]["FrontendArgs"]}
                assert words[0] == "serve" and flags <= takes, line
        case other:
            assert other in ("source", "pip", "patch", "pre-commit", "lm_eval", "sbatch", "sky"), (
                f"{page}: {line}: no test knows how to check it"
            )
    assert "opd:" not in capsys.readouterr().err


def test_no_command_of_a_script_is_overlooked():
    """Each `opd train` and the like, however it is started, is among the commands."""
    kinds = "(train|serve|eval|doctor|rock|variance)"
    for page in TEXT:
        bodies = [body for language in ("sh", "bash", "yaml") for where, body in blocks(language) if where == page]
        bodies = [re.sub(r"\s#.*|.*METHOD.*", "", body) for body in bodies]
        written = sum(len(re.findall(rf"\bopd(?:\s+\\\n)?[\s,-]+{kinds}\b", body)) for body in bodies)
        parsed = sum(bool(re.search(rf"\bopd {kinds}\b", line)) for where, line in COMMANDS if where == page)
        assert written <= parsed, f"{page}: {written} commands, {parsed} of them parsed"


RECIPES = [line for page, line in COMMANDS if page == "docs/clusters.md" and "opd train" in line]


VARIABLES = {"$SLURM_NNODES": 2, "$SKYPILOT_NUM_GPUS_PER_NODE": 8}  # of the jobs on that page


@pytest.mark.parametrize("line", RECIPES)
def test_a_recipe_passes_the_checks_of_a_run_and_fits_into_80_gib(line, monkeypatch, tmp_path):
    words, processes = shlex.split(line), 1
    load(ROOT / "scripts/memory_table.py", "memory_table").write_models(tmp_path)
    monkeypatch.chdir(tmp_path)
    for count in re.findall(r"--(?:nproc_per_node|nnodes)[ =]'?([\w$]+)", line):
        processes *= VARIABLES[count] if count in VARIABLES else int(count)
    with assumed_gpu():
        plan = resolved(parse(words[words.index("opd") + 1 :], monkeypatch))
        checks.check(plan)
        assert checks.warnings(plan) == []
        assert fit.estimated(plan, f"{processes}x80", prompt_tokens=512).fits


@pytest.mark.parametrize(("page", "script"), SCRIPTS)
def test_a_script_is_bash(page, script):
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, f"{page}: {done.stderr}"


def documents(page: str) -> dict[str, dict]:
    """The YAML documents of a page by their kind, or by their name if they have none."""
    return {document.get("kind") or document.get("name"): document for where, document in YAML if where == page}


def options(words: list[str]) -> dict[str, str]:
    """The flags of torchrun that are written --name=value."""
    launcher = words[: words.index("-m")]
    return dict(word[2:].split("=", 1) for word in launcher if word.startswith("--"))


def test_the_job_of_kubernetes_holds_together():
    service, job = (documents("docs/clusters.md")[kind] for kind in ("Service", "Job"))
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    flags, name = options(container["command"]), job["metadata"]["name"]
    assert (service["apiVersion"], job["apiVersion"]) == ("v1", "batch/v1")
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"] and spec["completionMode"] == "Indexed"
    assert flags["rdzv_endpoint"].split(":")[0] == f"{name}-0.{pod['subdomain']}"
    assert spec["completions"] == spec["parallelism"] == int(flags["nnodes"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(flags["nproc_per_node"])
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy allows no other
    for rule in spec["podFailurePolicy"]["rules"]:
        assert rule.keys() - {"action"} in ({"onExitCodes"}, {"onPodConditions"})
        assert rule.get("onExitCodes", {}).get("containerName", container["name"]) == container["name"]
    codes = {rule["action"]: rule["onExitCodes"]["values"] for rule in spec["podFailurePolicy"]["rules"][1:]}
    assert codes == {"Ignore": [stops.OUT_OF_TIME], "FailJob": [refusals.CODE]}
    variables = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert int(variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_the_task_of_skypilot_has_what_it_needs():
    task = documents("docs/clusters.md")["opd-8b"]
    assert task.keys() <= {"name", "num_nodes", "resources", "file_mounts", "envs", "setup", "run"}  # of SkyPilot's
    assert task["resources"].keys() <= {"accelerators", "use_spot", "disk_size", "job_recovery"}
    assert task["resources"]["job_recovery"]["max_restarts_on_errors"] > 0
    (line,) = run_by(task["run"])
    out = line.split(" --out ")[1].split()[0]
    assert any(Path(out).is_relative_to(mount) for mount in task["file_mounts"]) and "--resume auto" in line


def test_inline_commands_exist():
    for page in WRITTEN:
        text = TEXT[page]
        for target in re.findall(r"`make (\w+)", text):
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"{page}: make {target}"
        for name in re.findall(r"`opd ([a-z]+)[ `]", text):
            assert f"  opd {name}" in cli.USAGE, f"{page}: opd {name}"


def slug(heading: str) -> str:
    """The anchor of a heading."""
    return re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-")


def test_links_and_named_files_exist():
    for page, text in TEXT.items():
        for target, anchor in LINK.findall(text):
            if target.startswith(("http://", "https://")):
                continue
            path = (ROOT / page).parent / target
            assert path.exists(), f"{page}: {target}"
            headings = re.findall(r"^##+ (.*)", path.read_text(), re.MULTILINE) if anchor else []
            assert not anchor or anchor in map(slug, headings), f"{page}: {target}#{anchor}"
        for name in re.findall(r"`((?:opd|tests|scripts|docs|runs)/[\w/.-]+)`", text):
            assert (ROOT / name).exists(), f"{page}: {name}"


def test_named_tests_exist():
    source = "".join((ROOT / f"tests/analysis/test_{name}.py").read_text() for name in ("exact", "variance"))
    named = re.findall(r"`(test_\w+)`", TEXT["docs/estimators.md"])
    assert len(named) > 10
    assert all(f"def {name}(" in source for name in named), [x for x in named if f"def {x}(" not in source]


def test_the_tree_of_the_readme_is_the_package():
    (tree,) = [body for page, body in blocks("") if page == "README.md"]
    told = set(re.findall(r"^  (\S+/)", tree, re.MULTILINE))
    there = {f"{p.name}/" for p in (ROOT / "opd").iterdir() if p.is_dir() and any(p.glob("*.py"))}
    assert told == there, f"README.md, 'What is where': missing {there - told}, gone {told - there}"


def test_the_python_twin_is_the_command(monkeypatch):
    """The README's Train(...) equals what its command line makes."""
    (body,) = [body for page, body in blocks("python") if page == "README.md" and "opd.Train" in body]
    (line,) = [line for page, line in COMMANDS if page == "README.md" and "outputs/mine vopd-topk" in line]
    run = parse(shlex.split(line)[1:], monkeypatch)
    seen = []
    monkeypatch.setattr("opd.training.train.train", seen.append)
    exec(body, {})
    same = {f.name for f in fields(Train)} - {"out"}
    assert [f for f in same if getattr(run, f) != getattr(seen[0], f)] == [] and str(run.out) == str(seen[0].out)


LAWS = {
    name: law
    for name, law in vars(test_method_laws).items()
    if name.startswith("test_") and {"m"} < set(inspect.signature(law).parameters) <= {"m", "world", "ids", "given"}
}


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_the_readmes_method_obeys_the_law(law, example, request, float64):
    values = {name: request.getfixturevalue(name) for name in inspect.signature(law).parameters if name != "m"}
    law(example.softsign(2.0), **values)


def test_the_readmes_method_on_the_command_line(example, monkeypatch, capsys):
    (line,) = [line for page, line in COMMANDS if page == "README.md" and "softsign:softsign" in line]
    run = parse(shlex.split(line)[1:], monkeypatch)
    assert repr(run.method) == repr(example.softsign(2.0))
    assert cli.main([*shlex.split(line)[1:-1], "0"]) == 2
    assert "scale=0.0: softsign needs scale > 0" in capsys.readouterr().err


def test_versions_agree():
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert f"## {version}" in TEXT["CHANGELOG.md"] and f"{{{version}}}" in TEXT["README.md"]
    assert opd.Refusal
