"""The location of a model's files: `locate(name)` takes a hub id, folder, GGUF file, run folder or `embedded:NAME`."""

import contextlib
import hashlib
import io
import os
import shutil
import tempfile
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from opd.core import json_text
from opd.core.disk import disk, nearest
from opd.core.errors import Refusal, first_line
from opd.data import hub
from opd.data.hub import Missing
from opd.models.adapters import ADAPTER_CONFIG, BASE_FOLDER
from opd.models.checkpoints import damage_of, has_weights, newest_checkpoint

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


def _find_source(name: str, trust_remote_code: bool, above: tuple[Path, ...] = ()) -> ModelSource:
    """Find the files of a model, and those of its base if it is an adapter.  Raises Missing.

    `above` are the folders of the adapters that lead to it.
    """
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
        return _check_folder(ModelSource(str(_checked_weights(path).resolve()), trust_remote_code, name=name), above)
    repository = hub.parse(name)
    if repository is None:
        raise Missing(f"no such folder or .gguf file{nearest(path)}; a hub id looks like owner/name")
    try:
        folder, commit = hub.snapshot(repository)
    except Missing as error:
        raise Missing(f"{hub.no_path(path)}{error}") from error
    found = ModelSource(str(folder), trust_remote_code, replace(repository, revision=commit), name=name)
    return _check_folder(found, above)


def _checked_weights(path: Path) -> Path:
    """Return a folder, or the newest whole checkpoint of a run folder; refuse a checkpoint with damaged weights."""
    newest, damaged = newest_checkpoint(path)
    for line in damaged:
        warnings.warn(f"{line}; {newest} is used", stacklevel=2)
    if newest is None and (damage := damage_of(path, weights_only=True)):
        raise Missing(f"it is damaged: {damage}; name an earlier checkpoint, or restore it from a copy")
    if newest is not None and not has_weights(newest):
        raise Missing(
            f"{newest} holds shards alone; write a model folder by `opd export {path} --out FOLDER`, name that"
        )
    return newest or path


def _check_folder(source: ModelSource, above: tuple[Path, ...]) -> ModelSource:
    """Return the source of a model or adapter folder, with the adapter's base.  Raises Missing for any other folder."""
    folder = Path(source.folder)
    if (folder / ADAPTER_CONFIG).is_file():
        if folder in above:
            raise Missing(f"it is its own base; correct base_model_name_or_path in {folder / ADAPTER_CONFIG}")
        return replace(source, base=_base_of(folder, source.trust_remote_code, (*above, folder)))
    if (folder / "method.txt").is_file():
        raise Missing("this run has no checkpoint yet; name one that has, or the folder of a saved model")
    if not (folder / "config.json").is_file():
        gguf = min((path.name for path in folder.glob("*.gguf")), default="")
        raise Missing(f"the folder holds no config.json; name {gguf and f'its {gguf}, or '}the folder of a saved model")
    return source


def _base_of(folder: Path, trust_remote_code: bool, above: tuple[Path, ...]) -> ModelSource:
    """Find the model that an adapter was trained on; raises Missing."""
    try:
        settings = json_text.parse((folder / ADAPTER_CONFIG).read_text())
        name, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    except (OSError, ValueError, AttributeError) as error:
        raise Missing(f"its {ADAPTER_CONFIG} cannot be read: {first_line(error)}") from error
    if not name or not isinstance(name, str):
        raise Missing(f"its {ADAPTER_CONFIG} names no base model: write base_model_name_or_path into it")
    beside = folder.parent.parent / BASE_FOLDER  # the run folder may have been moved after the run
    if Path(name).name == BASE_FOLDER and not Path(name).exists() and (beside / "config.json").is_file():
        name = str(beside)
    try:
        pinned = f"{name}@{revision}" if revision and not Path(name).exists() else name
        return _find_source(pinned, trust_remote_code, above)
    except Missing as error:
        raise Missing(
            f"the base model of this adapter, {name}, is missing: {error}; restore it, or correct "
            f"base_model_name_or_path in {folder / ADAPTER_CONFIG}"
        ) from error


def _dequantised(file: Path) -> Path:
    """Convert a GGUF file to a safetensors folder, cached under the file's fingerprint."""
    stat = file.stat()
    key = hashlib.sha256(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "opd" / f"{file.stem}-{key}"
    if (cache / "config.json").is_file():
        return cache
    # The folder around the file is not read: its configuration could name code.
    options = {"gguf_file": file.name, "local_files_only": True, "trust_remote_code": False}
    quantization = GgufConfig(dequantize=True)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # hides its progress bar: `progress.loading` shows one
            model = AutoModelForCausalLM.from_pretrained(
                file.parent, quantization_config=quantization, dtype=torch.float32, use_safetensors=True, **options
            )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
    except ImportError as error:
        raise Refusal(f"{file}: reading a GGUF file needs the gguf package: pip install 'opd[gguf]'") from error
    except Exception as error:  # the parser follows whatever the file says, and fails in many ways
        raise Refusal(f"{file}: not a GGUF file that transformers can read: {first_line(error)}") from error
    # Several processes may convert at once: each writes a separate folder, and the first to finish renames it.
    with disk(f"writing {cache}", "mend that, or set XDG_CACHE_HOME to another folder"):
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
