"""Rewards, baselines, estimators, divergences, advantages and token weights: pure functions of log-probs."""
