"""Settings: files and options, read by PyYAML and jsonargparse within limits; paths with `~`."""
