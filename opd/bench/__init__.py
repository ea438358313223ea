"""Measured beside the peers: time, memory, error."""
