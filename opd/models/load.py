"""Loading of models and of what belongs to them: tokenizer, configuration, stop ids, weights, head."""

import contextlib
import json
import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from peft import PeftModel
from torch.distributed.fsdp import FSDPModule
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils.logging import disable_progress_bar

from opd.core.errors import Refusal, first_line, foreign_errors
from opd.data import prompts
from opd.data.hub import Missing
from opd.head.onednn import Linear, use_onednn
from opd.head.vocabulary import Head
from opd.models import adapters, weight_files
from opd.models.source import ModelSource

Model = PreTrainedModel | PeftModel

disable_progress_bar()  # loading bars drown the lines that matter


def tokenizer(source: ModelSource, *, field: str) -> Tokenizer:
    """Load the model's tokenizer; that of an adapter without one is its base's."""
    folder = Path(source.folder)
    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json"))
    if source.base is not None and not has_tokenizer:
        return tokenizer(source.base, field=field)
    if not any(re.search(r"token|vocab|\.model$", path.name) for path in folder.iterdir()):
        raise Refusal(
            f"--{field} {source}: its folder holds no tokenizer; copy the tokenizer files of the model that it was "
            "made from into it"
        )
    config(source, field=field)  # transformers reads it for the tokenizer, too, and its errors belong to it
    with foreign_errors(f"--{field} {source}: its tokenizer does not load", f"correct its files in {folder}"):
        if "auto_map" in _json(folder / "tokenizer_config.json") and not source.trust_remote_code:
            raise Missing("it comes with Python code of its own; read it, then add --trust-remote-code")
        return AutoTokenizer.from_pretrained(source.folder, **source.options())


def _json(file: Path) -> dict[str, Any]:
    """Return the settings in a file, {} without the file.  Raises Missing if they are none."""
    try:
        settings = json.loads(file.read_text()) if file.is_file() else {}
    except ValueError as error:
        raise Missing(f"{file.name} is not JSON ({first_line(error)})") from error
    if not isinstance(settings, dict):
        raise Missing(f"{file.name} holds a {type(settings).__name__} in place of named settings")
    return settings


def config(source: ModelSource, *, field: str) -> PretrainedConfig:
    """Load the model's configuration; that of an adapter is its base's."""
    base_model = source.base_source()
    with foreign_errors(f"--{field} {source}: its config.json does not load"):
        _require_known_type(base_model)
        config = AutoConfig.from_pretrained(base_model.folder, **base_model.options())
        if not base_model.trust_remote_code and not _language_models(config):
            names = ", ".join(config.architectures or ()) or f"model_type {config.model_type}"
            raise Missing(f"{names} is no language model that predicts the next token; name another model")
    return config


def _require_known_type(source: ModelSource) -> None:
    """Raise Missing if transformers has no class for the model and may not run the model's own."""
    settings = _json(Path(source.folder) / "config.json")
    kind = str(settings.get("model_type") or "")
    if kind in CONFIG_MAPPING or (source.trust_remote_code and "auto_map" in settings):
        return
    if "auto_map" in settings:
        raise Missing(
            f"its model_type {kind!r} comes with Python code of its own; read it, then add --trust-remote-code"
        )
    if not kind:
        raise Missing("it names no model_type; save the model with transformers' save_pretrained")
    raise Missing(f"transformers {transformers.__version__} has no model_type {kind!r}; a newer one may")


def _language_models(config: PretrainedConfig) -> list[str]:
    """Return the names of transformers' classes that predict the next token for a configuration."""
    mappings = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    return [str(mapping[type(config)].__name__) for mapping in mappings if type(config) in mapping]  # type: ignore[attr-defined]


def _require_language_model(config: PretrainedConfig) -> None:
    """Raise Missing for a model that was saved as something else, such as an embedding model with a tied head."""
    named, classes = config.architectures or (), _language_models(config)
    others = [name for name in named if name not in classes and hasattr(transformers, name)]
    if classes and others and len(others) == len(named):
        raise Missing(
            f"{others[0]} is no language model that predicts the next token, as {' or '.join(classes)} is; name "
            "another model, or correct architectures in config.json"
        )


def stop_ids(source: ModelSource, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the stop ids of a model: its generation config's, else its tokenizer's EOS, else its config's."""
    folder = Path(source.base_source().folder)
    with foreign_errors(f"{source}: its stop ids cannot be read"):
        settings, model = _json(folder / "generation_config.json"), _json(folder / "config.json")
    in_text = model.get("text_config")
    fallback = model.get("eos_token_id", in_text.get("eos_token_id") if isinstance(in_text, dict) else None)
    return prompts.stop_ids(settings.get("eos_token_id"), tokenizer, fallback)


def load(source: ModelSource, *, field: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Load the weights in eval mode (no pass uses dropout); an adapter is merged into its base."""
    with foreign_errors(f"--{field} {source}: its weights do not load"):
        model = _load_model(source, dtype, field)
    use_onednn(model)
    return cast(PreTrainedModel, model.to(device).eval())  # type: ignore[arg-type]  # transformers' stub of `to`


def load_adapter(source: ModelSource, *, field: str, dtype: torch.dtype, device: torch.device) -> PeftModel:
    """Load a base with the adapter of a checkpoint, to train the adapter further."""
    with foreign_errors(f"--{field} {source}: its weights do not load"):
        model = _load_adapter_model(source, dtype, field, trainable=True)
    use_onednn(model)
    return model.to(device).eval()


def _load_model(source: ModelSource, dtype: torch.dtype, field: str) -> PreTrainedModel:
    """Load a model, its adapter merged.  Raises Missing, and any error of transformers and peft."""
    if source.base is not None:
        return adapters.merge(_load_adapter_model(source, dtype, field, trainable=False))
    base_config = config(source, field=field)
    weight_files.require(source)
    options = {"dtype": dtype, "use_safetensors": True, "ignore_mismatched_sizes": True, **source.options()}
    model_class: Any = auto_class(base_config)
    with _without_report():
        model, report = model_class.from_pretrained(source.folder, output_loading_info=True, **options)
    _require_weights(report)
    _require_language_model(base_config)
    _require_finite(model)
    freeze_all_but_text(model)
    return cast(PreTrainedModel, model)


def auto_class(config: PretrainedConfig) -> type:
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


@contextlib.contextmanager
def _without_report() -> Iterator[None]:
    """Keep transformers' table of missing and unexpected tensors from the output: `_require_weights` names them."""
    logger = logging.getLogger("transformers.modeling_utils")
    keep = lambda record: "LOAD REPORT" not in record.getMessage()
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _require_finite(model: PreTrainedModel) -> None:
    """Raise Missing for weights that are not finite, but for the head's bias, which `verify_finite` reads by token."""
    bias = getattr(model.get_output_embeddings(), "bias", None)
    for name, weight in model.named_parameters():
        if weight is not bias and not weight.isfinite().all():
            raise Missing(f"{name} holds numbers that are not finite; name a copy of the model that is not damaged")


def _listed(names: Sequence[str]) -> str:
    """Return the first three names, and the number of the others."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def freeze_all_but_text(model: PreTrainedModel) -> None:
    """Freeze the parameters of a multimodal model that text never reaches, such as those of its vision tower."""
    if model.config.get_text_config() is not model.config:
        modules = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
        reached = {id(p) for module in modules if module is not None for p in module.parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in reached)


def _load_adapter_model(source: ModelSource, dtype: torch.dtype, field: str, *, trainable: bool) -> PeftModel:
    """Load a base with its adapter, not merged.  Raises Missing, and any error of transformers and peft."""
    assert source.base is not None
    weight_files.require(source)
    return adapters.apply(Path(source.folder), _load_model(source.base, dtype, field), trainable=trainable)


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
    kind = type(linear)
    if isinstance(linear, FSDPModule):  # `fully_shard` makes a class of FSDPModule and the module's class
        _, kind = kind.__bases__
    if kind not in (torch.nn.Linear, Linear):
        raise Refusal(
            f"{type(plain).__name__}: its output head is a {kind.__name__}; opd needs a plain Linear "
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
