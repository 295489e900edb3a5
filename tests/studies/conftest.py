"""A tiny model with its data, as for runs of `raco-fast train`."""

from tiny_runs import preference_files, runs, save_tiny, settings, tiny  # noqa: F401
