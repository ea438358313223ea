"""Model and data folders that carry code, pickles and endless templates: nothing of them runs.

An attempt is lost if code of the folder ran (it would create a file), or if the command broke its promise.  The answer
"y" lies in the input of each command: a question that a library asks at a terminal would be answered with it.
"""

import itertools
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets  # noqa: F401  # before the forks
import torch
from safetensors.torch import load_file

import opd.analysis.evaluate
import opd.data.tasks.tables  # noqa: F401
from opd.models.source import EMBEDDED
from tests.campaigns import Counts
from tests.campaigns.commands import run_command

STUDENT = EMBEDDED / "student"
TEMPLATES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch FLAG') }}",
    "{{ (''|attr('__class__')) }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "{% include '/etc/passwd' %}",
    "{{ raise_exception('\x1b]0;title\x07<b>x</b>\nsecond line') }}",
    "{{ a.b.c }}",
    "{% if",
    "{{ 'a' * 3000000000 }}",
    "{{ '%3000000000d' % 1 }}",
    "{{ range(10 ** 12) | list }}",
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "{% set s = namespace(x='ab') %}{% for i in range(60) %}{% set s.x = s.x ~ s.x %}{% endfor %}{{ s.x }}",
)
ADAPTER = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


class Bomb:
    """A value whose unpickling creates a file."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.flag}",)


class Smith:
    """Makes hostile folders; code in them would create `flag`."""

    def __init__(self, root: Path) -> None:
        self.root, self.flag = root, root / "FLAG"
        self.code = (
            f"import os\nos.system('touch {self.flag}')\n"
            "from transformers import Qwen2Config as C, Qwen2ForCausalLM as M\n"
            "class EC(C):\n    model_type = 'evil'\nclass EM(M):\n    config_class = EC\nclass ET: pass\n"
        )

    def model(self, name: str, *without: str) -> Path:
        """Return a copy of the embedded student."""
        folder = self.root / name
        shutil.copytree(STUDENT, folder)
        for file in without:
            (folder / file).unlink()
        return folder

    def pickled(self, name: str, file: str, *, zipped: bool = True) -> Path:
        """Return a model whose weights are a pickle."""
        folder = self.model(name, "model.safetensors")
        self.pickle(folder / file, zipped=zipped)
        return folder

    def pickle(self, path: Path, *, zipped: bool = True) -> None:
        state = {"x": Bomb(self.flag), **load_file(STUDENT / "model.safetensors")}
        torch.save(state, path, _use_new_zipfile_serialization=zipped)

    def beside(self, name: str) -> Path:
        """Return a model with pickles beside its weights."""
        folder = self.model(name)
        for file in ("pytorch_model.bin", "optimizer.pt", "training_args.bin", "scheduler.pt"):
            self.pickle(folder / file)
        (folder / "memory.pt").write_bytes(pickle.dumps(Bomb(self.flag)))
        return folder

    def indexed(self, name: str, index: str, target: str) -> Path:
        """Return a model whose index of weights names another file."""
        folder = self.model(name, "model.safetensors")
        self.pickle(folder / "a.bin")
        weights = dict.fromkeys(load_file(STUDENT / "model.safetensors"), target)
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weights}))
        return folder

    def with_code(self, name: str, file: str, **settings: object) -> Path:
        """Return a model with settings that name code in the folder."""
        folder = self.model(name)
        (folder / "evil.py").write_text(self.code)
        (folder / "custom_generate").mkdir()
        (folder / "custom_generate" / "generate.py").write_text(self.code)
        old = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(old | settings))
        return folder

    def template(self, name: str, template: str) -> Path:
        """Return a model with a chat template."""
        folder = self.model(name)
        (folder / "chat_template.jinja").write_text(template.replace("FLAG", str(self.flag)))
        return folder

    def adapter(self, name: str, base: Path, **settings: object) -> Path:
        """Return an adapter of a base, with a pickle for its weights."""
        folder = self.root / name
        folder.mkdir()
        (folder / "adapter_config.json").write_text(
            json.dumps({**ADAPTER, "base_model_name_or_path": str(base), **settings})
        )
        self.pickle(folder / "adapter_model.bin")
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(STUDENT / file, folder)
        return folder

    def weighed(self, name: str, base: Path, **settings: object) -> Path:
        """Return an adapter with weights in safetensors."""
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        folder = self.root / name
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(STUDENT), LoraConfig(r=2, target_modules=["q_proj"])
        )
        model.save_pretrained(str(folder))
        saved = json.loads((folder / "adapter_config.json").read_text())
        saved |= {"base_model_name_or_path": str(base), **settings}
        (folder / "adapter_config.json").write_text(json.dumps(saved))
        return folder

    def gguf(self, name: str, content: bytes, beside: Path) -> Path:
        """Return a GGUF file in a folder with code."""
        folder = self.root / name
        shutil.copytree(beside, folder)
        (folder / "model.gguf").write_bytes(content)
        return folder / "model.gguf"

    def data(self, name: str, **files: bytes) -> Path:
        """Return a data folder."""
        folder = self.root / name
        folder.mkdir()
        for file, content in files.items():
            (folder / file.replace("_", ".", 1)).write_bytes(content)
        return folder


def folders(smith: Smith) -> dict[str, Callable[[str], Path]]:
    """Return the makers of the hostile models by their names."""
    code = {"AutoConfig": "evil.EC", "AutoModelForCausalLM": "evil.EM"}
    made: dict[str, Callable[[str], Path]] = {
        "pickle": lambda n: smith.pickled(n, "pytorch_model.bin", zipped=False),
        "zipped pickle": lambda n: smith.pickled(n, "pytorch_model.bin"),
        "pickle named safetensors": lambda n: smith.pickled(n, "model.safetensors"),
        "pickles beside": smith.beside,
        "index of pickles": lambda n: smith.indexed(n, "pytorch_model.bin.index.json", "a.bin"),
        "index of a pickle as safetensors": lambda n: smith.indexed(n, "model.safetensors.index.json", "a.bin"),
        "index with ../": lambda n: smith.indexed(n, "model.safetensors.index.json", "../../../etc/passwd"),
        "code of an unknown type": lambda n: smith.with_code(n, "config.json", auto_map=code, model_type="evil"),
        "code of a known type": lambda n: smith.with_code(n, "config.json", auto_map=code),
        "code of a tokenizer": lambda n: smith.with_code(
            n, "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.ET", "evil.ET"]}, tokenizer_class="ET"
        ),
        "code of generate": lambda n: smith.with_code(n, "generation_config.json", custom_generate=str(smith.root / n)),
        "adapter pickle": lambda n: smith.adapter(n, STUDENT),
        "adapter on a pickle": lambda n: smith.weighed(n, smith.pickled(f"{n}-base", "pytorch_model.bin")),
        "adapter on code": lambda n: smith.weighed(
            n, smith.with_code(f"{n}-base", "config.json", auto_map=code, model_type="evil")
        ),
        "adapter on code of a known type": lambda n: smith.weighed(
            n, smith.with_code(f"{n}-base", "config.json", auto_map=code)
        ),
        "adapter that names a library": lambda n: smith.weighed(
            n, STUDENT, auto_mapping={"base_model_class": "system", "parent_library": "os"}
        ),
        "adapter of adapters": lambda n: smith.weighed(n, smith.root / n),
        "GGUF of garbage beside code": lambda n: smith.gguf(
            n, b"GGUF" + bytes(range(200)), smith.with_code(f"{n}-code", "config.json", auto_map=code)
        ),
        "GGUF with huge counts": lambda n: smith.gguf(
            n, b"GGUF\3\0\0\0" + b"\xff" * 16 + bytes(64), smith.model(f"{n}-b")
        ),
        "empty config": lambda n: (smith.model(n), (smith.root / n / "config.json").write_text("null"))[0],
        "deep config": lambda n: (smith.model(n), (smith.root / n / "config.json").write_text("[" * 100_000))[0],
        "list as adapter config": lambda n: (
            smith.adapter(n, STUDENT),
            (smith.root / n / "adapter_config.json").write_text("[1]"),
        )[0],
    }
    made |= {f"template {t[:40]}": lambda n, t=t: smith.template(n, t) for t in TEMPLATES}
    rows = b'{"prompt": "1+1", "answer": "2"}\n'
    bomb = pickle.dumps(Bomb(smith.flag))
    card = b"---\nconfigs:\n- config_name: default\n  data_files: ../../../../etc/passwd\n---\n"
    return made | {
        "data with a script": lambda n: smith.data(n, data_py=smith.code.encode(), a_jsonl=rows),
        "data of pickles": lambda n: smith.data(n, train_pkl=bomb, train_pt=bomb),
        "data with ../": lambda n: smith.data(n, README_md=card),
        "data of nulls": lambda n: smith.data(n, train_jsonl=b"null\n"),
    }


def run(folder: Path, count: int, seed: int) -> Counts:
    """Name `count` hostile folders as model or prompts of `opd eval`."""
    smith, counts = Smith(folder), Counts()
    makers = list(folders(smith).items())
    random.Random(seed).shuffle(makers)
    for i, (name, make) in enumerate(itertools.islice(itertools.cycle(makers), count)):
        path = make(f"{i:03d}")
        model, prompts = (STUDENT, path) if name.startswith("data") else (path, "embedded:ledger-short")
        flags = f"--prompts {prompts} --limit 2 --max-new-tokens 4 --split {'train' if model is STUDENT else 'test'}"
        outcome = run_command(["eval", "--model", str(model), *flags.split()], typed=b"y\n" * 20)
        fault = "its code ran" if smith.flag.exists() else outcome.fault()
        smith.flag.unlink(missing_ok=True)
        counts.add(f"{name}: {outcome.output[-600:]}", fault, refused=outcome.code == 2)
    return counts
