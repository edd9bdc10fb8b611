"""Writes one HTML file about run directories, finished or not, that loads nothing from the network.

It reads the files that `runs` has written, and can load a run's models to show their answers. It may import `runs` and
the layers below it. `compare` makes the page of a comparison from the same parts.
"""
