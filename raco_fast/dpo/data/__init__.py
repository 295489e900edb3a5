"""Preference data: from files to batches of token ids."""
