"""Compact multi-objective DPO: data, log-probabilities, losses, trainer, evaluation."""
