"""An embedded miniature of the paper's summarisation study: `raco-fast demo`, no download."""
