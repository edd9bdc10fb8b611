"""Scores of answers, and the personalised evaluation of every client. Knows nothing of strategies."""
