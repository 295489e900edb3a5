"""What is written: pages, plots, goals and the verdicts on them."""
