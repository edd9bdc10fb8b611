"""For tests, documentation and users: a federation small enough to be checked by hand, and writers of tiny checkpoints.

May import whatever the package has; nothing of the package imports it.
"""
