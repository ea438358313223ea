"""Models without weights: built from a configuration alone, with the shapes and dtypes of all tensors and no memory."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from opd.data.hub import Missing
from opd.models.load import auto_class, freeze_all_but_text

# transformers reads the values of a mask to leave it out, which fake tensors do not have.  It makes no mask for an
# attention function that it has no mask function for.
CAUSAL = "sdpa_without_mask"
AttentionInterface.register(CAUSAL, sdpa_attention_forward)


class _Grouped(TorchFunctionMode):
    """Products of experts in any dtype: torch knows the shapes of its own function in bf16 only."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch._grouped_mm:
            func = torch.ops.transformers.grouped_mm_fallback
        return func(*args, **{name: x for name, x in (kwargs or {}).items() if x is not None})


def outline(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model on the meta device.  Raises Missing if it is quantised, and errors of transformers."""
    if getattr(config, "quantization_config", None):
        raise Missing("it is quantised, and the sizes of its weights are not in its config.json")
    model_class: Any = auto_class(config)
    with torch.device("meta"):
        try:
            model = model_class.from_config(copy.deepcopy(config), dtype=dtype, attn_implementation=CAUSAL)
        except ValueError:  # the model has no such attention, but another
            model = model_class.from_config(copy.deepcopy(config), dtype=dtype)
    freeze_all_but_text(model)
    return cast(PreTrainedModel, model.eval())


@contextlib.contextmanager
def fake_tensors(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Yield fake tensors in place of a module's parameters and buffers, for `torch.func.functional_call` in the block.

    Unlike tensors on the meta device, they know autocast and choose the kernels of a real device.  A forward pass then
    saves for its backward pass what that of the real model saves.
    """
    with FakeTensorMode(), _Grouped():
        named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        yield {name: torch.empty(x.shape, dtype=x.dtype, requires_grad=x.requires_grad) for name, x in named.items()}
