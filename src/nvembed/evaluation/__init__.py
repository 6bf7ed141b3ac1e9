"""Evaluation on local task folders, through mteb, with BM25 as the baseline of retrieval."""
