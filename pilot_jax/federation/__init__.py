"""The federated method: parameter ownership, losses, local training, uploads, mixing, strategies and rounds.

It opens no file, reads no environment variable, and starts threads in `executor.py` alone.
"""
