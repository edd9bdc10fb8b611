"""Scores answers, and evaluates the personalised model of every client, whatever the strategy was."""
