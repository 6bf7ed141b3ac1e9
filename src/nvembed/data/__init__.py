"""Data: instructions, documents and records from files, examples, batches. Free of torch."""
