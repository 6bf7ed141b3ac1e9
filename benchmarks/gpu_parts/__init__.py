"""The parts of ``benchmarks/gpu.py``: each module has ``run(context)`` and writes its rows.

``shapes.py`` has what they share: the model of NV-Embed-v2's shape, its operations, the clock.
"""
