"""`pilot-jax report`: run directories as one page. Reads what runs have written; `examples` also asks their models."""
