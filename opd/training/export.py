"""A checkpoint as a model folder that transformers, vLLM and `opd eval` read: `export(Export(...)) -> folder`."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from opd.config.commands import Export
from opd.config.train import Train
from opd.core.disk import OutputFolder
from opd.core.errors import Refusal
from opd.models import adapters, lora
from opd.models import load as models
from opd.models.checkpoints import STATE, checkpoints, damage_of, has_weights, newest_checkpoint
from opd.models.source import locate
from opd.models.student import Student
from opd.training.checkpoint import SHARDS, TRAINED, load_shards
from opd.training.run_folder import flat, load_json

SETTINGS = ("student", "lora_rank", "lora_alpha", "lora_targets", "precision", "trust_remote_code")


def export(config: Export) -> Path:
    """Write the student of a checkpoint, from its model folder or its shards, and return the folder.

    An adapter stays one, unless `merge` adds it to its base.  One process holds the whole student in main memory.
    """
    out = OutputFolder(path=config.out)
    out.check()
    checkpoint = _checkpoint(config)
    saved = dict(flat(load_json(config.run / "config.json")))
    if missing := [name for name in SETTINGS if name not in saved]:
        raise Refusal(f"RUN {config.run}: its config.json has no {missing[0]}; restore it from a copy")
    settings: dict[str, Any] = {name: saved[name] for name in SETTINGS}
    run = Train(prompts="", out=config.run, **settings)
    source = locate(run.student, field="student", trust_remote_code=run.trust_remote_code)
    tokenizer = models.tokenizer(source, field="student")
    model = lora.trainable(run, source, checkpoint if has_weights(checkpoint) else None, torch.device("cpu"))
    if (checkpoint / STATE / SHARDS).is_dir():
        student = Student(model)
        weights = get_model_state_dict(student, options=TRAINED)
        load_shards({"model": weights}, checkpoint)
        set_model_state_dict(student, weights, options=TRAINED)
    if config.merge:
        if not isinstance(model, PeftModel):
            raise Refusal("--merge: this run trains no adapter; leave it out")
        model = adapters.merge(model)
    with out.fill() as part:
        adapters.save(model, part, dict(model.state_dict()))
        tokenizer.save_pretrained(part)
    return config.out.expanduser()


def _checkpoint(config: Export) -> Path:
    """Return the newest whole checkpoint of a run, or that of --step.  Raises Refusal if it is missing or damaged."""
    there = checkpoints(config.run)
    if not there:
        raise Refusal(f"RUN {config.run}: it has no checkpoint; name the --out folder of an `opd train`")
    if config.step:
        if config.step not in there:
            raise Refusal(f"--step {config.step}: there are checkpoints of {', '.join(map(str, there))}")
        if damage := damage_of(there[config.step]):
            raise Refusal(f"--step {config.step}: the checkpoint is damaged: {damage}; name another")
        return there[config.step]
    newest, damaged = newest_checkpoint(config.run)
    assert newest is not None
    if damaged:
        raise Refusal(f"{'; '.join(damaged)}; name an earlier one by --step")
    return newest
