"""Real pictures with words, as data for federations: emoji in three open drawing styles, which ship with the package.

It may import `data` and the folders below, but no other of the generated data sets (`embedded`).
"""
