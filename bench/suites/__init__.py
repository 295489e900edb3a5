"""One suite a file, by the name of its part."""
