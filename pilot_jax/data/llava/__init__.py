"""LLaVA-format instruction data: one sample, files of them, tables of them."""
