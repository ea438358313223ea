"""Models and data sets of the hub: which names are ids, what is loaded of them, and what a missing one is told.

The hub is a cache laid out by `scripts/fake_hub.py`, or a server that answers as huggingface.co does.
"""

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file

import opd
from opd import cli
from opd.config.commands import Serve
from opd.config.data import Data
from opd.config.model_names import ChatEndpoint, ModelFiles, parse
from opd.config.plan import resolved
from opd.config.servers import Remote
from opd.core.errors import Refusal
from opd.data import hub
from opd.data.tasks.load import load
from opd.data.tasks.tables import read
from opd.models import load as models
from opd.models.remote.client import Client
from opd.models.remote.vllm_protocol import Server
from opd.models.source import EMBEDDED, locate
from opd.teachers import connect
from opd.teachers.remote import LogpTeacher
from opd.teachers.serve.server import _open
from scripts import fake_hub
from tests.tiny_models import logged, started, tiny

CPU = torch.device("cpu")
# Students and teachers of papers on on-policy distillation, as their hub ids are written.
MODELS = """
Qwen/Qwen3-0.6B Qwen/Qwen3-0.6B-Base Qwen/Qwen3-1.7B Qwen/Qwen3-1.7B-Base Qwen/Qwen3-4B Qwen/Qwen3-4B-Base
Qwen/Qwen3-4B-Instruct-2507 Qwen/Qwen3-8B Qwen/Qwen3-8B-Base Qwen/Qwen3-14B Qwen/Qwen3-32B Qwen/Qwen3-30B-A3B
Qwen/Qwen3-235B-A22B-Instruct-2507 Qwen/Qwen2.5-0.5B Qwen/Qwen2.5-0.5B-Instruct Qwen/Qwen2.5-1.5B-Instruct
Qwen/Qwen2.5-3B-Instruct Qwen/Qwen2.5-7B-Instruct Qwen/Qwen2.5-14B-Instruct Qwen/Qwen2.5-32B-Instruct
Qwen/Qwen2.5-Math-1.5B Qwen/Qwen2.5-Math-7B-Instruct Qwen/Qwen2.5-Coder-1.5B-Instruct Qwen/Qwen2-0.5B-Instruct
Qwen/Qwen1.5-0.5B-Chat Qwen/QwQ-32B meta-llama/Llama-3.2-1B meta-llama/Llama-3.2-1B-Instruct
meta-llama/Llama-3.2-3B-Instruct meta-llama/Llama-3.1-8B-Instruct meta-llama/Llama-3.3-70B-Instruct
meta-llama/Llama-2-7b-hf deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B deepseek-ai/DeepSeek-R1-Distill-Llama-8B
deepseek-ai/DeepSeek-R1-0528-Qwen3-8B deepseek-ai/DeepSeek-V3.1 mistralai/Mistral-7B-Instruct-v0.3
mistralai/Mixtral-8x7B-Instruct-v0.1 google/gemma-2-2b-it google/gemma-3-1b-it google/gemma-7b
microsoft/Phi-3.5-mini-instruct microsoft/phi-4 openai/gpt-oss-20b openai-community/gpt2-xl facebook/opt-1.3b
TinyLlama/TinyLlama-1.1B-Chat-v1.0 TinyLlama/TinyLlama_v1.1 HuggingFaceTB/SmolLM2-1.7B-Instruct
HuggingFaceTB/SmolLM3-3B allenai/OLMo-2-0425-1B-Instruct allenai/Llama-3.1-Tulu-3-8B EleutherAI/pythia-1.4b
JackFram/llama-68m ibm-granite/granite-3.3-2b-instruct tiiuae/Falcon3-1B-Instruct stabilityai/stablelm-2-1_6b
Skywork/Skywork-OR1-Math-7B open-thoughts/OpenThinker3-1.5B agentica-org/DeepScaleR-1.5B-Preview
"""
DATASETS = """
HuggingFaceH4/MATH-500 open-r1/DAPO-Math-17k-Processed AI-MO/NuminaMath-1.5 AI-MO/NuminaMath-CoT openai/gsm8k
BytedTsinghua-SIA/DAPO-Math-17k zwhe99/DeepMath-103K open-thoughts/OpenThoughts3-1.2M databricks/databricks-dolly-15k
HuggingFaceH4/aime_2024 math-ai/amc23 gsm8k agentica-org/DeepScaleR-Preview-Dataset nvidia/OpenMathReasoning
"""
IDS = MODELS.split()
REVISIONS = ["main", "v1.0", "refs/pr/1", "feature/x_y.z", "0123456789abcdef0123456789abcdef01234567"]


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, offline: HF_HOME of this process and of those that it starts."""
    home = tmp_path / "hf"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    return home


@pytest.fixture
def pair_of_ids(cache) -> tuple[str, str]:
    """Two ids with dots in the cache, the second one under a revision alone."""
    fake_hub.add(cache, "Qwen/Qwen3-0.6B", EMBEDDED / "student")
    fake_hub.add(cache, "Qwen/Qwen3-1.7B@v1.0", EMBEDDED / "teacher")
    return "Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B@v1.0"


def reason(name: str) -> str:
    """Why a model is refused, in one line."""
    with pytest.raises(Refusal) as caught:
        locate(name, field="student")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def refused(capsys, *args: object) -> str:
    assert cli.main([str(a) for a in args]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_the_list_of_ids_is_long_and_has_dots():
    assert len(set(IDS)) == len(IDS) >= 40 and sum("." in name for name in IDS) >= 20


@pytest.mark.parametrize("name", IDS)
def test_an_id_is_looked_up_in_the_cache(cache, tmp_path, name):
    assert hub.parse(name) == hub.Repository(name)
    assert f"{name} is not in the cache ({cache / 'hub'}), and HF_HUB_OFFLINE" in reason(name)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    commit = fake_hub.add(cache, name, tmp_path / "m")
    source = locate(name, field="student")
    assert source.repository == hub.Repository(name, commit) and (Path(source.folder) / "config.json").is_file()
    assert source == locate(f"{name}@{commit}", field="student")


@pytest.mark.parametrize("revision", REVISIONS)
def test_revisions_are_branches_tags_and_commits(cache, tmp_path, revision):
    assert hub.parse(f"Qwen/Qwen3-0.6B@{revision}") == hub.Repository("Qwen/Qwen3-0.6B", revision)
    assert f"Qwen/Qwen3-0.6B@{revision} is not in the cache" in reason(f"Qwen/Qwen3-0.6B@{revision}")


@pytest.mark.parametrize(
    "name",
    ["Qwen3-0.6B", "a/b/c", "./a/b", "/a/b", "~/b", "a/b/", "a/-b", "a/b.", "a/b--c", "a/b..c", "a/b@", "@main",
     "a b/c", *(f"owner/model{suffix}" for suffix in hub.WEIGHTS), "owner/model.GGUF"],
)  # fmt: skip
def test_what_is_no_id_is_a_path(cache, name):
    assert hub.parse(name) is None
    assert "no such folder or .gguf file" in reason(name) and "hub" not in reason(name).replace("a hub id looks", "")


def test_a_folder_wins_over_the_hub(pair_of_ids, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tiny(tmp_path / "Qwen" / "Qwen3-0.6B", seed=1)
    source = locate("Qwen/Qwen3-0.6B", field="student")
    assert (source.folder, source.repository) == (str(folder), None)


def test_a_name_that_may_be_a_folder_is_looked_for_in_both_places(cache, tmp_path, monkeypatch):
    """A run folder that is not there, from the right folder and from another one."""
    monkeypatch.chdir(tmp_path)
    assert "--student outputs/none: there is no such folder here, and outputs/none is not in the cache" in reason(
        "outputs/none"
    )
    (tmp_path / "outputs" / "nine").mkdir(parents=True)
    assert "there is no such folder here (did you mean outputs/nine?), and outputs/none is" in reason("outputs/none")


def test_files_and_runs_without_checkpoints_are_named(cache, tmp_path):
    file, run = tmp_path / "model.safetensors", tmp_path / "run"
    file.touch()
    assert "is a file; name the folder" in reason(str(file))
    run.mkdir()
    for name in ("config.json", "method.txt"):
        (run / name).write_text("{}")
    assert "this run has no checkpoint yet" in reason(str(run))


FLAGS = {
    "--student": "train --student MODEL --teacher embedded:teacher vopd",
    "--teacher": "train --student embedded:student --teacher MODEL vopd",
    "--route math": "train --student embedded:student --teacher embedded:teacher --route math=MODEL vopd",
    "--reference": "train --student embedded:student --teacher embedded:teacher --reference MODEL g-opd",
    "--teacher of texts": "train --student embedded:student --teacher MODEL omniopd",
    "--judge": "train --student embedded:student --teacher embedded:teacher --judge MODEL ropd",
    "doctor": "doctor --student MODEL --teacher embedded:teacher vopd",
    "variance": "variance --student embedded:student --teacher MODEL --methods vopd",
    "rock": "rock --student embedded:student --teacher embedded:teacher --rollouts 4 --context-filter --before MODEL",
    "eval": "eval --model MODEL --limit 2",
    "against": "eval --model embedded:student --against MODEL --limit 2",
    "prune": "prune --model MODEL --keep 0",
    "serve": "serve MODEL --port 0",
}


@pytest.mark.parametrize("flag", FLAGS)
def test_every_flag_takes_an_id(cache, tmp_path, monkeypatch, capsys, flag):
    """Missing, the flag's message names the cache; the same command goes past it once the id is there."""
    monkeypatch.chdir(tmp_path)
    more = {"train": "--steps 1 --batch 8 --max-new-tokens 8 --no-doctor --quiet --out run", "rock": "--out r.json"}
    more |= {"doctor": "--batch 4 --max-new-tokens 8", "variance": "--rollouts 8 --max-new-tokens 8"}
    more |= {"eval": "--max-new-tokens 8", "prune": "--out pruned"}
    text = FLAGS[flag].replace("MODEL", "Qwen/Qwen2.5-1.5B-Instruct@v1.0")
    name, *rest = text.split()
    prompts = [] if name in ("prune", "serve") else ["--prompts", "embedded:ledger-short"]
    if "--route" in rest:
        (tmp_path / "rows.jsonl").write_text('{"prompt": "Jan: +1", "answer": "1", "teacher": "math"}\n' * 8)
        prompts = ["--prompts", str(tmp_path / "rows.jsonl")]
    args = [name, *prompts, *more.get(name, "").split(), *rest]
    if flag == "doctor":
        assert cli.main(args) == 2
        assert "is not in the cache" in " ".join(capsys.readouterr().out.split())
    else:
        assert "Qwen/Qwen2.5-1.5B-Instruct@v1.0 is not in the cache" in refused(capsys, *args)
    assert not list(tmp_path.glob("run/*.json*"))
    fake_hub.add(cache, "Qwen/Qwen2.5-1.5B-Instruct@v1.0", EMBEDDED / "small")
    if flag == "serve":
        assert _open(Serve(model=rest[0])).rows
        return
    assert cli.main(args) == 0, capsys.readouterr()


def test_a_server_s_tokenizer_and_local_copy_may_be_ids(cache):
    """--teacher-tokenizer and --teacher-local, before the server is asked anything."""
    how = Remote(teacher_tokenizer="Qwen/Qwen3-8B@v1.0", teacher_local="Qwen/Qwen2.5-7B-Instruct")
    config = opd.Train(student="embedded:student", teacher="http://h", prompts="embedded:ledger-short", remote=how)
    student = connect.local_info(locate("embedded:student", field="student"), field="student")
    with pytest.raises(Refusal, match=r"--teacher-tokenizer Qwen/Qwen3-8B@v1.0: .* is not in the cache"):
        connect.server_info(Server(Client("http://h", how), "m", 8, {}), student, config)
    with pytest.raises(Refusal, match=r"--teacher-local Qwen/Qwen2.5-7B-Instruct: .* is not in the cache"):
        connect.verify_local_copy(LogpTeacher.__new__(LogpTeacher), [], config, CPU)


def test_the_revision_reaches_every_file(cache, tmp_path):
    """Two revisions that differ in weights, stop ids, template and shape: all is read of the one that is named."""
    old, new = tiny(tmp_path / "old", seed=1, layers=1), tiny(tmp_path / "new", seed=2, layers=2)
    (new / "chat_template.jinja").write_text("new")
    generation = json.loads((new / "generation_config.json").read_text())
    (new / "generation_config.json").write_text(json.dumps({**generation, "eos_token_id": [5, 6]}))
    for name, folder in (("a/b.c", old), ("a/b.c@v2", new)):
        fake_hub.add(cache, name, folder)
    source = locate("a/b.c@v2", field="model")
    text = models.tokenizer(source, field="model")
    assert text.chat_template == "new" and {5, 6} <= set(models.stop_ids(source, text))
    assert models.config(source, field="model").num_hidden_layers == 2
    weights = models.load(source, field="model", dtype=torch.float32, device=CPU).state_dict()
    wanted = load_file(new / "model.safetensors")
    assert all(torch.equal(weights[name], x) for name, x in wanted.items())
    assert locate("a/b.c", field="model") != source


def test_runs_from_ids_are_the_runs_from_folders(pair_of_ids, tmp_path):
    """In processes of their own, with a worker: the same numbers as of the embedded models."""
    rows = []
    for name, (student, teacher) in {"ids": pair_of_ids, "folders": ("embedded:student", "embedded:teacher")}.items():
        out = tmp_path / name
        flags = f"--student {student} --teacher {teacher} --prompts embedded:ledger-short --steps 2 --batch 4"
        started(["train", *flags.split(), "--max-new-tokens", "16", "--worker", "--out", str(out), "vopd"], 1)
        rows.append(logged(out))
    assert rows[0] == rows[1]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_pickles_are_refused(cache, tmp_path, name):
    folder = tiny(tmp_path / "m", seed=1)
    (folder / "model.safetensors").unlink()
    (folder / name).write_text("{}")
    if name.endswith(".json"):
        (folder / "pytorch_model-00001-of-00001.bin").touch()
    fake_hub.add(cache, "a/b.c", folder)
    for model in (str(folder), "a/b.c"):
        with pytest.raises(Refusal, match=rf"--model {model}: .*a pickle \(pytorch_model.*safetensors only") as caught:
            models.load(locate(model, field="model"), field="model", dtype=torch.float32, device=CPU)
        assert "\n" not in str(caught.value)


def test_a_folder_without_weights_is_refused(cache, tmp_path):
    folder = tiny(tmp_path / "m", seed=1)
    (folder / "model.safetensors").unlink()
    with pytest.raises(Refusal, match=r"there is no model\.safetensors in it"):
        models.load(locate(str(folder), field="model"), field="model", dtype=torch.float32, device=CPU)
    fake_hub.add(cache, "a/b.c", folder)
    with pytest.raises(Refusal, match=r"its weights are not here: .* HF_HUB_OFFLINE"):
        models.load(locate("a/b.c", field="model"), field="model", dtype=torch.float32, device=CPU)


@dataclass
class Hub:
    """A server that answers as huggingface.co does: models by id, each a folder for each revision."""

    folders: dict[str, dict[str, Path]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of a request."""
        self.asked.append(path)
        api = re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^?/]+))?.*", path)
        file = re.fullmatch(r"/(?:datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        name = (api or file)[1]
        if name not in self.folders:
            return 401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b""
        if file and name in self.gated:
            return 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}, b""
        revision = (api[3] if api else file[2]) or "main"
        commits = {sha(name, rev): rev for rev in self.folders[name]}
        rev = commits.get(revision, revision)
        if rev not in self.folders[name]:
            return 404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"}, b""
        folder, commit = self.folders[name][rev], sha(name, rev)
        files = [str(f.relative_to(folder)) for f in sorted(folder.rglob("*")) if f.is_file()]
        if api and api[2] == "tree":
            listed = [
                {"type": "file", "path": f, "size": (folder / f).stat().st_size, "oid": sha(name, f)} for f in files
            ]
            return 200, {"Content-Type": "application/json"}, json.dumps(listed).encode()
        if api:
            about = {"id": name, "sha": commit, "siblings": [{"rfilename": f} for f in files], "private": False}
            return 200, {"Content-Type": "application/json"}, json.dumps(about).encode()
        if file[3] not in files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
        return 200, {"ETag": f'"{sha(name, file[3])}"', "X-Repo-Commit": commit}, (folder / file[3]).read_bytes()


def sha(*parts: str) -> str:
    return hashlib.sha1("/".join(parts).encode()).hexdigest()


@contextlib.contextmanager
def answering(served: Hub) -> Iterator[str]:
    """The address of a hub."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, headers, body = served.answer(self.path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def online(cache, monkeypatch) -> Iterator[Hub]:
    served = Hub()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_XET_CACHE", str(cache / "xet"))
    with answering(served) as address:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        template = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + template)
        yield served


def test_a_model_is_downloaded_in_two_parts(online, tmp_path, monkeypatch):
    """First what says whether it fits, then the weights that transformers reads, and no others."""
    folder = tiny(tmp_path / "m", seed=1)
    for extra in ("consolidated.safetensors", "LICENSE.txt", "original/params.json", "onnx/model.safetensors"):
        (folder / extra).parent.mkdir(exist_ok=True)
        (folder / extra).write_text("{}")
    online.folders["a/b.c"] = {"main": tiny(tmp_path / "old", seed=2), "v1.0": folder}
    source = locate("a/b.c@v1.0", field="model")
    assert source.repository == hub.Repository("a/b.c", sha("a/b.c", "v1.0"))
    files = lambda: {str(f.relative_to(source.folder)) for f in Path(source.folder).rglob("*") if f.is_file()}
    small = files()
    assert {"config.json", "tokenizer.json"} <= small and not any("safetensors" in f or "/" in f for f in small)
    model = models.load(source, field="model", dtype=torch.float32, device=CPU)
    assert files() - small == {"model.safetensors"}
    wanted = load_file(folder / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], x) for name, x in wanted.items())
    # Again without a network; and the commit, once known, is asked of nobody.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("a/b.c@v1.0", f"a/b.c@{sha('a/b.c', 'v1.0')}"):
        assert locate(name, field="model") == source


def test_a_cache_that_another_program_filled_is_enough(online, tmp_path, monkeypatch):
    """It lists all files of the repository, and holds those that were needed."""
    folder = tiny(tmp_path / "m", seed=1)
    (folder / "LICENSE.txt").write_text("text")
    online.folders["a/b.c"] = {"main": folder}
    from huggingface_hub import snapshot_download

    there = snapshot_download("a/b.c", allow_patterns=["config.json", "model.safetensors", "tokenizer*"])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    source = locate("a/b.c", field="model")
    assert source.folder == there
    models.load(source, field="model", dtype=torch.float32, device=CPU)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("a/missing.b", "the hub has no a/missing.b: correct the name, or, if it is private, run `hf auth login`"),
        (
            "a/gated.b",
            "a/gated.b is gated on the hub and needs a token: accept its terms at https://huggingface.co/a/g",
        ),
        ("a/b.c@none", "the hub has a/b.c, but no revision 'none' of it"),
        ("a/gguf.c", "a/gguf.c has no config.json: it holds no model that transformers can read; of a GGUF"),
        ("outputs/none", "there is no such folder here (did you mean outputs/nine?), and the hub has no outputs/none"),
    ],
)
def test_the_hub_s_answer_is_the_reason(online, tmp_path, monkeypatch, name, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "nine").mkdir(parents=True)
    folder = tiny(tmp_path / "m", seed=1)
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model.gguf").touch()
    online.folders = {n: {"main": folder} for n in ("a/b.c", "a/gated.b")} | {"a/gguf.c": {"main": tmp_path / "gguf"}}
    online.gated = {"a/gated.b"}
    assert says in (line := reason(name)) and line.startswith(f"--student {name}: there is no such folder here")
    assert "HF_HUB_OFFLINE" not in line and "cannot be reached" not in line


def test_pickles_of_the_hub_are_not_downloaded(online, tmp_path):
    folder = tiny(tmp_path / "m", seed=1)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    online.folders["a/b.c"] = {"main": folder}
    with pytest.raises(Refusal, match=r"a pickle \(pytorch_model\.bin\).*refs/pr/1"):
        models.load(locate("a/b.c", field="model"), field="model", dtype=torch.float32, device=CPU)
    assert not any(path.endswith(".bin") for path in online.asked)


def test_a_hub_out_of_reach_is_told_from_one_that_is_switched_off(online, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "a/b.c is not in the cache" in (line := reason("a/b.c")) and "the hub cannot be reached (" in line


@pytest.mark.parametrize("name", DATASETS.split())
def test_data_sets_are_looked_up_under_their_id_and_revision(monkeypatch, name):
    found: list[tuple] = []

    def load_dataset(source, subset, split, revision):
        found.append((source, subset, split, revision))
        return datasets.Dataset.from_list([{"question": "2 + 3", "answer": "5"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    read(Data(source=name))
    read(Data(source=f"{name}@refs/pr/1.5", subset="main", split="test"))
    assert found == [(name, None, "train", None), (name, "main", "test", "refs/pr/1.5")]


@pytest.mark.parametrize("name", ["AI-MO/NuminaMath-1.5", "HuggingFaceH4/MATH-500"])
def test_a_missing_data_set_says_why(cache, monkeypatch, name):
    with pytest.raises(
        Refusal, match=f"--prompts {name}, .*there is no such file or folder here, and {name} is not in"
    ):
        read(Data(source=name))


@pytest.mark.parametrize(
    ("gated", "says"),
    [
        (True, "a/b.c' is a gated dataset on the Hub. Visit the dataset page at .*/datasets/a/b.c to ask for access;"),
        (False, "Dataset 'a/b.c' doesn't exist on the Hub or cannot be accessed;"),
    ],
)
def test_a_data_set_that_is_gated_or_missing(online, monkeypatch, tmp_path, gated, says):
    """As `datasets` says it, which drops the error of the hub."""
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", huggingface_hub.constants.ENDPOINT)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    if gated:
        online.folders["a/b.c"], online.gated = {"main": tmp_path}, {"a/b.c"}
    with pytest.raises(Refusal, match=says):
        read(Data(source="a/b.c"))


def test_a_data_folder_with_a_dot_keeps_its_name(tmp_path):
    folder = tmp_path / "NuminaMath-1.5"
    datasets.Dataset.from_list([{"question": "2 + 3", "answer": "5"}]).save_to_disk(folder)
    assert load(Data(source=str(folder))).name == "NuminaMath-1.5"


@pytest.mark.parametrize(
    ("name", "model", "url"),
    [
        ("openai:gpt-5", "gpt-5", ""),
        ("openai:Qwen/Qwen3-0.6B@http://h:1/v1", "Qwen/Qwen3-0.6B", "http://h:1/v1"),
        ("openai:Qwen/Qwen3-0.6B@v1.0@http://h:1/v1", "Qwen/Qwen3-0.6B@v1.0", "http://h:1/v1"),
        ("openai:claude-3-5-sonnet@20240620@HTTPS://h/v1", "claude-3-5-sonnet@20240620", "HTTPS://h/v1"),
        ("openai:m@https://user:key@h/v1", "m", "https://user:key@h/v1"),
        ("openai:m@h:1/v1", "m", "h:1/v1"),
    ],
)
def test_models_behind_endpoints_may_hold_an_at(name, model, url):
    endpoint = parse(name)
    assert isinstance(endpoint, ChatEndpoint) and (endpoint.model, endpoint.url) == (model, url)
    if url.startswith("http"):
        assert endpoint.host() == parse(url).host()


def test_routes_may_hold_revisions_and_signs_of_equality():
    config = opd.Train(student="a/b", teacher="c/d", prompts="p", route=("math=Qwen/Qwen3-0.6B@v1=a",))
    assert resolved(config).teachers == {"": ModelFiles("c/d"), "math": ModelFiles("Qwen/Qwen3-0.6B@v1=a")}


def test_fake_hub_is_a_command(tmp_path, capsys):
    fake_hub.main([str(tmp_path), "a/b.c=embedded:student", f"a/b.c@v1={EMBEDDED / 'teacher'}"])
    commits = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    root = tmp_path / "hub" / "models--a--b.c"
    assert [(root / "refs" / name).read_text() for name in ("main", "v1")] == commits
    for wrong in ([str(tmp_path)], [str(tmp_path), "a/b"], [str(tmp_path), f"a/b={tmp_path / 'none'}"]):
        with pytest.raises(SystemExit):
            fake_hub.main(wrong)
