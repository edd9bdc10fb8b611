"""Real pictures and real models: emoji in three open drawing styles, which ship with the package, and a base model
made of pretrained parts that package registries hold.

It may import `data`, `models` and the folders below, but no other of the generated data sets (`embedded`).
"""
