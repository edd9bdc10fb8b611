"""Runs: from a config over its federation and its rounds to a run directory, and from a run directory back to models.

Only `prepare.py` reads a whole config. This folder imports `evaluation` and the layers below it.
"""
