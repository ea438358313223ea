"""Models by name: a hub id, a local folder, a GGUF file, a run folder, or `embedded:NAME`; and their heads."""

import contextlib
import hashlib
import io
import os
import shutil
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils.logging import disable_progress_bar

from opd import prompts
from opd.kernels.linear import Linear, quicken
from opd.kernels.logits import Head
from opd.types import Refusal

disable_progress_bar()  # loading bars drown the lines that matter
EMBEDDED = Path(__file__).parent / "embedded"


@dataclass(frozen=True)
class Source:
    """Where a model's files are."""

    folder: str  # local folder, or a hub id
    hub: bool = False  # looked up on the hub, with network
    trust_remote_code: bool = False

    def options(self) -> dict[str, bool]:
        """Arguments of every from_pretrained."""
        return {"local_files_only": not self.hub, "trust_remote_code": self.trust_remote_code}


def locate(name: str, *, field: str, trust_remote_code: bool = False) -> Source:
    """Find the files of a model; `field` is the flag that named it, for the error."""
    if name.startswith("embedded:"):
        folder = EMBEDDED / name.removeprefix("embedded:")
        if not (folder / "config.json").is_file():
            known = ", ".join(f"embedded:{p.parent.name}" for p in sorted(EMBEDDED.glob("*/config.json")))
            raise Refusal(f"--{field} {name}: no such embedded model; there are {known}")
        return Source(str(folder))
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return Source(str(_dequantised(path)))
    if path.is_dir():
        if (path / "checkpoints").is_dir():
            path = newest_checkpoint(path) or path
        if not ((path / "config.json").is_file() or (path / "adapter_config.json").is_file()):
            raise Refusal(f"--{field} {name}: the folder holds no config.json; name the folder of a saved model")
        return Source(str(path), trust_remote_code=trust_remote_code)
    local = path.is_absolute() or name.startswith((".", "~")) or name.endswith("/") or path.suffix
    if local or name.count("/") != 1 or any(path.parent.glob("*/method.txt")):  # a folder of runs is no owner's name
        from opd.tasks.tables import nearest  # datasets takes a second

        raise Refusal(f"--{field} {name}: no such folder or .gguf file{nearest(path)}; a hub id looks like owner/name")
    return Source(name, hub=True, trust_remote_code=trust_remote_code)


def newest_checkpoint(run: Path) -> Path | None:
    """The last complete checkpoint of a run folder."""
    found = sorted((run / "checkpoints").glob("step-[0-9]*"))
    return found[-1] if found else None


def tokenizer(source: Source, *, field: str) -> Tokenizer:
    """The model's tokenizer."""
    try:
        return AutoTokenizer.from_pretrained(source.folder, **source.options())
    except (OSError, ValueError) as error:
        raise Refusal(f"--{field} {source.folder}: its tokenizer does not load: {_first_line(error)}") from error


def stop_ids(source: Source, text: Tokenizer) -> tuple[int, ...]:
    """The ids at which the model stops, `text` its tokenizer; nothing else of its generation config is inherited."""
    try:
        config = GenerationConfig.from_pretrained(source.folder, local_files_only=not source.hub)
    except OSError:
        config = GenerationConfig()
    return prompts.stop_ids(config, text)


def load(source: Source, *, field: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel | PeftModel:
    """The weights, in eval mode (dropout is off in every pass)."""
    adapter = Path(source.folder) / "adapter_config.json"
    try:
        if adapter.is_file():
            from peft import AutoPeftModelForCausalLM

            model = AutoPeftModelForCausalLM.from_pretrained(
                source.folder, dtype=dtype, is_trainable=True, local_files_only=not source.hub
            )
        else:
            model = AutoModelForCausalLM.from_pretrained(
                source.folder, dtype=dtype, use_safetensors=True, **source.options()
            )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise Refusal(f"--{field} {source.folder}: its weights do not load: {_first_line(error)}") from error
    quicken(model)
    return model.to(device).eval()


def base(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model, adapters inside its layers."""
    return cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model


def head(model: PreTrainedModel | PeftModel) -> Head:
    """The output head as a value; shares storage with the model."""
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
    """A device of this machine by name."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch raises either for what it was not built for
        raise Refusal(
            f"--{field} {name}: this machine has no such device; use cpu, or cuda:0 ... where GPUs are visible"
        ) from error
    return torch.device(name)


def small_threads(*loaded: PreTrainedModel | PeftModel) -> None:
    """One CPU thread where all models are small: there, more threads cost more than they compute."""
    size = max(model.num_parameters() for model in loaded)
    if size < 5_000_000 and all(m.device.type == "cpu" for m in loaded) and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


@torch.no_grad()
def verify_head(model: PreTrainedModel | PeftModel, *, field: str) -> None:
    """Refuse an architecture whose logits our head does not reproduce: a wrong head trains silently wrong."""
    plain, ours = base(model), head(model)
    ids = torch.arange(1, 9, device=plain.device)[None] % len(ours.weight)
    hidden = plain.base_model(input_ids=ids, use_cache=False).last_hidden_state
    before = plain.base_model(input_ids=ids[:, :5], use_cache=False).last_hidden_state
    raw = torch.nn.functional.linear(hidden, ours.weight, ours.bias).float() * ours.scale
    if ours.softcap:
        raw = torch.tanh(raw / ours.softcap) * ours.softcap
    wanted = plain(input_ids=ids, use_cache=False).logits.float()
    compared = raw.isfinite() & wanted.isfinite()  # `verify_finite` looks at the others
    gap, size = (raw - wanted)[compared].abs(), wanted[compared].abs()
    tolerance = 1e-3 if plain.dtype == torch.float32 else 5e-2
    if len(gap) and gap.max() > tolerance * size.max().clamp(min=1):
        raise Refusal(
            f"--{field}: {type(plain).__name__} computes its logits in a way opd does not know "
            f"(they differ by {gap.max():.3g}); please report the architecture"
        )
    if (hidden[:, :5] - before).abs().max() > tolerance * before.abs().max():
        raise Refusal(
            f"--{field}: {type(plain).__name__} looks at tokens to the right of the one it predicts, padding included; "
            "opd needs a causal model"
        )


@torch.no_grad()
def verify_finite(model: PreTrainedModel | PeftModel, text: Tokenizer, *, ids: int, field: str) -> None:
    """Refuse a token of the first `ids`, the common ones, without a finite logit: 0 * inf is nan in every KL."""
    some = torch.arange(1, 9, device=model.device)[None] % ids
    logits = base(model)(input_ids=some, use_cache=False).logits[0, :, :ids].float()
    rows, tokens = (~logits.isfinite()).nonzero(as_tuple=True)
    if len(tokens):
        token, others = int(tokens[0]), len(tokens.unique()) - 1
        raise Refusal(
            f"--{field}: the logit of token {token} ({str(text.decode([token]))!r}) is {float(logits[rows[0], token])}"
            f"{f', and so are {others} more' if others else ''}: KLs over the vocabulary need finite logits; where the "
            "model masks the token, write a large finite number instead, such as -1e4"
        )


def _dequantised(file: Path) -> Path:
    """A GGUF file as a safetensors folder, converted once and cached under the file's own fingerprint."""
    stat = file.stat()
    key = hashlib.sha256(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "opd" / f"{file.stem}-{key}"
    if (cache / "config.json").is_file():
        return cache
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a bar of its own, where `progress.loading` says enough
            model = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
            )
        text = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except ImportError as error:
        raise Refusal(f"{file}: reading a GGUF file needs the gguf package: pip install 'opd[gguf]'") from error
    except (OSError, ValueError, KeyError, struct.error) as error:
        raise Refusal(f"{file}: not a GGUF file that transformers can read: {_first_line(error)}") from error
    # Every process of a run may come here at once: each writes its own folder, and the first to finish names it.
    cache.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f"{cache.name}.", suffix=".part", dir=cache.parent))
    model.save_pretrained(part)
    text.save_pretrained(part)
    try:
        part.replace(cache)
    except OSError:
        if not (cache / "config.json").is_file():
            raise
        shutil.rmtree(part)
    return cache


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300]
