"""What ``benchmarks/scale.py`` is made of.

``corpus.py`` makes documents, ``children.py`` has the parts that run in processes of their own,
``measure.py`` watches them, ``cost.py`` fits what they took and carries it to other sizes.
"""
