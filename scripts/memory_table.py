"""The table of docs/scaling.md: memory of each of eight GPUs with 80 GiB, by the estimate of `opd doctor`.

python scripts/memory_table.py    # print it
"""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from opd.config.plan import resolved
from opd.config.precision import assumed_gpu
from opd.config.train import Train
from opd.core.sampling import Sampling
from opd.training.doctor.alternatives import LORA_RANK
from opd.training.doctor.fit import TIGHT, peak
from opd.training.doctor.memory import bytes_text
from opd.training.setup import Setup, planned

PROCESSES, GIB = 8, 80
PROMPT, RESPONSE, BATCH = 512, 4096, 64
QWEN3 = {
    "1.7B": {"hidden_size": 2048, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 6144},
    "4B": {"hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32, "intermediate_size": 9728},
    "8B": {"hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "intermediate_size": 12288},
    "14B": {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "intermediate_size": 17408},
    "32B": {"hidden_size": 5120, "num_hidden_layers": 64, "num_attention_heads": 64, "intermediate_size": 25600},
}  # of the published config.json files; `SHARED` are equal in all
SHARED = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
}
TIED = ("1.7B", "4B")  # models whose LM head is their embeddings
STUDENTS = ("4B", "8B", "14B")
SHARDED = {"shard": True, "gradient_checkpointing": True}
COLUMNS = {
    "DDP": {},
    "`--shard`": {"shard": True},
    "`--shard --gradient-checkpointing`": SHARDED,
    f"DDP, `--lora-rank {LORA_RANK} --gradient-checkpointing`": {
        "lora_rank": LORA_RANK,
        "gradient_checkpointing": True,
    },
    f"`--shard --lora-rank {LORA_RANK} --gradient-checkpointing`": SHARDED | {"lora_rank": LORA_RANK},
    "`--shard --gradient-checkpointing`, teacher on a server": SHARDED,
    "`--shard --gradient-checkpointing`, rollouts on a server": SHARDED,
}


def table() -> str:
    """Return a line for each way to run, and a column for each student."""
    with tempfile.TemporaryDirectory() as folder, assumed_gpu():
        write_models(Path(folder))
        setups = {name: _setup(Path(folder), name) for name in STUDENTS}
        lora = {name: setup.changed(lora_rank=LORA_RANK) for name, setup in setups.items()}
    lines = [f"| | {' | '.join(f'{name} student' for name in STUDENTS)} |", "|---|" + "---|" * len(STUDENTS)]
    for title, settings in COLUMNS.items():
        cells = [_cell(_with(lora[x] if "lora" in title else setups[x], title, settings)) for x in STUDENTS]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_models(folder: Path) -> None:
    """Write the config.json of each Qwen3 model into a folder of its name on the hub."""
    for name, shape in QWEN3.items():
        path = folder / f"Qwen/Qwen3-{name}" / "config.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(SHARED | shape | {"tie_word_embeddings": name in TIED}))


def _setup(folder: Path, student: str) -> Setup:
    """Return the setup of a student with the teacher of 32B."""
    sampling = Sampling(max_new_tokens=RESPONSE)
    config = Train(
        student=str(folder / f"Qwen/Qwen3-{student}"),
        teacher=str(folder / "Qwen/Qwen3-32B"),
        prompts="none",
        batch=BATCH,
        sampling=sampling,
    )
    return planned(resolved(config), processes=PROCESSES, device=torch.device("cuda"), row=PROMPT + RESPONSE)


def _with(setup: Setup, title: str, settings: dict[str, object]) -> Setup:
    """Return a setup with the settings of a line of the table."""
    if "teacher on a server" in title:
        setup = setup.elsewhere(["teacher"])
    if "rollouts on a server" in title:
        settings = settings | {"speaker": replace(setup.config.speaker, engine="http://HOST:PORT")}
    return setup.changed(**settings)


def _cell(setup: Setup) -> str:
    """Return the peak of a setup, in bold type if it fits."""
    size = peak(setup)
    return f"**{bytes_text(size)}**" if size <= TIGHT * GIB * 2**30 else bytes_text(size)


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
