"""Sources of training data: files and sets on the hub, in whatever layout, as records."""
