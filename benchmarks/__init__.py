"""Benchmarks of the head pass, a training step and rollouts beside plain torch, TRL and Liger; not in the wheel."""
