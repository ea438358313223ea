"""Clients of models behind a server: HTTP, vLLM's protocol, and the protocol of `opd serve`."""
