"""What the benchmarks against others share.

``job.py`` is read by every process and needs nothing installed. ``ours.py``,
``sentence_trainer.py``, ``flag_embedding.py``, ``encoders.py``, ``miners.py`` and ``ceiling.py``
run in processes of their own; the rest belongs to the benchmark that starts them.
"""
