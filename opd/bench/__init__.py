"""Benchmarks of time, memory and numerical error, compared with other libraries."""
