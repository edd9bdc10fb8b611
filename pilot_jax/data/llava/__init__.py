"""LLaVA-format instruction data: one sample, JSON files of samples, tables of samples."""
