"""The metrics of mteb as pure functions over arrays, one module per kind of task.

Letters: N items (texts or pairs), Q queries, K results per query, B resamples, E experiments, C
classes, G gold labels. Where a function takes ``weights_BN`` it gives the metric of B resamples at
once, an item counted as often as its weight says: ``evaluation/significance.py`` lives on that.
"""
