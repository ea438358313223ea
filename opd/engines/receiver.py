"""vLLM's side of the `opd` weight transfer; imported by vLLM alone, in the process that holds the model."""

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from opd.engines.transfer import Opened, Update


class Receiver(WeightTransferEngine[WeightTransferInitInfo, WeightTransferUpdateInfo]):
    """Loads what it is handed, layer by layer, as vLLM's own backends do."""

    init_info_cls = Opened
    update_info_cls = Update

    def init_transfer_engine(self, init_info: Opened) -> None:
        """Nothing to meet."""

    def start_weight_update(self) -> None:
        """Expect weights as a checkpoint has them."""
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict) -> None:
        """Some of them, or all."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":  # there is nothing to wait for there, and vLLM's own call raises
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: Update) -> None:
        """Into the model."""
        self.model.load_weights(iter(update_info))

    def finish_weight_update(self) -> None:
        """Whatever a layer does to its weights once it has them all."""
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Nothing is held."""
