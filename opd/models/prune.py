"""Depth pruning: a student made of some of a model's layers, `prune(Prune(...)) -> folder`."""

from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opd.config.commands import Prune
from opd.core.disk import OutputFolder
from opd.core.errors import Refusal
from opd.models import load as models
from opd.models.source import ModelSource, locate


@torch.no_grad()
def prune(config: Prune) -> Path:
    """Save the model with only the layers of --keep, renumbered from 0, with its tokenizer and generation config.

    Embeddings, final norm and head are unchanged; the weights keep their dtype.  ShortGPT, arXiv:2403.03853.
    """
    out = OutputFolder(path=config.out)
    out.check()
    source = locate(config.model, field="model", trust_remote_code=config.trust_remote_code)
    tokenizer = models.tokenizer(source, field="model")
    stored = models.config(source, field="model").dtype
    assert not isinstance(stored, str), "transformers reads the name of a dtype as the dtype"
    model = models.load(source, field="model", dtype=stored or torch.float32, device=torch.device("cpu"))
    select(model, config.keep)
    with out.fill() as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        saved = ModelSource(str(part), trust_remote_code=config.trust_remote_code)
        again = models.load(saved, field="out", dtype=torch.float32, device=model.device)
        if not torch.equal(_logits(model.float()), _logits(again)):
            raise Refusal(
                f"--model {config.model}: a layer of {type(model).__name__} computes something else under another "
                "number, in a way opd does not know; please report the architecture"
            )
    return config.out.expanduser()


def select(model: PreTrainedModel, keep: tuple[int, ...]) -> None:
    """Remove all other layers from the model, in place; generate only from a saved and loaded copy.

    Each layer keeps its old number, which is its index in a KV cache, until the model is loaded again.
    """
    config = model.config.get_text_config()
    name, count = layer_list_name(model), config.num_hidden_layers
    if not keep:
        raise Refusal(f"--keep: no layers; name some of 0-{count - 1}")
    if outside := [i for i in keep if not 0 <= i < count]:
        raise Refusal(f"--keep: there is no layer {outside[0]}; the model's layers are 0-{count - 1}")
    if any(a >= b for a, b in pairwise(keep)):
        raise Refusal(f"--keep {','.join(map(str, keep))}: name each layer once, in ascending order")
    all_layers = list(model.get_submodule(name).children())
    model.set_submodule(name, torch.nn.ModuleList(all_layers[i] for i in keep))
    for key, value in config.to_dict().items():
        # Settings by layer, such as layer_types.  By name too: a small model has other lists of that length.
        if isinstance(value, list | tuple) and len(value) == count and ("layer" in key or "block" in key):
            setattr(config, key, [value[i] for i in keep])
    config.num_hidden_layers = len(keep)


def layer_list_name(model: PreTrainedModel) -> str:
    """Return the name of the module list with the decoder layers: the only outermost list of that length."""
    count = model.config.get_text_config().num_hidden_layers
    same_length = [name for name, m in model.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
    outermost = [name for name in same_length if not any(name.startswith(f"{other}.") for other in same_length)]
    if len(outermost) != 1:
        raise Refusal(
            f"{type(model).__name__}: which of its modules holds the {count} decoder layers is not clear "
            f"({', '.join(outermost) or 'none has that length'}); opd prunes decoders with one list of layers"
        )
    return outermost[0]


def _logits(model: PreTrainedModel) -> Tensor:
    ids = torch.arange(1, 9)[None] % model.config.get_text_config().vocab_size
    return model(input_ids=ids, use_cache=False).logits
