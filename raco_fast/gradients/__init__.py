"""Where m per-objective gradients live until they are combined."""
