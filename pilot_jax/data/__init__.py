"""Data: LLaVA-format files, conversations as token ids, images and their features, and every client's arrays.

Nothing here knows of strategies. It may import `models` (for the vision tower) and what lies below.
"""
