"""The version of the package; it has no other place."""

__version__ = "0.1.0"
