"""One file a combination rule, with its formula, its source and what a zero gradient means."""
