"""Measurements: what runs are timed with (timing.py), on what (machine.py), how they are kept (results.py)."""
