"""Loading of models by name (hub id, local folder, GGUF file, run folder, `embedded:NAME`), and of their heads."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils.logging import disable_progress_bar

from opd.core.disk import nearest
from opd.core.errors import Refusal
from opd.data import hub, prompts
from opd.data.hub import Missing
from opd.head.onednn import Linear, use_onednn
from opd.head.vocabulary import Head, Vocabulary
from opd.models import adapters
from opd.models.adapters import ADAPTER_CONFIG, BASE_FOLDER

disable_progress_bar()  # loading bars drown the lines that matter
EMBEDDED = Path(__file__).parent / "embedded"


@dataclass(frozen=True)
class ModelSource:
    """A model's local folder, which may be the cache of a hub id; for an adapter also its base model."""

    folder: str
    trust_remote_code: bool = False
    repository: hub.Repository | None = None  # the hub id and commit of which the folder is a snapshot
    base: "ModelSource | None" = None  # the model that an adapter adapts
    name: str = field(default="", compare=False)  # the user's name for it, for messages

    def options(self) -> dict[str, bool]:
        """Return the arguments of every from_pretrained; only the code of a hub model may be in another repository."""
        code_elsewhere = self.repository is not None and self.trust_remote_code
        return {"local_files_only": not code_elsewhere, "trust_remote_code": self.trust_remote_code}

    def base_source(self) -> "ModelSource":
        """Return the model itself, or the base of its adapters, which has the configuration and the layers."""
        return self if self.base is None else self.base.base_source()

    def __str__(self) -> str:
        return self.name or self.folder


def locate(name: str, *, field: str, trust_remote_code: bool = False) -> ModelSource:
    """Find the files of a model; `field` is the flag that named it, for the error."""
    try:
        return _find_source(name, trust_remote_code)
    except Missing as error:
        raise Refusal(f"--{field} {name}: {error}") from error


def _find_source(name: str, trust_remote_code: bool) -> ModelSource:
    """Find the files of a model, and those of its base if it is an adapter.  Raises Missing."""
    if name.startswith("embedded:"):
        folder = EMBEDDED / name.removeprefix("embedded:")
        if not (folder / "config.json").is_file():
            available = ", ".join(f"embedded:{p.parent.name}" for p in sorted(EMBEDDED.glob("*/config.json")))
            raise Missing(f"no such embedded model; there are {available}")
        return ModelSource(str(folder), name=name)
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return ModelSource(str(_dequantised(path)), name=name)
    if path.is_file():
        raise Missing("is a file; name the folder of a saved model, or a .gguf file")
    if path.is_dir():
        path = newest_checkpoint(path) or path
        return _check_folder(ModelSource(str(path.resolve()), trust_remote_code, name=name))
    repository = hub.parse(name)
    if repository is None:
        raise Missing(f"no such folder or .gguf file{nearest(path)}; a hub id looks like owner/name")
    try:
        folder, commit = hub.snapshot(repository)
    except Missing as error:
        raise Missing(f"{hub.no_path(path)}{error}") from error
    return _check_folder(ModelSource(str(folder), trust_remote_code, replace(repository, revision=commit), name=name))


def _check_folder(source: ModelSource) -> ModelSource:
    """Return the source of a model or adapter folder, with the adapter's base.  Raises Missing for any other folder."""
    folder = Path(source.folder)
    if (folder / ADAPTER_CONFIG).is_file():
        return replace(source, base=_base_of(folder, source.trust_remote_code))
    if (folder / "method.txt").is_file():
        raise Missing("this run has no checkpoint yet; name one that has, or the folder of a saved model")
    if not (folder / "config.json").is_file():
        raise Missing("the folder holds no config.json; name the folder of a saved model")
    return source


def _base_of(folder: Path, trust_remote_code: bool) -> ModelSource:
    """Find the model that an adapter was trained on; raises Missing."""
    try:
        settings = json.loads((folder / ADAPTER_CONFIG).read_text())
        name, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    except (OSError, ValueError, AttributeError) as error:
        raise Missing(f"its {ADAPTER_CONFIG} cannot be read: {_first_line(error)}") from error
    if not name:
        raise Missing(f"its {ADAPTER_CONFIG} names no base model: write base_model_name_or_path into it")
    beside = folder.parent.parent / BASE_FOLDER  # the run folder may have been moved after the run
    if Path(name).name == BASE_FOLDER and not Path(name).exists() and (beside / "config.json").is_file():
        name = str(beside)
    try:
        return _find_source(f"{name}@{revision}" if revision and not Path(name).exists() else name, trust_remote_code)
    except Missing as error:
        raise Missing(
            f"the base model of this adapter, {name}, is missing: {error}; restore it, or correct "
            f"base_model_name_or_path in {folder / ADAPTER_CONFIG}"
        ) from error


def newest_checkpoint(run: Path) -> Path | None:
    """Return the last complete checkpoint of a run folder, or None."""
    return max((run / "checkpoints").glob("step-[0-9]*"), default=None)


def tokenizer(source: ModelSource, *, field: str) -> Tokenizer:
    """Load the model's tokenizer; that of an adapter without one is its base's."""
    has_tokenizer = any((Path(source.folder) / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json"))
    if source.base is not None and not has_tokenizer:
        return tokenizer(source.base, field=field)
    with _loading(source, field, "its tokenizer does not load"):
        return AutoTokenizer.from_pretrained(source.folder, **source.options())


def config(source: ModelSource, *, field: str) -> PretrainedConfig:
    """Load the model's configuration; that of an adapter is its base's."""
    base_model = source.base_source()
    with _loading(source, field, "its config.json does not load"):
        return AutoConfig.from_pretrained(base_model.folder, **base_model.options())


def stop_ids(source: ModelSource, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the stop ids of a model; nothing else of its generation config is used."""
    try:
        config = GenerationConfig.from_pretrained(source.base_source().folder, local_files_only=True)
    except OSError:
        config = GenerationConfig()
    return prompts.stop_ids(config, tokenizer)


def load(source: ModelSource, *, field: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Load the weights in eval mode (no pass uses dropout); an adapter is merged into its base."""
    with _loading(source, field, "its weights do not load"):
        model = _load_model(source, dtype)
    use_onednn(model)
    return cast(PreTrainedModel, model.to(device).eval())  # type: ignore[arg-type]  # transformers' stub of `to`


def load_adapter(source: ModelSource, *, field: str, dtype: torch.dtype, device: torch.device) -> PeftModel:
    """Load a base with the adapter of a checkpoint, to train the adapter further."""
    with _loading(source, field, "its weights do not load"):
        model = _load_adapter_model(source, dtype, trainable=True)
    use_onednn(model)
    return model.to(device).eval()


@contextlib.contextmanager
def _loading(source: ModelSource, field: str, failure: str) -> Iterator[None]:
    try:
        yield
    except (Missing, OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise Refusal(f"--{field} {source}: {failure}: {_first_line(error)}") from error


def _load_model(source: ModelSource, dtype: torch.dtype) -> PreTrainedModel:
    """Load a model, its adapter merged.  Raises Missing, and any error of transformers and peft."""
    if source.base is not None:
        return adapters.merge(_load_adapter_model(source, dtype, trainable=False))
    _require_safetensors(source)
    return AutoModelForCausalLM.from_pretrained(source.folder, dtype=dtype, use_safetensors=True, **source.options())


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


def head(model: PreTrainedModel | PeftModel) -> Head:
    """Return the output head as a value that shares storage with the model."""
    plain = base(model)
    linear = plain.get_output_embeddings()
    if type(linear) not in (torch.nn.Linear, Linear):
        raise Refusal(
            f"{type(plain).__name__}: its output head is a {type(linear).__name__}; opd needs a plain Linear "
            "(no adapter and no quantisation on lm_head)"
        )
    options = plain.config.get_text_config().to_dict()
    scale = (options.get("logit_scale") or 1.0) * (options.get("lm_head_multiplier") or 1.0)
    scale /= options.get("logits_scaling") or 1.0
    return Head(linear.weight, linear.bias, scale, options.get("final_logit_softcapping") or 0.0)


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


@torch.no_grad()
def verify_head(model: PreTrainedModel | PeftModel, *, field: str) -> None:
    """Refuse an architecture whose logits our head does not reproduce: a wrong head trains silently wrong."""
    plain, model_head = base(model), head(model)
    ids = torch.arange(1, 9, device=plain.device)[None] % len(model_head.weight)
    hidden = plain.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
    shorter_hidden = plain.base_model(input_ids=ids[:, :5], use_cache=False).last_hidden_state[0]
    products = torch.nn.functional.linear(hidden, model_head.weight).float()
    logits = Vocabulary(len(model_head.weight)).logits(products, model_head)
    expected = plain(input_ids=ids, use_cache=False).logits[0].float()
    compared = logits.isfinite() & expected.isfinite()  # `verify_finite` checks the others
    gap, size = (logits - expected)[compared].abs(), expected[compared].abs()
    tolerance = 1e-3 if plain.dtype == torch.float32 else 5e-2
    if len(gap) and gap.max() > tolerance * size.max().clamp(min=1):
        raise Refusal(
            f"--{field}: {type(plain).__name__} computes its logits in a way opd does not know "
            f"(they differ by {gap.max():.3g}); please report the architecture"
        )
    if (hidden[:5] - shorter_hidden).abs().max() > tolerance * shorter_hidden.abs().max():
        raise Refusal(
            f"--{field}: {type(plain).__name__} looks at tokens to the right of the one it predicts, padding included; "
            "opd needs a causal model"
        )


@torch.no_grad()
def verify_finite(model: PreTrainedModel | PeftModel, tokenizer: Tokenizer, *, ids: int, field: str) -> None:
    """Refuse a token of the first `ids`, the common ones, without a finite logit: 0 * inf is nan in every KL."""
    probe_ids = torch.arange(1, 9, device=model.device)[None] % ids
    logits = base(model)(input_ids=probe_ids, use_cache=False).logits[0, :, :ids].float()
    rows, tokens = (~logits.isfinite()).nonzero(as_tuple=True)
    if len(tokens):
        token, num_others = int(tokens[0]), len(tokens.unique()) - 1
        raise Refusal(
            f"--{field}: the logit of token {token} ({str(tokenizer.decode([token]))!r}) is "
            f"{float(logits[rows[0], token])}{f', and so are {num_others} more' if num_others else ''}: KLs over the "
            "vocabulary need finite logits; where the model masks the token, write a large finite number instead, such "
            "as -1e4"
        )


def _dequantised(file: Path) -> Path:
    """Convert a GGUF file to a safetensors folder, cached under the file's fingerprint."""
    stat = file.stat()
    key = hashlib.sha256(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "opd" / f"{file.stem}-{key}"
    if (cache / "config.json").is_file():
        return cache
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # hides its progress bar: `progress.loading` shows one
            model = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
            )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except ImportError as error:
        raise Refusal(f"{file}: reading a GGUF file needs the gguf package: pip install 'opd[gguf]'") from error
    except (OSError, ValueError, KeyError, struct.error) as error:
        raise Refusal(f"{file}: not a GGUF file that transformers can read: {_first_line(error)}") from error
    # Several processes may convert at once: each writes a separate folder, and the first to finish renames it.
    cache.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f"{cache.name}.", suffix=".part", dir=cache.parent))
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    try:
        part.replace(cache)
    except OSError:
        if not (cache / "config.json").is_file():
            raise
        shutil.rmtree(part)
    return cache


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300]
