"""vLLM's side of the `opd` weight transfer.  Only vLLM imports it, in the process that holds the model."""

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from opd.rollouts.weight_sync.vllm_plugin import Opened, Update


class Receiver(WeightTransferEngine[WeightTransferInitInfo, WeightTransferUpdateInfo]):
    """A weight-transfer engine of vLLM that loads weights layer by layer, as vLLM's backends do."""

    init_info_cls = Opened
    update_info_cls = Update

    def init_transfer_engine(self, init_info: Opened) -> None:
        """Do nothing: this backend opens no connection."""

    def start_weight_update(self) -> None:
        """Prepare the model for weights in checkpoint format."""
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict) -> None:
        """Load some of the weights, or all of them."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":  # on a CPU nothing is asynchronous, and vLLM's call raises
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: Update) -> None:
        """Load the weights into the model."""
        self.model.load_weights(iter(update_info))

    def finish_weight_update(self) -> None:
        """Run the post-processing of each layer, now that its weights are complete."""
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Do nothing: the engine holds no resources."""
