"""The formats preference data comes in, a file for each or for some that are alike."""
