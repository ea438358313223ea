"""Engines that generate rollouts, and the weight transfer to vLLM."""
