"""The embedded default: train and evaluate on the documentation of the installed Python packages."""
