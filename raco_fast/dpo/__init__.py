"""Multi-objective DPO: scores of preference pairs, their losses and their metrics."""
