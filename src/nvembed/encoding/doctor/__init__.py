"""``nvembed doctor``: what a model folder does, found by running it."""
