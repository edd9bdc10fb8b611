"""A federation small enough to be checked by hand.

Imported by tests, documentation and users, by nothing of the package.
"""
