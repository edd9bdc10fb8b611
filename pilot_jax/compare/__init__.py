"""Several strategies on the same base, data and steps: variants, their runs, statistics, pages of results.

Imports `report`, `runs` and what lies below; it passes configs on and reads none.
"""
