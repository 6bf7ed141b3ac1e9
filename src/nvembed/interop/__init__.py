"""What a model folder is, and what its files hold, read before a model is built."""
