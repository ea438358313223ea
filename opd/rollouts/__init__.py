"""Rollouts: engines that generate them, the collector, the buffer, the worker, weights for other engines."""
