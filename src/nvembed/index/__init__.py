"""Documents in an embedded vector database: index, search, a page to look at it."""
