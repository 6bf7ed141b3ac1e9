"""Synthesis: training examples written by a language model behind a chat endpoint."""
