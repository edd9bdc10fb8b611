"""A federation small enough to check by hand, and writers of tiny checkpoints, for tests, documentation and users.

It may import the whole package, and nothing in the package imports it.
"""
