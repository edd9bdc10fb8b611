"""Strategies × seeds on the same data and steps: variants, the runner, statistics, the page."""
