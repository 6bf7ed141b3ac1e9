"""Using a trained model: the encoder protocol, encoding files, search."""
