"""Errors, configuration, run folders, seeds and files: what every other package may use."""
