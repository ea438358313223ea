"""Models: loading, LoRA, pruning, batches of token ids, the forward pass."""
