"""The embedded default: the recipe on the documentation of installed Python packages."""
