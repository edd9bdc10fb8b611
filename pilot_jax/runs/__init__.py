"""One run: from a config to its federation, its rounds, its folder, and back from the folder to its models.

The only place that reads a whole config (`prepare`). Imports evaluation and what lies below it.
"""
