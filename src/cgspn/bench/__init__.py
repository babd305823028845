"""Benchmarks of `cgspn bench`: timing (timing.py), peak rates (machine.py) and result files (results.py)."""
