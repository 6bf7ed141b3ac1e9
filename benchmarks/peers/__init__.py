"""What the training benchmarks share: data, jobs in processes of their own, and the peers.

``job.py`` is read by every process and needs nothing installed; ``ours.py``,
``sentence_trainer.py`` and ``flag_embedding.py`` are the programs that train; ``data.py``,
``setup.py`` and ``report.py`` belong to the benchmark that starts them.
"""
