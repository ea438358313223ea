"""Prompts, chat templates, tokenizers, tasks and verifiers."""
