"""Adapters of peft: apply to a base, merge into its weights, and save so that they load from any working directory."""

import shutil
import warnings
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch.nn import Embedding
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from opd.core.disk import follow_umask
from opd.core.errors import one_line
from opd.core.tensors import all_finite
from opd.data.hub import Missing

ADAPTER_CONFIG = "adapter_config.json"
BASE_FOLDER = "base"  # folder of a run with the weights under its adapter, if no other folder has them


def apply(folder: Path, base: PreTrainedModel, *, trainable: bool) -> PeftModel:
    """Load the adapter of a folder onto its base.  Raises Missing if it does not fit, and any error of peft."""
    rows = len(cast(Embedding, base.get_input_embeddings()).weight)
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        names = list(file.keys())
        saved = [file.get_slice(name).get_shape() for name in names if name.endswith("embed_tokens.weight")]
        if broken := [name for name in names if not all_finite(file.get_tensor(name))]:
            raise Missing(f"{broken[0]} holds numbers that are not finite; name a copy of the adapter without damage")
    if any(shape[0] != rows for shape in saved):
        raise Missing(
            f"the adapter has {saved[0][0]} rows of embeddings and its base {rows}; save the merged model by peft's "
            "merge_and_unload, and name that"
        )
    # peft only warns about layers that the adapter lacks, and keeps the base's.  It draws random numbers before reading
    # the saved weights: the fork preserves the state of the generator for a new adapter of the run.
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            model = PeftModel.from_pretrained(base, str(folder), is_trainable=trainable, local_files_only=True)
        except UserWarning as warning:
            raise Missing(f"the adapter does not fit its base: {one_line(warning)}") from warning
    kind = model.active_peft_config
    if kind.is_prompt_learning:
        raise Missing(f"a {kind.peft_type.value} adapter has no weights to merge; opd takes LoRA and others that merge")
    used = get_peft_model_state_dict(model, save_embedding_layers=False)
    if unused := sorted(name for name in names if str(model.base_model.prefix) in name and name not in used):
        raise Missing(f"the adapter does not fit its base: it has {unused[0]}, and the base has no such layer")
    return model


def merge(model: PeftModel) -> PreTrainedModel:
    """Return the base with the adapter added to its weights, all of which can be trained; raises Missing."""
    plain = cast(PreTrainedModel, model.get_base_model())
    head, embeddings = plain.get_output_embeddings(), plain.get_input_embeddings()
    adapted = any(isinstance(module, BaseTunerLayer) for module in (head, embeddings))
    if adapted and plain.config.get_text_config().tie_word_embeddings:
        raise Missing(
            "the adapter changes lm_head or the embeddings, which share one weight in its base, and merging would "
            "change both; name an adapter of the other layers"
        )
    return cast(PreTrainedModel, model.merge_and_unload(safe_merge=True)).requires_grad_(True)


def base_name(model: PeftModel) -> str:
    """Return the name of the model under an adapter, as `opd.models.locate` takes it."""
    settings = model.active_peft_config
    revision = f"@{settings.revision}" if settings.revision else ""
    return f"{settings.base_model_name_or_path}{revision}"


def save(model: PreTrainedModel | PeftModel, folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Write weights as a model folder, or as an adapter folder if the model is an adapter."""
    if isinstance(model, PeftModel):
        # The default compares the vocabulary with the base's, even on the hub; opd never resizes it.
        model.save_pretrained(str(folder), state_dict=weights, save_embedding_layers=False)
    else:
        model.save_pretrained(str(folder), state_dict=weights)


def save_base(model: PeftModel, weights: dict[str, torch.Tensor], tokenizer: Tokenizer, folder: Path) -> None:
    """Write the weights under an adapter, and the tokenizer, as a model folder that appears when it is complete.

    `weights` is the state dict of the complete model; under sharding, `model` holds only a part.
    """
    plain = cast(PreTrainedModel, model.get_base_model())
    prefix = str(model.base_model.prefix)  # "lora_": names of the adapter's tensors start with it
    under = {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): value
        for name, value in weights.items()
        if not any(part.startswith(prefix) for part in name.split("."))
    }
    part = folder.with_name(f".{folder.name}.part")
    for old in (part, folder):
        shutil.rmtree(old, ignore_errors=True)
    plain.save_pretrained(str(part), state_dict=under)
    tokenizer.save_pretrained(part)
    follow_umask(part)
    part.replace(folder)
