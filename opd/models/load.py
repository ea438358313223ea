"""Loading of models and of what belongs to them: tokenizer, configuration, stop ids, weights, head."""

import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from peft import PeftModel
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils.logging import disable_progress_bar

from opd.core.errors import Refusal, foreign_errors
from opd.data import hub, prompts
from opd.data.hub import Missing
from opd.head.onednn import Linear, use_onednn
from opd.head.vocabulary import Head
from opd.models import adapters
from opd.models.source import ModelSource

disable_progress_bar()  # loading bars drown the lines that matter


def tokenizer(source: ModelSource, *, field: str) -> Tokenizer:
    """Load the model's tokenizer; that of an adapter without one is its base's."""
    has_tokenizer = any((Path(source.folder) / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json"))
    if source.base is not None and not has_tokenizer:
        return tokenizer(source.base, field=field)
    with foreign_errors(f"--{field} {source}: its tokenizer does not load"):
        return AutoTokenizer.from_pretrained(source.folder, **source.options())


def config(source: ModelSource, *, field: str) -> PretrainedConfig:
    """Load the model's configuration; that of an adapter is its base's."""
    base_model = source.base_source()
    with foreign_errors(f"--{field} {source}: its config.json does not load"):
        _require_known_type(base_model)
        return AutoConfig.from_pretrained(base_model.folder, **base_model.options())


def _require_known_type(source: ModelSource) -> None:
    """Raise Missing if transformers has no class for the model and may not run the model's own."""
    settings = json.loads((Path(source.folder) / "config.json").read_text())
    kind = settings.get("model_type", "")
    if kind in CONFIG_MAPPING or (source.trust_remote_code and "auto_map" in settings):
        return
    if "auto_map" in settings:
        raise Missing(
            f"its model_type {kind!r} comes with Python code of its own; read it, then add --trust-remote-code"
        )
    if not kind:
        raise Missing("it names no model_type; save the model with transformers' save_pretrained")
    raise Missing(f"transformers {transformers.__version__} has no model_type {kind!r}; a newer one may")


def stop_ids(source: ModelSource, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the stop ids of a model; nothing else of its generation config is used."""
    try:
        config = GenerationConfig.from_pretrained(source.base_source().folder, local_files_only=True)
    except OSError:
        config = GenerationConfig()
    return prompts.stop_ids(config, tokenizer)


def load(source: ModelSource, *, field: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Load the weights in eval mode (no pass uses dropout); an adapter is merged into its base."""
    with foreign_errors(f"--{field} {source}: its weights do not load"):
        model = _load_model(source, dtype)
    use_onednn(model)
    return cast(PreTrainedModel, model.to(device).eval())  # type: ignore[arg-type]  # transformers' stub of `to`


def load_adapter(source: ModelSource, *, field: str, dtype: torch.dtype, device: torch.device) -> PeftModel:
    """Load a base with the adapter of a checkpoint, to train the adapter further."""
    with foreign_errors(f"--{field} {source}: its weights do not load"):
        model = _load_adapter_model(source, dtype, trainable=True)
    use_onednn(model)
    return model.to(device).eval()


def _load_model(source: ModelSource, dtype: torch.dtype) -> PreTrainedModel:
    """Load a model, its adapter merged.  Raises Missing, and any error of transformers and peft."""
    if source.base is not None:
        return adapters.merge(_load_adapter_model(source, dtype, trainable=False))
    _require_safetensors(source)
    options = {"dtype": dtype, "use_safetensors": True, "ignore_mismatched_sizes": True, **source.options()}
    auto_class: Any = _auto_class(AutoConfig.from_pretrained(source.folder, **source.options()))
    model, report = auto_class.from_pretrained(source.folder, output_loading_info=True, **options)
    _require_weights(report)
    _freeze_all_but_text(model)
    return cast(PreTrainedModel, model)


def _auto_class(config: PretrainedConfig) -> type:
    """Return the class that loads a model: the multimodal one if the files hold it or transformers has no other."""
    multimodal: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    is_named = multimodal is not None and multimodal.__name__ in (config.architectures or ())
    if is_named or (multimodal is not None and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def _require_weights(report: Mapping[str, Collection]) -> None:
    """Raise Missing if a model's files do not hold exactly its tensors; transformers gives the others random values."""
    shapes = [f"{name} {list(stored)} for {list(needed)}" for name, stored, needed in report["mismatched_keys"]]
    differences = {
        "lack": report["missing_keys"],
        "have another shape of": shapes,
        "hold what the model has no place for,": report["unexpected_keys"],
    }
    faults = [f"{fault} {_listed(sorted(names))}" for fault, names in differences.items() if names]
    if faults:
        raise Missing(f"its files {' and '.join(faults)}; correct the files or config.json, or name another model")


def _listed(names: Sequence[str]) -> str:
    """Return the first three names, and the number of the others."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _freeze_all_but_text(model: PreTrainedModel) -> None:
    """Freeze the parameters of a multimodal model that text never reaches, such as those of its vision tower."""
    if model.config.get_text_config() is not model.config:
        modules = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
        reached = {id(p) for module in modules if module is not None for p in module.parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in reached)


def _load_adapter_model(source: ModelSource, dtype: torch.dtype, *, trainable: bool) -> PeftModel:
    """Load a base with its adapter, not merged.  Raises Missing, and any error of transformers and peft."""
    assert source.base is not None
    _require_safetensors(source)
    return adapters.apply(Path(source.folder), _load_model(source.base, dtype), trainable=trainable)


def _require_safetensors(source: ModelSource) -> None:
    """Fetch the missing weight files of a model.  Raises Missing if its weights are not safetensors."""
    folder = Path(source.folder)
    stem = "model" if source.base is None else "adapter_model"
    index = folder / f"{stem}.safetensors.index.json"
    files = json.loads(index.read_text())["weight_map"].values() if index.is_file() else [f"{stem}.safetensors"]
    absent = sorted({name for name in files if not (folder / name).is_file()})
    present = [path.name for path in folder.iterdir()]
    if absent and source.repository is not None and not any(name.endswith(hub.PICKLES) for name in present):
        hub.fetch(source.repository, absent)
    elif absent:
        raise Missing(hub.no_safetensors(absent[0], present))


def base(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Return the transformers model, with adapters inside its layers."""
    return cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model


def backbone(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Return the part of a model below its LM head, with adapters inside its layers."""
    plain = base(model)
    if plain.base_model is not plain:
        return cast(PreTrainedModel, plain.base_model)
    if plain.get_decoder() is not plain:  # a multimodal model without a part for all modalities
        return backbone(plain.get_decoder())
    return next((child for child in plain.children() if isinstance(child, PreTrainedModel)), plain)


def head(model: PreTrainedModel | PeftModel) -> Head:
    """Return the output head as a value that shares storage with the model."""
    plain = base(model)
    linear = plain.get_output_embeddings()
    if type(linear) not in (torch.nn.Linear, Linear):
        raise Refusal(
            f"{type(plain).__name__}: its output head is a {type(linear).__name__}; opd needs a plain Linear "
            "(no adapter and no quantisation on lm_head)"
        )
    option = lambda name: getattr(plain.config.get_text_config(), name, None) or 0.0
    scale = (option("logit_scale") or 1.0) * (option("lm_head_multiplier") or 1.0)
    scale /= (option("logits_scaling") or 1.0) * (option("logits_mup_width_multiplier") or 1.0)
    return Head(linear.weight, linear.bias, scale, option("final_logit_softcapping"))


def device(name: str, *, field: str) -> torch.device:
    """Return a device of this machine by name.  Raises Refusal if there is none."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch raises either for a backend that it lacks
        raise Refusal(
            f"--{field} {name}: this machine has no such device; use cpu, or cuda:0 ... where GPUs are visible"
        ) from error
    return torch.device(name)


def small_threads(*loaded: PreTrainedModel | PeftModel) -> None:
    """Use one CPU thread if all models are small, because more threads would be slower."""
    size = max(model.num_parameters() for model in loaded)
    if size < 5_000_000 and all(m.device.type == "cpu" for m in loaded) and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
