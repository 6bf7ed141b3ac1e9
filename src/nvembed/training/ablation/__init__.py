"""Ablations: a grid of settings over one recipe, each arm trained and scored over several seeds."""
