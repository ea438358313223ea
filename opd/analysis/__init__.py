"""Evaluation of models, exact gradients, rescoring of saved rollouts, and reports of runs."""
