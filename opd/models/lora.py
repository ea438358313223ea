"""Loading of the student for training, with a LoRA adapter if --lora-rank is set."""

import re
from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from opd.config.train import Train
from opd.core.disk import disk
from opd.core.errors import Refusal
from opd.models import adapters
from opd.models import load as models
from opd.models.sharding import whole_weights
from opd.models.source import ModelSource, locate


def trainable(
    config: Train, source: ModelSource, checkpoint: Path | None, device: torch.device
) -> PreTrainedModel | PeftModel:
    """Load the student, from its weights or a checkpoint, with an adapter if --lora-rank is set.

    A student that is an adapter itself is merged first.  Then no folder has the base of the new adapter, and
    `save_base` writes it into the run folder.
    """
    start, dtype = source, weights_dtype(config)
    if checkpoint is not None:
        start = locate(str(checkpoint), field="student", trust_remote_code=config.trust_remote_code)
        if config.lora_rank and start.base is not None:
            adapted = models.load_adapter(start, field="student", dtype=dtype, device=device)
            return _with_base(adapted, start.base)
    model = models.load(start, field="student", dtype=dtype, device=device)
    if not config.lora_rank or checkpoint is not None:
        return model
    adapted = with_adapter(model, config)
    return _with_base(adapted, source if source.base is None else ModelSource(str(_base_folder(config))))


def with_adapter(model: PreTrainedModel, config: Train) -> PeftModel:
    """Add a new adapter to a model.  Raises Refusal if it has none of the layers."""
    adapter = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # only divided by the rank: a float will do
        lora_dropout=0.0,
        target_modules="all-linear" if config.lora_targets == "all-linear" else config.lora_targets.split(","),
        exclude_modules=_outside_text(model),
        task_type="CAUSAL_LM",
    )
    try:
        return cast(PeftModel, get_peft_model(model, adapter))
    except ValueError as error:
        raise Refusal(f"--lora-targets {config.lora_targets}: {error}") from error


def weights_dtype(config: Train) -> torch.dtype:
    """Return the dtype in which the student is loaded: trained weights are fp32, and peft keeps adapters in fp32."""
    frozen_base = config.lora_rank > 0 and config.precision == "bf16"
    return torch.bfloat16 if frozen_base else torch.float32


def _outside_text(model: PreTrainedModel) -> str | None:
    """Return a pattern of the modules of a multimodal model that text never reaches; None of a text model."""
    if model.config.get_text_config() is model.config:
        return None
    decoder = model.get_decoder()
    (name,) = (name for name, module in model.named_modules() if module is decoder)
    return rf"(?!{re.escape(name)}\.).*"


def _with_base(model: PeftModel, base: ModelSource) -> PeftModel:
    """Set where the base is, an id at its commit or an absolute path: peft too loads the checkpoint from anywhere."""
    settings, repository = model.active_peft_config, base.repository
    settings.base_model_name_or_path = base.folder if repository is None else repository.id
    settings.revision = None if repository is None else repository.revision
    return model


def _base_folder(config: Train) -> Path:
    """Return the folder of the merged weights under a run's adapter."""
    return Path(config.out).resolve() / adapters.BASE_FOLDER


def save_base(config: Train, student: torch.nn.Module, tokenizer: Tokenizer, accelerator: Accelerator) -> None:
    """Write the weights under the student's adapter into the run folder, if no other folder has them.

    Every process calls it, because sharded values are gathered; the main process writes.
    """
    model = accelerator.unwrap_model(student).model
    if not isinstance(model, PeftModel) or adapters.base_name(model) != str(_base_folder(config)):
        return
    weights = whole_weights(accelerator.unwrap_model(student), main=accelerator.is_main_process)
    if accelerator.is_main_process:
        named = {name.removeprefix("model."): x for name, x in weights.items()}
        with disk(f"writing {_base_folder(config)}"):
            adapters.save_base(model, named, tokenizer, _base_folder(config))
