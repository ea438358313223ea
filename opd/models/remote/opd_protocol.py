"""The protocol of `opd serve` beyond the OpenAI protocol: identity, tokenizer, tensors.

GET /opd/identity   json: hashes of vocabulary, chat template and weights; rows, stop ids, context, dtype
GET /opd/tokenizer  json: the tokenizer's files, base64
GET /opd/head       safetensors: weight and bias of the LM head; a client fetches it once
POST /opd/hidden    json {rows: [{ids, at}]} -> safetensors: the final hidden state that predicts each requested token
"""

import base64
import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor
from transformers import AutoTokenizer
from transformers import PreTrainedTokenizerBase as Tokenizer

VERSION = 1  # version of this protocol
FINGERPRINT = "x-opd-fingerprint"  # HTTP header: hash of the weights that computed the response
SUFFIXES = frozenset({".json", ".jinja", ".txt", ".model"})  # a tokenizer's files that are sent: data, never code


def vocabulary_hash(tokenizer: Tokenizer) -> str:
    """Return a hash of the token -> id map.  It is equal exactly if two tokenizers map each id to the same token."""
    ids = {**tokenizer.get_vocab(), **tokenizer.get_added_vocab()}
    return _hash(json.dumps(sorted(ids.items(), key=lambda pair: (pair[1], pair[0]))).encode())


def template_hash(tokenizer: Tokenizer) -> str:
    """Return a hash of the chat template's source; empty without a template."""
    return _hash(str(tokenizer.chat_template).encode()) if tokenizer.chat_template else ""


def weights_hash(model: torch.nn.Module) -> str:
    """Return a hash of name, shape, dtype and about 64 values of each parameter, to tell two checkpoints apart."""
    digest = hashlib.sha256()
    for name, x in model.named_parameters():
        flat = x.detach().flatten()
        sampled = flat[:: max(1, flat.numel() // 64)].float().cpu()
        digest.update(f"{name} {tuple(x.shape)} {x.dtype}".encode() + sampled.numpy().tobytes())
    return digest.hexdigest()[:16]


def pack_tokenizer(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the tokenizer's files by name, in base64."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = [path for path in sorted(Path(folder).iterdir()) if path.suffix in SUFFIXES]
        return {path.name: base64.b64encode(path.read_bytes()).decode() for path in files}


def unpack_tokenizer(files: Mapping[str, str], name: str) -> Tokenizer:
    """Load a tokenizer from files in base64, without running code from them.  Raises ValueError for invalid files."""
    with tempfile.TemporaryDirectory() as folder:
        for file, content in files.items():
            if Path(file).name != file or Path(file).suffix not in SUFFIXES:
                raise ValueError(f"{file!r} is no file of a tokenizer")
            (Path(folder) / file).write_bytes(base64.b64decode(content, validate=True))
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, KeyError) as error:
            raise ValueError(f"the tokenizer's files do not load: {error}") from error
    tokenizer.name_or_path = name
    return tokenizer


def pack(tensors: Mapping[str, Tensor]) -> bytes:
    """Serialize tensors by name as safetensors."""
    return save({name: x.detach().contiguous().cpu() for name, x in tensors.items()})


def unpack(body: bytes) -> dict[str, Tensor]:
    """Load tensors that `pack` serialized.  Raises SafetensorError for anything else."""
    return load(body)


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
