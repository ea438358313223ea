"""The trainer's side of vLLM's weight transfers between GPUs.  vLLM must be installed here, too.

`nccl(url, weights, ...)` and `ipc(url, weights)` return a function that sends the current weights to the server.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer import HTTPVLLMWeightSyncClient, ModuleSource, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.base import TrainerInitInfo
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
from vllm.utils.network_utils import get_ip, get_open_port

Weights = Iterable[tuple[str, Tensor]]  # each iteration yields the current weights


class NamedWeights(torch.nn.Module):
    """A module that yields the current weights under their checkpoint names.

    It is a module because `ModuleSource` reads the parameters of a module in every version of vLLM, while
    `WeightSource` changed in 0.33.
    """

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.weights = weights

    def named_parameters(self, *args: Any, **options: Any) -> Iterator[tuple[str, Any]]:
        """Yield names and current tensors."""
        yield from self.weights


def nccl(url: str, weights: Weights, workers: int) -> Callable[[], None]:
    """Return a function that sends weights from this GPU to the GPUs of a server with `workers` workers."""
    return _sender(NCCLTrainerInitInfo(get_ip(), get_open_port(), workers + 1, rank=0), url, weights)


def ipc(url: str, weights: Weights) -> Callable[[], None]:
    """Return a function for a server on the same GPU, which needs VLLM_ALLOW_INSECURE_SERIALIZATION=1."""
    return _sender(IPCTrainerInitInfo(rank=0), url, weights)


def _sender(info: TrainerInitInfo, url: str, weights: Weights) -> Callable[[], None]:
    sender = WeightTransferTrainerFactory.trainer_init(
        info, client=HTTPVLLMWeightSyncClient(url), source=ModuleSource(NamedWeights(weights))
    )
    return sender.send_weights
