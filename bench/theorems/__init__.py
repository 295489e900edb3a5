"""Theorems 3.1 and 3.2 of arXiv 2602.02495 where their assumptions hold."""
