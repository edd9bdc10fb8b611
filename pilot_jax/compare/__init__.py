"""Compares strategies on the same base model, data and steps: variants, their runs, statistics, and pages of results.

It imports `report`, `runs` and the layers below them. It passes configs on without reading them.
"""
