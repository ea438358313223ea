"""Checks of opd on a machine's GPUs: `python -m benchmarks gpu`; each module has checks `(cpu) -> rows`."""
