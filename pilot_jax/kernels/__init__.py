"""Fast twins of short formulas, one file each, opened by the formula; backend checks stand here and nowhere else.

Imports parallel, config, errors.
"""
