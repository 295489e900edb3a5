"""An embedded miniature of the paper's summarisation study: `raco-fast demo`, no download.

documents -> judges -> model -> jobs -> study, and results -> summary -> claims, plot -> report.
"""
