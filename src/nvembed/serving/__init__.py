"""A server around an embedding model: OpenAI's and TEI's routes, batching, limits, metrics."""
