"""The command `raco-fast`, which is also `python -m raco_fast`, and its options."""
