"""Data: LLaVA-format files, conversations as token ids, images and their features, and every client's arrays.

The code in this folder does not depend on the strategy. It may import `models` (for the vision tower) and the folders
below.
"""
