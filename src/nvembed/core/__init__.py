"""Errors, configuration, run folders, seeds and files: what every other package may use."""

__version__ = "0.1.0"
"""The version of the package; it has no other place."""
