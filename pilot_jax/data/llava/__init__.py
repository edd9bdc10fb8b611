"""Reads and writes LLaVA-format instruction data: single samples, JSON files, tables."""
