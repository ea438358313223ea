"""A run of TRL on the embedded models, for tests in this process and, as a script, below torchrun.

`python trl_run.py OUT OPTIONS` prints the log as JSON; OPTIONS are those of `trainer`, as JSON.  With `fsdp2` the
processes shard with Accelerate's FSDP2, which Accelerate itself never does on CPUs.
"""

import json
import os
import sys

import torch
from accelerate import DistributedType, PartialState
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DistillationConfig, DistillationTrainer

from opd.adapters.trl import MethodTrainer
from opd.config.data import Data
from opd.data.tasks.load import load
from opd.methods import METHODS
from opd.models.source import EMBEDDED

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


def prompts(count: int, source: str = "embedded:ledger") -> list[dict]:
    """Return the first prompts of an embedded task, as rows of a dataset for TRL."""
    task = load(Data(source=source))
    return [{"prompt": [dict(turn) for turn in p.messages]} for p in task.prompts[:count]]


def trainer(out: str, *, name: str, batch: int = 16, steps: int = 4, **settings) -> DistillationTrainer:
    """Return the trainer with a method of that name, or TRL's own for the name trl."""
    defaults = dict(max_completion_length=48, learning_rate=1e-4, lr_scheduler_type="constant", use_cpu=True)
    args = DistillationConfig(
        output_dir=out,
        per_device_train_batch_size=batch,
        max_steps=steps,
        logging_steps=1,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **{**defaults, **settings},
    )
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(EMBEDDED / who, dtype=torch.float32) for who in ("student", "teacher")
    )
    kind, method = (DistillationTrainer, {}) if name == "trl" else (MethodTrainer, {"method": METHODS[name]()})
    return kind(
        model=student,
        teacher_model=teacher,
        args=args,
        train_dataset=Dataset.from_list(prompts(64)),
        processing_class=AutoTokenizer.from_pretrained(EMBEDDED / "student"),
        **method,
    )


def history(run: DistillationTrainer) -> list[dict[str, float]]:
    """Train, and return the numbers of each step."""
    run.train()
    names = ("loss", "grad_norm", "entropy", "reverse_kl", "completions/mean_length")
    return [{name: row[name] for name in names if name in row} for row in run.state.log_history if "loss" in row]


def shard_on_cpus() -> None:
    """Let Accelerate take processes on CPUs for processes on GPUs: it gives FSDP to those alone."""
    os.environ.update(FSDP2)
    PartialState._prepare_backend = lambda self, *_, **__: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))


if __name__ == "__main__":
    out, options = sys.argv[1], json.loads(sys.argv[2])
    sharded = options.pop("fsdp2")
    if sharded:
        shard_on_cpus()
    run = trainer(out, use_cpu=not sharded, **options)
    rows = history(run)
    if run.accelerator.is_main_process:
        about = {"wrapper": type(run.model_wrapped).__name__, "processes": run.accelerator.num_processes}
        print(json.dumps({**about, "rows": rows}))
    torch.distributed.destroy_process_group()
