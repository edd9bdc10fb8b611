"""Computes a run's memory, FLOPs, bytes, lowered programs and ownership table from shapes, without any arrays."""
