"""The page of runs: run directories, finished or not, as one HTML file that loads nothing from elsewhere.

It reads what `runs` has written, and can load a run's models to show what they answer. It may import `runs` and what
lies below. `compare` builds the page of a comparison from the parts here.
"""
