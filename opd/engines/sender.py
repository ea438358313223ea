"""The trainer's side of vLLM's own weight transfers between GPUs; needs vLLM here, too.

`nccl(url, weights, ...) -> send` and `ipc(url, weights) -> send`, where `send()` brings the server all weights of now.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer import HTTPVLLMWeightSyncClient, ModuleSource, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.base import TrainerInitInfo
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
from vllm.utils.network_utils import get_ip, get_open_port

Weights = Callable[[], Mapping[str, Tensor]]


class Student(torch.nn.Module):
    """The weights as they are when they are asked for, under the names of a checkpoint.

    A module, for `ModuleSource` asks one for its parameters in every version; `WeightSource` itself changed in 0.33.
    """

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.weights = weights

    def named_parameters(self, *args: Any, **options: Any) -> Iterator[tuple[str, Any]]:
        """Names and tensors."""
        yield from self.weights().items()


def nccl(url: str, weights: Weights, workers: int) -> Callable[[], None]:
    """From this GPU to those of a server with so many workers."""
    return _opened(NCCLTrainerInitInfo(get_ip(), get_open_port(), workers + 1, rank=0), url, weights)


def ipc(url: str, weights: Weights) -> Callable[[], None]:
    """To a server on this very GPU; it needs VLLM_ALLOW_INSECURE_SERIALIZATION=1 there."""
    return _opened(IPCTrainerInitInfo(rank=0), url, weights)


def _opened(how: TrainerInitInfo, url: str, weights: Weights) -> Callable[[], None]:
    sender = WeightTransferTrainerFactory.trainer_init(
        how, client=HTTPVLLMWeightSyncClient(url), source=ModuleSource(Student(weights))
    )
    return sender.send_weights
