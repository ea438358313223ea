"""Rollout policies: which model generates a rollout, of which prompts, and where it ends."""
