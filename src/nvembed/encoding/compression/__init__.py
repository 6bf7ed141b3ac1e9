"""Smaller models: layers, channels and tokens that texts show to be dispensable are left out."""
