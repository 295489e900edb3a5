"""Settings: from the text of a file or a command line to checked values; paths with `~`."""
