"""A tiny model, a tiny tokenizer and learnable preferences."""

from tiny_runs import (  # noqa: F401
    make_config,
    make_model,
    preference_files,
    runs,
    save_tiny,
    settings,
    tiny,
    write_pairs,
)
