"""The formats preference data comes in, a file for each."""
