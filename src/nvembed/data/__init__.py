"""Training data: records from files, examples from records, mixtures, batches. Free of torch."""
