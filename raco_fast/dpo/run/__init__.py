"""A training run: its config, trainer, evaluation, checkpoints and files."""
