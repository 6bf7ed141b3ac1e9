"""Hard negatives: exact search, positive-aware filters, and the miner that puts them together."""
