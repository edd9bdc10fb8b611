"""The embedded example: digit scenes, tasks on them, federations of clients, and the base model trained on them.

It is part of the package, so that everything runs without a download. It may import `federation` and the folders below.
"""
