"""The model, from a text to its vector; any model as an encoder, and many texts through it."""
