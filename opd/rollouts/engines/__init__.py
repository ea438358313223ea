"""Engines that generate responses: transformers, vLLM in this process, a vLLM server."""
